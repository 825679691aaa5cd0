"""The version of this package, under both of its names."""

__version__ = "0.1.0"
