"""Nearest-neighbour search with FAISS."""
