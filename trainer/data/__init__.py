"""Samples on their way from tars to batches."""
