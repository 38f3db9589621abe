"""Many requests from a file, answered beside what else is served."""
