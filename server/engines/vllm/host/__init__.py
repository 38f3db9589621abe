"""In the server process: vLLM is started, asked and watched, and slots are given to programs."""
