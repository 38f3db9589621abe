"""Routes for operators: health, switches, jobs, measured effects, what the server can do."""
