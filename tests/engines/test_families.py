"""Every family, with all that its configuration can ask for switched on, against eager Hugging Face."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.engines.transformers import attention
from steering.language.errors import UnsupportedModel
from steering.models.describe import model_facts
from steering.models.families import FAMILIES as TABLE
from tests.engines.conftest import generate, ids
from tests.tiny import BARE_SWITCHES, PLAIN_FIELDS, REFUSED_FIELDS, SWITCHES, everything, fields_of, tiny

TOLERANCE = 1e-4
REFUSED_HERE = tuple(name for name, family in TABLE.items() if family.not_embedded is not None)
SERVED_HERE = tuple(name for name in TABLE if name not in REFUSED_HERE)
# Fields of a configuration that transformers' own model does not read.
UNREAD = {("gemma3_text", "attn_logit_softcapping")}
# The first is shorter than the sliding window, the others are longer and come in parts.
LENGTHS = (4, 21, 30, 45)


def _prompt(i: int, length: int) -> list[int]:
    return [3 + (i * 7 + 5 * t + t * t) % 90 for t in range(length)]


@pytest.fixture
def full_model(tmp_path: Path) -> Any:
    def make(family: str, **changes: Any) -> str:
        tiny(family, **{**everything(family), **changes}).save_pretrained(tmp_path)
        return str(tmp_path)

    return make


@torch.no_grad()
def _eager(folder: str, texts: list[list[int]]) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return [model(input_ids=torch.tensor([text]), use_cache=False).logits[0].log_softmax(-1) for text in texts]


@pytest.mark.parametrize("family", SERVED_HERE)
async def test_all_features_at_once_equal_eager(start_engine: Any, full_model: Any, family: str) -> None:
    folder = full_model(family)
    engine = await start_engine(family, model=folder, max_batch_tokens=32)
    prompts = [_prompt(i, length) for i, length in enumerate(LENGTHS)]
    mixed = await asyncio.gather(*(generate(engine, prompt) for prompt in prompts))
    texts = [prompt + ids(tokens) for prompt, (tokens, _) in zip(prompts, mixed, strict=True)]
    eager = _eager(folder, texts)
    for prompt, (tokens, _), rows in zip(prompts, mixed, eager, strict=True):
        for token, row in zip(tokens, rows[len(prompt) - 1:], strict=False):
            assert token.logprob == pytest.approx(float(row[token.token_id]), abs=TOLERANCE)
            for other, value in token.top_logprobs:
                assert value == pytest.approx(float(row[other]), abs=TOLERANCE)
    # A pass beside generation, of texts of several lengths, pads.
    ends = await engine.next_logprobs(texts)
    assert torch.allclose(ends, torch.stack([rows[-1] for rows in eager]), atol=TOLERANCE)


@pytest.mark.parametrize("family", SERVED_HERE)
def test_every_feature_shows(family: str) -> None:
    """The control: with one switch as it is by default, eager gives something else, so the test above tests it."""
    text = torch.tensor([_prompt(0, 45)])
    full = everything(family)

    @torch.no_grad()
    def logprobs(**settings: Any) -> torch.Tensor:
        return tiny(family, attn_implementation="eager", **settings)(input_ids=text, use_cache=False).logits[0]

    expected = logprobs(**full)
    for name in BARE_SWITCHES:
        if name not in full or (family, name) in UNREAD:
            continue
        without = {key: value for key, value in full.items() if key != name}
        if name == "attn_logit_softcapping":
            without[name] = None
        assert float((logprobs(**without) - expected).abs().max()) > 100 * TOLERANCE, name


def test_the_table_of_features_is_complete() -> None:
    """A new family, or a new field of an old one, is described in tests/tiny.py before it is served."""
    for family in TABLE:
        assert fields_of(family) <= PLAIN_FIELDS | SWITCHES.keys() | REFUSED_FIELDS, family


async def test_scores_in_parts_are_scores(start_engine: Any, full_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long batch caps its scores a few rows at a time."""
    folder = full_model("gemma2")
    engine = await start_engine("gemma2", model=folder)
    prompt = _prompt(1, 45)
    whole = await engine.score(prompt, full=True)
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 7 * 4 * 45)
    parts = await engine.score(prompt, full=True)
    assert torch.allclose(whole.full, parts.full, atol=TOLERANCE)
    assert torch.allclose(parts.full, _eager(folder, [prompt])[0], atol=TOLERANCE)


@pytest.mark.parametrize("family", REFUSED_HERE)
async def test_what_the_table_excludes_is_refused_for_that_reason(start_engine: Any, full_model: Any, family: str
                                                                  ) -> None:
    with pytest.raises(UnsupportedModel, match=f"{family}.* {TABLE[family].not_embedded}"):
        await start_engine(family, model=full_model(family))


def test_what_the_attention_does_not_know_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention sinks of later families, say; here one of today's arguments is made unknown."""
    attention.register()
    model = tiny("llama", attn_implementation="sdpa")
    attention.check_attention(model)
    monkeypatch.setattr(attention, "KNOWN", attention.KNOWN - {"scaling"})
    with pytest.raises(UnsupportedModel, match="llama asks for scaling"):
        attention.check_attention(model)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
async def test_attention_that_looks_ahead_is_refused(start_engine: Any, full_model: Any, family: str) -> None:
    with pytest.raises(UnsupportedModel, match="use_bidirectional_attention"):
        await start_engine(family, model=full_model(family, use_bidirectional_attention=True))


def test_the_context_ends_where_a_long_text_would_change_its_neighbours() -> None:
    """longrope takes other frequencies for the whole batch once one text in it is long."""
    assert model_facts(tiny("phi3", **everything("phi3")), model_id="tiny", fingerprint="").context_length == 63
    assert model_facts(tiny("phi3"), model_id="tiny", fingerprint="").context_length == 512
