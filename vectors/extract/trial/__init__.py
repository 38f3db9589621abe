"""The trial: the last step of making an artifact. Candidates are steered with, and judged by what was written."""
