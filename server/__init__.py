"""The HTTP server: OpenAI routes, library routes, engines."""
