"""The towers of a run's model, a file for each kind, and the parts that they are made of."""
