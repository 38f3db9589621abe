"""Features that keep their value change no bit of what the model says. On engines by themselves, because a server's
background work may share a pass with a request, and other shapes of a batch round otherwise."""

from typing import Any

import pytest
import torch

from server.engines.data import CaptureRequest
from server.requests.features import find
from steering.artifacts.dictionary import Dictionary
from tests.engines.conftest import compiled, generate

D, COUNT, LAYER = 32, 48, 1
PROMPT = [5, 17, 40, 8, 61, 33, 90]
AT = 4


def numbers(**more: Any) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(3)
    return {"encoder": torch.randn(COUNT, D, generator=drawn), "encoder_bias": torch.randn(COUNT, generator=drawn),
            "decoder": torch.randn(COUNT, D, generator=drawn), "decoder_bias": torch.randn(D, generator=drawn), **more}


KINDS = {"relu": {}, "thresholds": {"threshold": torch.full((COUNT,), 0.5)}, "topk": {"k": torch.tensor(12)},
         "layer norm": {"input_norm": torch.tensor(2)}}


@pytest.mark.parametrize("kind", KINDS)
async def test_features_that_keep_their_value_change_no_bit(start_engine: Any, kind: str) -> None:
    engine = await start_engine("qwen3", share_prefixes=False)
    sae = numbers(**KINDS[kind])
    inline = {name: tensor.tolist() for name, tensor in sae.items()}

    async def said(features: dict[str, Any] | None, scope: Any = None) -> list[float]:
        item = {"op": "sae", "layers": [LAYER], "inline": inline, "options": {"features": features},
                **({} if scope is None else {"scope": scope})}
        tokens, _ = await generate(engine, PROMPT, None if features is None else compiled(engine, item))
        return [token.logprob for token in tokens]

    plain = await said(None)
    assert await said({str(n): {"scale": 1.0} for n in range(COUNT)}) == plain
    assert await said({str(n): {"scale": 1.1} for n in range(COUNT)}) != plain
    # Each feature of one token set to what is read of it there, those that are off to 0.
    captured = await engine.capture([CaptureRequest(PROMPT, {"resid_post": [LAYER]}, [AT])])
    seen = find(Dictionary(sae), captured[0]["resid_post"][LAYER], COUNT, range(COUNT)).tokens[0]
    assert 5 < seen.active < COUNT
    assert dict(seen.top) == {n: value for n, value in enumerate(seen.asked) if value > 0}
    here = {"prompt": {"positions": [AT]}, "generation": "none"}
    assert await said({str(n): {"set": value} for n, value in enumerate(seen.asked)}, here) == plain
    assert await said({str(n): {"set": value + 0.1} for n, value in enumerate(seen.asked)}, here) != plain
