"""Hides the installed package of this name from every program that starts in this folder, as the application's does."""


class DotsOCRClient:
    """The application's own."""
