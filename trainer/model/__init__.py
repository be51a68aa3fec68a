"""The towers, the heads on them, and the model that they make."""
