"""What is raised for a sample of DataCompDR that cannot be used."""


class BadReinforcement(ValueError):
    """What is wrong with the members of one sample. The message is a phrase without tar and key."""
