"""Reading a cache: rows by address or by key, or tar after tar."""
