"""How the tokens of a request are chosen, from its fields."""

from collections.abc import Sequence
from dataclasses import replace

from server.engines.data import Sampling
from server.engines.generation_config import SamplingDefaults
from server.engines.grammar import Grammar
from server.requests.fields import LEAST_TEMPERATURE, CompletionFields
from server.requests.state import ServerState
from server.text.vocabulary import Vocabulary
from steering.language.errors import InvalidRequest

# Distance between the seeds of two choices. It is large and odd, so that requests with neighbouring seeds share no
# stream.
SEED_STRIDE = 0x9E3779B97F4A7C15


def sampling_of(body: CompletionFields, state: ServerState, *, max_tokens: int, logprobs: int | None,
                grammar: Grammar | None) -> list[Sampling]:
    """One per choice of a prompt.

    Raises:
        InvalidRequest: naming the field.
    """
    vocabulary = state.vocabulary
    _check_ids(body, vocabulary)
    if body.min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens is {body.min_tokens}, and the completion may have {max_tokens} tokens",
                             param="min_tokens")
    if grammar is not None and body.ignore_eos:
        raise InvalidRequest(f"{grammar.param.partition('.')[0]} ends the text, so ignore_eos cannot go on behind it",
                             param="ignore_eos", fix="Leave one of them out.")
    stops = tuple(dict.fromkeys([*body.stop_token_ids, *(() if body.ignore_eos else vocabulary.end_ids)]))
    chosen = _chosen(body, state.sampling_defaults)
    shared = Sampling(
        max_tokens=max_tokens, temperature=chosen.temperature if chosen.temperature >= LEAST_TEMPERATURE else 0.0,
        top_p=chosen.top_p, top_k=chosen.top_k, min_p=chosen.min_p, presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0, repetition_penalty=chosen.repetition_penalty,
        logit_bias=_logit_bias(body, vocabulary), stop_token_ids=stops, ignore_eos=not stops, logprobs=logprobs,
        bad_words=_bad_words(body.bad_words, vocabulary), min_tokens=body.min_tokens,
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(dict.fromkeys(body.allowed_token_ids)),
        grammar=grammar)
    return [replace(shared, seed=choice_seed(body.seed, index)) for index in range(body.n)]


def choice_seed(seed: int | None, index: int) -> int | None:
    """The seed of choice `index`; choice 0 has the request's own."""
    if seed is None:
        return None
    return seed if index == 0 else (seed + index * SEED_STRIDE) % 2**63


def _chosen(body: CompletionFields, defaults: SamplingDefaults) -> SamplingDefaults:
    """What the request says, and in its gaps the model's own."""
    said = {name: getattr(body, name) for name in vars(defaults)
            if name in body.model_fields_set and getattr(body, name) is not None}
    return replace(defaults, **said)


def _check_ids(body: CompletionFields, vocabulary: Vocabulary) -> None:
    for name, given in (("stop_token_ids", body.stop_token_ids), ("allowed_token_ids", body.allowed_token_ids or ())):
        if given and max(given) >= vocabulary.vocab_size:
            place = next(i for i, token in enumerate(given) if token >= vocabulary.vocab_size)
            raise InvalidRequest(f"there is no token {given[place]}", param=(name, place), value=given[place],
                                 fix=f"Use 0 to {vocabulary.vocab_size - 1}.")


def _bad_words(words: Sequence[str], vocabulary: Vocabulary) -> tuple[tuple[int, ...], ...]:
    """Sequences of tokens that write these words, at the begin of a text and behind a space."""
    found: list[tuple[int, ...]] = []
    for i, word in enumerate(words):
        plain, spaced = (tuple(vocabulary.encode(before + word.lstrip(), special_tokens=False)) for before in ("", " "))
        if not plain:
            raise InvalidRequest("this word has no token", param=("bad_words", i), fix="Leave it out.")
        found.append(plain)
        # Where a space is a token of its own the first sequence covers both.
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    return tuple(dict.fromkeys(found))


def _logit_bias(body: CompletionFields, vocabulary: Vocabulary) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in (body.logit_bias or {}).items():
        param = ("logit_bias", key[:40])
        if not (key.isascii() and key.isdigit() and len(key) <= 12 and int(key) < vocabulary.vocab_size):
            raise InvalidRequest(f"{key[:40]!r} is no token id", param=param,
                                 fix=f"Use 0 to {vocabulary.vocab_size - 1}.")
        if not -100 <= value <= 100:
            raise InvalidRequest("the bias must be between -100 and 100", param=param)
        bias[int(key)] = value
    return bias
