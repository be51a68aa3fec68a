"""The embedding cache: a pretrained classifier's embeddings in a Zarr store, computed once per backbone."""
