"""Captured activations as files, and how they are kept."""
