"""In vLLM's processes: the model is hooked, and each step does what the programs of its requests ask for."""
