"""Our sampling settings in vLLM's words, and vLLM's log-probabilities in ours."""

import math
from collections.abc import Mapping
from typing import Any

from server.engines.data import LEAST_LOGPROB, Sampling, Token
from server.engines.grammar import Grammar
from server.engines.vllm.wire import EXTRA
from steering.language.errors import ModelOverflow

# vLLM raises smaller temperatures to this one when a request is made, and again wherever the request is read.
LEAST_TEMPERATURE = 0.01


def sampling_params(sampling: Sampling, extra: Mapping[str, Any]) -> Any:
    """`extra` goes to the workers. End-of-text tokens are named one by one, as the embedded engine has them."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    temperature = sampling.temperature
    carried = dict(extra)
    if 0 < temperature < LEAST_TEMPERATURE:
        # The worker puts it back; in float32 no logit that a model makes overflows at the temperatures that are served.
        carried["temperature"], temperature = temperature, LEAST_TEMPERATURE
    params = SamplingParams(
        max_tokens=sampling.max_tokens, temperature=temperature, top_p=sampling.top_p,
        top_k=sampling.top_k, min_p=sampling.min_p, presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty, repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None, seed=sampling.seed, ignore_eos=True,
        stop_token_ids=[] if sampling.ignore_eos else list(sampling.stop_token_ids), logprobs=sampling.logprobs,
        min_tokens=sampling.min_tokens,
        allowed_token_ids=None if sampling.allowed_token_ids is None else list(sampling.allowed_token_ids),
        structured_outputs=None if sampling.grammar is None else _structured(sampling.grammar), detokenize=False,
        output_kind=RequestOutputKind.DELTA, extra_args={EXTRA: carried} if carried else None)
    if sampling.bad_words:
        # As vLLM has them once it has tokenised words.
        params._bad_words_token_ids = [list(word) for word in sampling.bad_words]
    return params


def _structured(grammar: Grammar) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    field = {"json": "json", "regex": "regex", "ebnf": "grammar", "lark": "grammar", "tag": "structural_tag"}
    form: dict[str, Any] = {field[grammar.kind]: grammar.text}
    return StructuredOutputsParams(**form)


def tokens_of(output: Any, sampling: Sampling) -> list[Token]:
    """Tokens that one output of vLLM brings."""
    completion = output.outputs[0]
    finish = completion.finish_reason
    ids = list(completion.token_ids)
    tokens = []
    for i, token_id in enumerate(ids):
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if sampling.logprobs is not None:
            table = completion.logprobs[i]
            if math.isnan(table[token_id].logprob):
                raise ModelOverflow("the logits of a token are not finite",
                                    fix="Serve the model in bfloat16 or float32 (setting dtype).")
            logprob = max(table[token_id].logprob, LEAST_LOGPROB)
            best = sorted(table.items(), key=lambda item: (item[1].rank, -item[1].logprob))[:sampling.logprobs]
            top = tuple((int(other), max(float(entry.logprob), LEAST_LOGPROB)) for other, entry in best)
        last = i == len(ids) - 1 and finish is not None
        tokens.append(Token(int(token_id), logprob, top, ("stop" if finish == "stop" else "length") if last else None))
    return tokens
