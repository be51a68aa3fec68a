"""Caches joined to the tars of a run, and what an epoch shows of a sample: its view, its caption, its members."""
