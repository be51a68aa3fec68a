"""Carrying the rows of a cache over to other tars."""
