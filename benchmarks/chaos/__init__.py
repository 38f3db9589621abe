"""Chaos: faults of every kind around a real server, and an oracle that watches the innocent requests beside them."""
