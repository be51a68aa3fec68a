"""The ranks that share one global batch, and how the column side of the similarity matrix reaches each of them."""
