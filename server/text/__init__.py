"""Between texts and tokens: prompts, the roles of their tokens, the text of a completion, stop strings."""
