"""HTTP routes. They check what was asked, call what does it, and say what came of it."""
