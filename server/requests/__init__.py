"""A completion from its admission to its receipt."""
