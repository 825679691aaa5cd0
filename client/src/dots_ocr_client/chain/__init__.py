"""The way of a page through the engines: drawn in its turn, asked of one after the other."""
