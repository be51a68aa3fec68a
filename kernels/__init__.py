"""The large-batch similarity matrix and the contrastive losses made of it."""
