"""The embedding cache: a frozen pretrained encoder's embeddings in a Zarr store, computed once per encoder."""
