"""Typed client of a Trimtab server."""
