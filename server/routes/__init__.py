"""The routes beside those of OpenAI."""
