"""Job 1: stream a pretrained classifier's embeddings into a Zarr store, once per backbone."""
