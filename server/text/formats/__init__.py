"""How models write calls of tools, one form per file, and what they think."""
