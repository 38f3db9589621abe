"""The self-test must pass on every family, and find what it is there to find."""

from typing import Any

import pytest
import torch

from steering.acting import selftest, steerer
from steering.acting.selftest import narrowed, run_selftest
from steering.language.errors import UnsupportedModel
from steering.models.describe import model_facts
from steering.models.routers import attach_router
from steering.models.taps import attach
from tests.tiny import FAMILIES, tiny

torch.set_num_threads(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_every_family_is_reached(family: str) -> None:
    model = tiny(family)
    facts = model_facts(model, model_id=family, fingerprint="")
    result = run_selftest(model, facts)
    assert result.missed == ()
    assert dict(result.reached) == facts.sites
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("site", ["mlp_out", "head_out"])
def test_a_dead_hook_is_missed(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At one layer of one site only: everything else must still be offered."""
    model = tiny("llama")
    facts = model_facts(model, model_id="tiny", fingerprint="")

    def broken(model: Any, where: Any, layer: int, edit: Any, *, first: bool = False) -> Any:
        return attach(model, where, layer, (lambda h: h) if (where, layer) == (site, 1) else edit, first=first)

    monkeypatch.setattr(steerer, "attach", broken)
    result = run_selftest(model, facts)
    assert result.missed == ((site, 1),)
    offered = narrowed(facts, result).sites
    assert offered[site] == (0, 2)  # type: ignore[index]
    assert {name: layers for name, layers in offered.items() if name != site} == {
        name: layers for name, layers in facts.sites.items() if name != site}


def test_a_site_without_any_working_hook_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3_moe")
    facts = model_facts(model, model_id="tiny", fingerprint="")
    monkeypatch.setattr(steerer, "attach_router",
                        lambda model, layer, edit: attach_router(model, layer, lambda hidden, routing: None))
    result = run_selftest(model, facts)
    assert {site for site, _ in result.missed} == {"router"}
    assert "router" not in narrowed(facts, result).sites


def test_a_hook_whose_result_is_lost_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")
    facts = model_facts(model, model_id="tiny", fingerprint="")

    def copying(model: Any, where: Any, layer: int, edit: Any, *, first: bool = False) -> Any:
        def lost(h: torch.Tensor) -> torch.Tensor:
            edit(h)
            return h

        return attach(model, where, layer, lost if where == "resid_pre" else edit, first=first)

    monkeypatch.setattr(steerer, "attach", copying)
    assert run_selftest(model, facts).missed == (("resid_pre", 0), ("resid_pre", 1), ("resid_pre", 2))


def _leaking(model: Any, where: Any, layer: int, edit: Any, *, first: bool = False) -> Any:
    def spread(h: torch.Tensor) -> torch.Tensor:
        edited = edit(h)
        return edited if edited is h else h + (edited - h).sum(dim=0, keepdim=True)

    return attach(model, where, layer, spread if where == "attn_out" else edit, first=first)


def test_a_hook_that_leaks_into_other_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    facts = model_facts(model, model_id="tiny", fingerprint="")
    monkeypatch.setattr(steerer, "attach", _leaking)
    with pytest.raises(UnsupportedModel, match="another") as caught:
        run_selftest(model, facts)
    assert caught.value.param == "model"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_hook_that_changes_something_though_it_adds_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    facts = model_facts(model, model_id="tiny", fingerprint="")

    def louder(model: Any, where: Any, layer: int, edit: Any, *, first: bool = False) -> Any:
        return attach(model, where, layer, lambda h: edit(h) * (1 + 1e-6), first=first)

    monkeypatch.setattr(steerer, "attach", louder)
    with pytest.raises(UnsupportedModel, match="adds nothing"):
        run_selftest(model, facts)


@pytest.mark.parametrize("per_pass", [1, 5, 7])
def test_more_sites_than_a_pass_holds(per_pass: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "PROBES_PER_PASS", per_pass)
    model = tiny("mixtral")
    facts = model_facts(model, model_id="tiny", fingerprint="")
    result = run_selftest(model, facts)
    assert dict(result.reached) == facts.sites
