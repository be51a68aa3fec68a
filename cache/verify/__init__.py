"""Checking a cache: its files, its values, and its rows against the live teacher."""
