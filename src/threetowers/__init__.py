"""Embedding caches and a distillation trainer for three-tower contrastive vision-language models."""

__version__ = "0.1.0"
