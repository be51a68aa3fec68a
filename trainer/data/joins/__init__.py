"""The joins of caches to the tars of a run, and the captions and views that an epoch draws."""
