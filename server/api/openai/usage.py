"""What a request used, in OpenAI's words."""

from openai.types import CompletionUsage
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails

from server.requests.service import Started


def usage(started: Started) -> CompletionUsage:
    """So far. How many tokens of the prompts came from the engine's cache is told once that is known of all of them."""
    run = started.run
    prompt, generated = run.prompt_tokens, run.completion_tokens
    found = CompletionUsage(prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated)
    if run.cached_tokens is not None:
        found.prompt_tokens_details = PromptTokensDetails(cached_tokens=run.cached_tokens)
    if run.reasoning_tokens is not None:
        found.completion_tokens_details = CompletionTokensDetails(reasoning_tokens=run.reasoning_tokens)
    return found
