"""Checks on tokens that both engines make before anything runs."""

from collections.abc import Sequence

from server.engines.data import CaptureRequest, CompareRequest, Generation, ScoreRequest
from steering.language.errors import InvalidRequest
from steering.models.facts import ModelFacts


def check_tokens(token_ids: Sequence[int], facts: ModelFacts) -> None:
    """Raises InvalidRequest for no tokens, too many, or an id that the model does not have."""
    if not token_ids:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if len(token_ids) > facts.context_length:
        raise InvalidRequest(f"{len(token_ids)} tokens exceed the context of {facts.context_length}", param="prompt")
    if not 0 <= min(token_ids) <= max(token_ids) < facts.vocab_size:
        raise InvalidRequest(f"token ids must lie in 0 to {facts.vocab_size - 1}", param="prompt")


def check_room(generation: Generation, limit: int) -> None:
    """Raises InvalidRequest where prompt and max_tokens are over `limit` tokens."""
    wanted = len(generation.prompt_ids) + generation.sampling.max_tokens
    if wanted > limit:
        raise InvalidRequest(f"{len(generation.prompt_ids)} prompt tokens and max_tokens "
                             f"{generation.sampling.max_tokens} exceed the {limit} that fit", param="max_tokens")
    if generation.sampling.max_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
    if generation.sampling.max_tokens <= len(generation.generated_ids):
        raise InvalidRequest("max_tokens were generated already", param="max_tokens")


def check_compare(request: CompareRequest, facts: ModelFacts) -> None:
    check_tokens(request.token_ids, facts)
    if not 0 < request.prompt_length < len(request.token_ids):
        raise InvalidRequest("nothing was generated", param="prompt_length")


def check_score(request: ScoreRequest, facts: ModelFacts) -> None:
    check_tokens(request.token_ids, facts)
    if not 0 < request.start <= len(request.token_ids):
        raise InvalidRequest("nothing stands before what is scored", param="start")


def check_capture(request: CaptureRequest, facts: ModelFacts) -> None:
    check_tokens(request.token_ids, facts)
    if not any(request.sites.values()):
        raise InvalidRequest("no site and layer to capture", param="sites")
    for site, layers in request.sites.items():
        for layer in layers:
            facts.check_site(site, layer, "sites")


def positions_of(request: CaptureRequest) -> list[int]:
    """Positions to read, counted from the start."""
    length = len(request.token_ids)
    if request.positions is None:
        return list(range(length))
    for position in request.positions:
        if not -length <= position < length:
            raise InvalidRequest(f"position {position} lies outside of {length} tokens", param="positions")
    return [position % length for position in request.positions]


def length_of(request: CaptureRequest) -> int:
    """Tokens of a capture that count as the prompt."""
    return len(request.token_ids) if request.prompt_length is None else request.prompt_length
