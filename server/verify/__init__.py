"""`trimtab verify`: proof, on the user's own hardware and model, that steering is exact, and what it costs and does."""
