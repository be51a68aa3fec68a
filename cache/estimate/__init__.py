"""What a cache will cost."""
