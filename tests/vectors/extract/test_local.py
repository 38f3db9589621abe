"""A Hugging Face model as a subject, against plain transformers."""

from typing import Any

import pytest
import torch

from steering.language.errors import SteeringOverflow
from steering.models.describe import model_facts
from steering.models.routers import router_rule
from steering.models.routing import select
from tests.tiny import tiny
from vectors.extract.local import LocalSubject
from vectors.extract.programs import EVERYWHERE, LAST, adding, program_of
from vectors.extract.recipe import Work
from vectors.extract.scratch import Scratch
from vectors.extract.subject import stream
from vectors.extract.usage import read_usage

TEXTS = [(1, 5, 9), (1, 7, 3, 8, 20), (1, 6, 2)]


class Words:
    """A tokenizer is not what is tested here."""

    eos_token_id = 96

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def subject(family: str) -> LocalSubject:
    model = tiny(family)
    return LocalSubject(model, Words(), model_facts(model, model_id=family, fingerprint="f" * 16))  # type: ignore[arg-type]


@torch.no_grad()
def test_captures_are_the_models_hidden_states() -> None:
    model = tiny("llama")
    found = subject("llama").capture(TEXTS, "resid_post", [0, 1], [-1])
    for text, layers in zip(TEXTS, found, strict=True):
        states = model(torch.tensor([text]), output_hidden_states=True).hidden_states
        for layer in (0, 1):
            assert torch.allclose(layers[layer][0], states[layer + 1][0, -1], atol=1e-5)


@torch.no_grad()
def test_steered_scores_are_those_of_a_plain_hook() -> None:
    model, vector = tiny("llama"), torch.randn(32, generator=torch.Generator().manual_seed(0))
    local = subject("llama")

    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[:, -1] += vector
        return output

    for text in TEXTS:
        handle = model.model.layers[1].register_forward_hook(hook)
        expected = model(torch.tensor([text])).logits[0, -1].log_softmax(-1)
        handle.remove()
        program = adding(local.facts, "resid_post", 1, vector, LAST)
        found = local.next_logprobs(TEXTS, program)[TEXTS.index(text)]
        assert torch.allclose(found, expected, atol=1e-4)
        assert not torch.allclose(found, local.next_logprobs([text])[0], atol=1e-3)


@torch.no_grad()
def test_greedy_steered_generation_without_a_cache() -> None:
    model, vector = tiny("qwen3"), 3 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    local = subject("qwen3")
    ids = list(TEXTS[0])
    handle = model.model.layers[0].register_forward_hook(lambda m, a, out: (
        (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector))
    while len(ids) < 7 and (len(ids) == 3 or ids[-1] != 96):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    handle.remove()
    said = local.generate([TEXTS[0]], 4, adding(local.facts, "resid_post", 0, vector, EVERYWHERE))
    assert said == [" ".join(str(token) for token in ids[3:] if token != 96)]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_usage_is_what_the_router_chooses(family: str) -> None:
    local, model = subject(family), tiny(family)
    layers = local.facts.sites["router"]
    with Scratch(layers, len(TEXTS), local.facts.num_experts) as store:
        work = Work(local, lambda share, stage: None, lambda: False, "test")
        read_usage(local, TEXTS, store, work.within(0.0, 1.0, "capture"))
        for n, found in stream(local, TEXTS, "router", layers, None, lambda share: None):
            for layer in layers:
                chosen = select(found[layer], router_rule(model, layer)).experts
                expected = torch.bincount(chosen.flatten(), minlength=local.facts.num_experts) / len(TEXTS[n])
                assert torch.allclose(store.rows(layer, [n])[0].float(), expected)


def test_a_program_leaves_no_hook_behind() -> None:
    local = subject("llama")
    before = local.next_logprobs(TEXTS)
    numbers = {0: {"heads": torch.tensor([1])}}
    program = program_of(local.facts, "head_set", "head_mask", "head_out", numbers, options={"mode": "scale"})
    assert not torch.equal(local.next_logprobs(TEXTS, program), before)
    assert torch.equal(local.next_logprobs(TEXTS), before)


def test_texts_of_one_batch_may_have_programs_of_their_own() -> None:
    local = subject("llama")
    vectors = [torch.randn(32, generator=torch.Generator().manual_seed(n)) for n in (2, 3)]
    one, two = (adding(local.facts, "resid_post", 0, vector, LAST) for vector in vectors)
    given = [one, None, two]
    together = local.next_logprobs(TEXTS, given)
    for text, program, row in zip(TEXTS, given, together, strict=True):
        assert torch.allclose(row, local.next_logprobs([text], program)[0], atol=1e-4)
    assert not torch.allclose(together[2], local.next_logprobs([TEXTS[2]], one)[0], atol=1e-3)


def test_what_cannot_be_carried_out_is_no_measurement() -> None:
    """A step that is not finite is not taken; a pass without it must not be mistaken for the steered one."""
    local = subject("llama")
    program = adding(local.facts, "resid_post", 1, torch.full((32,), 3e38), LAST)
    for call in (lambda: local.next_logprobs(TEXTS, program), lambda: local.token_logprobs(TEXTS, program),
                 lambda: local.capture(TEXTS, "resid_post", [2], [-1], program)):
        with pytest.raises(SteeringOverflow, match="token"):
            call()
    assert bool(local.next_logprobs(TEXTS).isfinite().all())
