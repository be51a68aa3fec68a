"""Building a cache: tars in, shards of embeddings out, shared by any number of workers."""
