"""The reference of `trimtab verify` stands on modules and formulas that are right by themselves."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

from server.verify import hooks
from server.verify.formulas import closed_curve
from steering.language.errors import UnsupportedModel
from steering.models.taps import offered_sites, tap
from tests.tiny import FAMILIES, tiny

TEXT = [3, 14, 15, 9, 2, 6, 5]


@pytest.mark.parametrize("family", FAMILIES)
def test_places_are_those_of_the_family_table_and_add_up(family: str) -> None:
    model = tiny(family)
    hooks.check_places(model, TEXT)
    for site, layers in offered_sites(model).items():
        for layer in layers:
            there, here = tap(model, site, layer), hooks.place(model, site, layer)
            assert (here.module, "output" if here.output else "input") == (there.module, there.side)


def test_a_wrong_place_does_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    right = hooks.place

    def wrong(model: Any, site: str, layer: int) -> hooks.Where:
        return right(model, "mlp_out" if site == "attn_out" else site, layer)

    monkeypatch.setattr(hooks, "place", wrong)
    with pytest.raises(UnsupportedModel, match="do not add up"):
        hooks.check_places(tiny("llama"), TEXT)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_a_router_that_is_chosen_anew_is_the_stock_one(family: str) -> None:
    """The gate's own rule on its own logits changes nothing; on other logits it does."""
    model = tiny(family)
    layer = offered_sites(model)["router"][-1]

    def everywhere(prompt: int, total: int) -> list[bool]:
        return [True] * total

    same = hooks.Edit("router", layer, lambda logits, choose: choose(logits), everywhere)
    other = hooks.Edit("router", layer, lambda logits, choose: choose(-logits), everywhere)
    plain, chosen, turned = hooks.logprobs(model, TEXT, 4, [[], [same], [other]])
    torch.testing.assert_close(chosen, plain)
    assert float((turned - plain).abs().max()) > 0.01


def test_an_edit_touches_its_own_row_and_tokens_only() -> None:
    edit = hooks.Edit("resid_post", 1, lambda h: h + 3.0, lambda prompt, total: [t >= prompt for t in range(total)])
    plain, edited, again = hooks.logprobs(tiny("llama"), TEXT, 4, [[], [edit], []])
    torch.testing.assert_close(again, plain)
    assert torch.allclose(plain[:4], edited[:4], atol=1e-5)
    assert float((plain[4:] - edited[4:]).abs().max()) > 0.01


def test_the_closed_curve_is_scipys() -> None:
    points = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    around = torch.cat([points, points[:1]]).double().numpy()
    expected = CubicSpline(range(7), around, bc_type="periodic")
    where = np.linspace(0, 6, 50, endpoint=False)
    assert np.allclose(closed_curve(points)(where).numpy(), expected(where))
