"""Embeddings of other tools: their files become a cache, and a cache becomes their files."""
