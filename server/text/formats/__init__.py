"""How models write tool calls, one form per file, and what they think."""
