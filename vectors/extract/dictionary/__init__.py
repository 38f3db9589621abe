"""Sparse autoencoders trained on activations: the rows they are trained on, the training, and what came of it."""
