"""The format of a cache on disk."""
