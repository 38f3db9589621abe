"""Doses: the inverse of a measured curve against closed forms, and where the compiler refuses them."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.errors import status_of
from steering.artifacts.dose import Calibrated, Curve, canonical, canonical_scope
from steering.artifacts.payload import Payload
from steering.artifacts.source import Resolved, Source
from steering.language.errors import InvalidSpec, NotCalibrated, TrimtabError
from steering.language.intervention import Intervention
from steering.language.scope import Scope
from steering.models.facts import ModelFacts
from steering.ops.add import AddOptions
from steering.programs.compiler import compile_program
from steering.programs.program import Program

STRENGTHS = tuple(0.5 * 1.5**i for i in range(9))
SQUARE = Curve(STRENGTHS, tuple(0.03 * s**2 for s in STRENGTHS))
FACTS = ModelFacts("tiny", "f" * 64, "qwen3", 4, 8, 2, 4, 16, 50, 128,
                   sites={"resid_post": (0, 1, 2, 3), "resid_pre": (0, 1, 2, 3)})


@given(st.lists(st.floats(-20, 5), min_size=1, max_size=12))
def test_a_curve_made_to_rise_is_the_least_squares_fit(logs: list[float]) -> None:
    """By the formula of the fit, which no algorithm uses: at i the largest over a <= i of the smallest over b >= i of
    the mean of the values from a to b."""
    count = len(logs)
    expected = [max(min(sum(logs[a:b + 1]) / (b + 1 - a) for b in range(i, count)) for a in range(i + 1))
                for i in range(count)]
    curve = Curve(tuple(range(1, count + 1)), tuple(math.exp(value) for value in logs))
    assert [math.log(kl) for kl in curve.rising()] == pytest.approx(expected, abs=1e-9)


@given(st.floats(0.03 * 0.25, 0.03 * STRENGTHS[-1] ** 2 * 0.999))
def test_a_power_law_is_inverted_exactly(dose: float) -> None:
    strength = SQUARE.strength(dose)
    assert strength == pytest.approx((dose / 0.03) ** 0.5, rel=1e-6)
    assert SQUARE.kl_at(strength) == pytest.approx(dose, rel=1e-6)


def test_noise_that_falls_does_not_make_the_answer_ambiguous() -> None:
    curve = Curve((1.0, 2.0, 4.0, 8.0), (0.1, 0.4, 0.3, 1.0))
    found = [curve.strength(dose) for dose in (0.1, 0.2, 0.34, 0.5, 1.0)]
    assert found == sorted(found) and found[0] == 1.0 and found[-1] == 8.0


@pytest.mark.parametrize("dose", [0.001, 5.0, float("inf")])
def test_nothing_is_extrapolated(dose: float) -> None:
    with pytest.raises(InvalidSpec, match="outside of what was measured"):
        SQUARE.strength(dose)
    assert SQUARE.kl_at(0.1) is None and SQUARE.kl_at(1000.0) is None


def test_a_curve_that_never_moves_reaches_nothing() -> None:
    with pytest.raises(InvalidSpec):
        Curve((1.0, 2.0), (0.0, 0.0)).strength(0.5)


def calibrated(**fields: Any) -> Calibrated:
    plain = Calibrated(fingerprint="f" * 64, op="add", sites=("resid_post",), layers=(2,),
                       options=canonical(AddOptions().model_dump()), scope=canonical_scope(Scope()), up=SQUARE,
                       down=Curve(STRENGTHS, tuple(0.12 * s**2 for s in STRENGTHS)))
    return replace(plain, **fields)


def source(*settings: Calibrated) -> Source:
    payload = Payload.build("vector", {n: {"vector": torch.ones(8)} for n in (1, 2)})
    return Source("cheerful@3", "d" * 64, payload, "add", "resid_post", "tiny", "f" * 64, layers=[2],
                  calibrated=settings)


def compiled(strength: Any, *settings: Calibrated, **fields: Any) -> Program:
    wanted = Intervention.model_validate({"artifact": "cheerful", "strength": strength, **fields})
    return compile_program([Resolved(wanted, source(*settings))], FACTS)


@pytest.mark.parametrize("written", [{"kl": 0.27}, {"value": 0.27, "unit": "kl"}])
def test_a_dose_becomes_the_strength_of_the_curve(written: dict[str, Any]) -> None:
    program = compiled(written, calibrated())
    applied = program.compiled[0].applied
    assert applied.strength["value"] == 0.27 and applied.strength["unit"] == "kl"
    assert applied.strength["scale"]["2"] == pytest.approx(3.0)
    assert applied.card_kl == pytest.approx(0.27)
    assert program.digest == compiled(applied.strength["scale"]["2"]).digest


def test_signs_have_curves_of_their_own() -> None:
    assert compiled({"kl": -0.12}, calibrated()).compiled[0].applied.strength["scale"]["2"] == pytest.approx(-1.0)
    with pytest.raises(InvalidSpec, match="negative dose has no meaning"):
        compiled({"kl": -0.12}, calibrated(down=None))
    assert compiled({"kl": 0}, calibrated()).acting == 0


@pytest.mark.parametrize("strength, expected", [
    (1.0, 0.03), (-1.0, 0.12), ({"value": 3 * 8**0.5, "unit": "unit"}, 0.27), (0.01, None), (0, None)])
def test_any_strength_states_what_the_card_says_of_it(strength: Any, expected: float | None) -> None:
    found = compiled(strength, calibrated()).compiled[0].applied.card_kl
    assert found == (None if expected is None else pytest.approx(expected))
    assert compiled(strength).compiled[0].applied.card_kl is None


@pytest.mark.parametrize("settings, fields", [
    ((), {}),
    ((calibrated(fingerprint="e" * 64),), {}),
    ((calibrated(),), {"layers": [1]}),
    ((calibrated(),), {"layers": [1, 2]}),
    ((calibrated(),), {"scope": {"prompt": "none"}}),
    ((calibrated(),), {"options": {"norm_match": True}}),
    ((calibrated(),), {"op": "ablate", "override": ["op"]}),
])
def test_a_dose_is_refused_in_any_other_setting(settings: tuple[Calibrated, ...], fields: dict[str, Any]) -> None:
    with pytest.raises(NotCalibrated) as caught:
        compiled({"kl": 0.27}, *settings, **fields)
    error = caught.value
    assert status_of(error) == 409 and error.param == "interventions[0].strength"
    parts = {"layers": f" --layers {','.join(map(str, fields.get('layers', [])))}",
             "scope": " --scope '{\"prompt\":\"none\"}'", "options": " --options '{\"norm_match\":true}'"}
    said = "".join(part for name, part in parts.items() if name in fields)
    assert error.fix == f"Run: trimtab calibrate cheerful@3 --prompts FILE{said}"


def test_settings_are_told_apart() -> None:
    other = calibrated(layers=(1,), up=Curve(STRENGTHS, tuple(0.3 * s**2 for s in STRENGTHS)))
    assert compiled({"kl": 0.3}, calibrated(), other, layers=[1]).compiled[0].applied.strength["scale"]["1"] == \
        pytest.approx(1.0)


def test_inline_numbers_have_no_doses() -> None:
    wanted = Intervention.model_validate({"op": "add", "layers": [1], "inline": {"vector": [1.0] * 8},
                                          "strength": {"kl": 0.5}})
    with pytest.raises(InvalidSpec, match="inline numbers have none"):
        compile_program([Resolved(wanted)], FACTS)


@pytest.mark.parametrize("written", [{"kl": "0.5"}, {"kl": 0.5, "unit": "kl"}, {"kl": 0.5, "value": 1}, {"kl": True},
                                     {"kl": float("nan")}, {"kl": 0.5, "dose": 1}])
def test_malformed_doses(written: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TrimtabError)):
        Intervention.model_validate({"artifact": "cheerful", "strength": written})
