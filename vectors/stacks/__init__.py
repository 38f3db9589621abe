"""Interventions that act together: what of each is left beside the others, and what the stack does that its parts do
not."""
