"""Checkpoints that can be resumed on any layout of ranks."""
