"""The data of a run: from tars to batches."""
