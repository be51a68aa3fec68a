"""What changes the weights: parameter groups, optimizers and the learning rate's schedule."""
