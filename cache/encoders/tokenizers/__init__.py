"""Tokenizers: captions to the ids of their tokens, by one protocol, one file a kind."""
