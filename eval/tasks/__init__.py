"""The tasks: each turns an encoder and a data set into a result."""
