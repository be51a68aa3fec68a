"""Models in the files of transformers: how they are loaded, and what they take and give."""
