"""Activations from passes that share a beginning and end early, against whole passes of plain Hugging Face models."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from server.engines.transformers.reading import read_untouched
from steering.language.vocabulary import Site
from steering.models.taps import attach, offered_sites
from tests.tiny import FAMILIES, everything, tiny

SHARED = [3 + (5 * t) % 60 for t in range(17)]


def alone(model: Any, text: Sequence[int], key: tuple[Site, int]) -> torch.Tensor:
    found: list[torch.Tensor] = []
    handle = attach(model, *key, lambda h: found.append(h.clone()) or h)
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([list(text)]), use_cache=False)
    finally:
        handle.remove()
    return found[0]


class Counted:
    """Tokens that went through each block."""

    def __init__(self, model: Any) -> None:
        self.tokens: list[int] = []
        self._blocks = [module for name, module in model.named_modules() if name.split(".")[-1].isdigit()
                        and name.count(".") == 2]
        for number, block in enumerate(self._blocks):
            block.register_forward_pre_hook(self._count(number), with_kwargs=True)
        self.tokens = [0] * len(self._blocks)

    def _count(self, number: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.tokens[number] += hidden.shape[0] * hidden.shape[1]

        return hook


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [SHARED, SHARED[:3]], ids=["shared", "apart"])
def test_every_site_of_every_family_is_as_in_whole_passes(family: str, shared: list[int]) -> None:
    model = tiny(family, **everything(family)).eval()
    texts = [[*shared, *(3 + (7 * i + 3 * t + t * t) % 60 for t in range(1 + 2 * i))] for i in range(4)]
    keys = [(site, layer) for site, layers in offered_sites(model).items() for layer in layers]
    found = read_untouched(model, texts, keys)
    assert found is not None
    for key in keys:
        for text, rows in zip(texts, found[key], strict=True):
            assert rows.shape[0] == len(text)
            assert torch.allclose(rows, alone(model, text, key), atol=1e-4), key
        assert not torch.allclose(found[key][1][-1], found[key][2][-1], atol=1e-3), "the texts do not differ"


def test_the_beginning_is_run_once_and_the_last_layers_not_at_all() -> None:
    model = tiny("qwen3").eval()
    counted = Counted(model)
    texts = [[*SHARED, 70 + i, 71 + i] for i in range(5)]
    read_untouched(model, texts, [("resid_post", 1), ("resid_pre", 0)])
    assert counted.tokens[:2] == [len(SHARED) + 5 * 2] * 2 and counted.tokens[2:] == [0] * (len(counted.tokens) - 2)
    assert len(counted.tokens) > 2


@pytest.mark.parametrize("texts", [[SHARED], [SHARED, SHARED], [SHARED, SHARED[:9]], [SHARED, SHARED[:1]]],
                         ids=["one", "equal", "a beginning", "one token"])
def test_texts_that_are_a_beginning_of_each_other(texts: list[list[int]]) -> None:
    model = tiny("qwen3").eval()
    key: tuple[Site, int] = ("resid_post", 2)
    found = read_untouched(model, texts, [key])
    assert found is not None
    for text, rows in zip(texts, found[key], strict=True):
        assert torch.allclose(rows, alone(model, text, key), atol=1e-5)


def test_what_is_not_finite_is_left_to_whole_passes() -> None:
    model = tiny("qwen3").eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[70] = torch.nan
    assert read_untouched(model, [[*SHARED, 70], [*SHARED, 71]], [("resid_post", 1)]) is None
    assert read_untouched(model, [[*SHARED, 71], [*SHARED, 72]], [("resid_post", 1)]) is not None
