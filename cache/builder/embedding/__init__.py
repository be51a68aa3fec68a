"""Embedding what is read of tars: images and captions."""
