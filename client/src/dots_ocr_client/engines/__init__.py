"""What can read a page."""
