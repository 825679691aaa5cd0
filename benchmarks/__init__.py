"""What a run that has nothing to do costs."""
