"""Bodies that ask for numbers which do not exist: too large, too small, not finite, or not numbers at all."""

import json
from typing import Any

from benchmarks.chaos.oracle import Body

TINY = (1e-300, 1e-40, 1e-38, 5e-324)
HUGE = (7e4, 3e38, 1e308, 1e9)


def sampling_poisons() -> list[Body]:
    """Sampling fields at the edges of what a float holds."""
    return [
        *({"temperature": value} for value in (*TINY, 1e-7, 2)),
        *({"repetition_penalty": value} for value in (*TINY, 10)),
        *({"top_p": value} for value in TINY), *({"min_p": value} for value in (*TINY, 1)),
        {"logit_bias": {str(token): 100 for token in range(40)}},
        {"logit_bias": {str(token): -100 for token in range(900)}},
        {"temperature": 1e-4, "repetition_penalty": 10, "presence_penalty": 2, "frequency_penalty": -2},
        {"top_k": 1, "top_p": 1e-9, "min_p": 1, "temperature": 1e-9}, {"seed": -2**63, "temperature": 2},
    ]


def steering_poisons(d_model: int, num_layers: int) -> list[Body]:
    """Interventions whose result leaves the range of the format, at several sites, layers and moments."""
    one: list[float] = [1.0] + [0.0] * (d_model - 1)
    all_large = [3e38] * d_model
    found: list[Body] = []
    for layer in (0, num_layers // 2, num_layers - 1):
        for site in ("resid_pre", "resid_post", "attn_out", "mlp_out"):
            found.append({"op": "add", "inline": {"vector": one}, "site": site, "layers": [layer], "strength": 3e38})
    for scope in ({"prompt": "none"}, {"generation": "none"}, {"prompt": {"positions": [-1]}}):
        found.append({"op": "add", "inline": {"vector": one}, "layers": [1], "strength": 3e38, "scope": scope})
    for value in HUGE:
        found.append({"op": "add", "inline": {"vector": one}, "layers": [1], "strength": value,
                      "options": {"norm_match": True}})
        found.append({"op": "clamp", "inline": {"vector": one, "value": value}, "layers": [1]})
    found.append({"op": "add", "inline": {"vector": all_large}, "layers": [1]})
    found.append({"op": "add", "inline": {"vector": all_large}, "layers": "all", "options": {"preserve_norm": True}})
    found.append({"op": "ablate", "inline": {"vector": all_large}, "layers": [1]})
    found.append({"op": "ablate", "inline": {"vector": [1e-38] * d_model}, "layers": [1]})
    # Two that are fine alone, and together are not.
    doubled = {"op": "add", "inline": {"vector": one}, "layers": [2], "strength": 3e38}
    return [{"steering": {"interventions": [item]}} for item in found] + [
        {"steering": {"interventions": [doubled, doubled]}},
        {"steering": {"interventions": [doubled, {**doubled, "strength": -3e38}]}}]


def asked_in_every_way(steering: Body) -> list[Body]:
    """The same poison, greedy, sampled, measured, guarded, reported and streamed."""
    return [{**steering, **way} for way in (
        {"temperature": 0}, {"temperature": 1, "seed": 3}, {"temperature": 0, "logprobs": 3},
        {"temperature": 0, "stream": True}, {"n": 3, "seed": 4},
        {"temperature": 0, "steering": {**steering["steering"], "report": "summary"}},
        {"temperature": 0, "steering": {**steering["steering"], "guard": {"kl": 0.5}}})]


def raw_poisons(model: str) -> list[bytes]:
    """Bodies that are not what JSON is."""
    good: dict[str, Any] = {"model": model, "prompt": "x", "max_tokens": 2}
    text = json.dumps(good)
    return [b"", b"\xff\xfe", b"{", b"null", b"[]", text[:-1].encode() + b', "temperature": NaN}',
            text[:-1].encode() + b', "temperature": 1e999}', text[:-1].encode() + b', "max_tokens": 3}',
            b"[" * 10_000, text.encode() + b"x", text.replace("2", "1e400").encode(),
            text.replace("2", "9" * 5000).encode()]
