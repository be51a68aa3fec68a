"""The weights of a tower before its first step."""
