"""The frozen encoders whose embeddings a cache holds."""
