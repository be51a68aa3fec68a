"""What an import raises for files that it cannot use."""


class BadSource(ValueError):
    """Files of embeddings that cannot be used. The message names the file, what was found, and what was expected."""
