"""Readings against formulas in numpy; gates: which side opens, how several join, what is refused, decided programs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from steering.artifacts.payload import Payload
from steering.artifacts.source import Resolved, Source
from steering.language.errors import ArtifactMismatch, InvalidSpec, LayerOutOfRange, TrimtabError, UnsupportedSite
from steering.language.gates import Reading
from steering.language.intervention import Intervention
from steering.ops.kernel import get_kernel, kernel_names
from steering.programs.compiler import compile_program
from steering.programs.gate import gates_of
from steering.programs.program import Program
from steering.programs.reading import Reader
from tests.steering.test_compiler import FACTS, D, add

H = torch.tensor(np.random.default_rng(0).normal(size=(6, D)), dtype=torch.float32)
C = torch.tensor([1.0, -2.0, 0.5, 0.0])
PROBE = {"weight": C, "bias": torch.tensor(0.25)}


def probe(*, kind: str = "probe", numbers: dict[int, Any] | None = None, **fields: Any) -> Source:
    reading = fields.pop("reading", Reading(threshold=0.5))
    own = {"probe": PROBE, "vector": {"vector": C},
           "sign_pattern": {"dims": torch.tensor([0, 2]), "polarity": torch.tensor([1, -1])},
           "subspace": {"basis": torch.eye(D)[:2]}}[kind]
    return Source(**{"ref": "harmful@1", "digest": "p", "payload": Payload.build(kind, numbers or {1: own}),  # type: ignore[arg-type]
                     "op": "add", "site": "resid_post", "model_id": "lab", "fingerprint": "print-1",
                     "reading": reading, **fields})


def gated(gate: Any, *probes: Source, **fields: Any) -> Program:
    intervention = Intervention.model_validate(add(gate=gate, **fields))
    return compile_program([Resolved(intervention, None, probes)], FACTS)


def decision(program: Program, h: torch.Tensor = H) -> Any:
    return program.gates[0].decide({"resid_post": {n: h for n in range(6)}})


def reader(form: str, numbers: dict[str, torch.Tensor]) -> Reader:
    return Reader("x@1", "resid_post", form, {1: numbers})  # type: ignore[arg-type]


def cast(h: np.ndarray, c: np.ndarray) -> float:
    """CAST's similarity, from the formula: cos(h, tanh(c c^T / (c . c) h))."""
    other = np.tanh(np.outer(c, c) / (c @ c) @ h)
    return float(h @ other / np.linalg.norm(h) / np.linalg.norm(other))


@pytest.mark.parametrize(("form", "numbers", "formula"), [
    ("linear", PROBE, lambda h, c: h @ c + 0.25),
    ("linear", {"vector": C}, lambda h, c: h @ c),
    ("cosine", {"vector": C}, lambda h, c: h @ c / np.linalg.norm(h) / np.linalg.norm(c)),
    ("cast", {"vector": C}, cast),
    ("agreement", {"dims": torch.tensor([0, 2]), "polarity": torch.tensor([1, -1])},
     lambda h, c: ((h[0] > 0) + (h[2] <= 0)) / 2),
])
def test_scores_and_pools(form: str, numbers: dict[str, torch.Tensor], formula: Any) -> None:
    h, c = H.double().numpy(), C.double().numpy()
    expected = [formula(row, c) for row in h]
    found = reader(form, numbers)
    assert found.scores(1, H).tolist() == pytest.approx(expected, abs=1e-5)
    assert found.pooled(1, H, "last") == pytest.approx(expected[-1], abs=1e-5)
    assert found.pooled(1, H, "max") == pytest.approx(max(expected[1:]), abs=1e-5)
    mean = np.mean(expected[1:]) if form == "agreement" else formula(h[1:].mean(axis=0), c)
    assert found.pooled(1, H, "mean") == pytest.approx(mean, abs=1e-5)
    assert found.pooled(1, H[:1], "mean") == pytest.approx(expected[0], abs=1e-5)


def test_cast_is_blind_to_the_side_and_linear_is_not() -> None:
    one, other = reader("cast", {"vector": C}), reader("cast", {"vector": -C})
    assert one.scores(1, H).tolist() == pytest.approx(one.scores(1, -H).tolist(), abs=1e-6)
    assert one.scores(1, H).tolist() == pytest.approx(other.scores(1, H).tolist(), abs=1e-6)
    assert float(one.scores(1, H).min()) >= 0
    linear = reader("linear", {"vector": C})
    assert linear.scores(1, H).tolist() == pytest.approx((-linear.scores(1, -H)).tolist(), abs=1e-6)


@pytest.mark.parametrize(("direction", "shift", "opens"), [
    ("above", -0.1, True), ("above", 0.1, False), ("below", -0.1, False), ("below", 0.1, True)])
def test_which_side_opens(direction: str, shift: float, opens: bool) -> None:
    score = float(reader("linear", PROBE).pooled(1, H, "last"))
    found = decision(gated({"probe": "harmful", "pool": "last", "threshold": score + shift, "direction": direction},
                           probe()))
    assert found.open is opens
    assert found.scores == ({1: pytest.approx(score)},)


def test_of_several_layers_one_is_enough() -> None:
    numbers = {n: {"weight": C * n, "bias": torch.tensor(0.0)} for n in (1, 3)}
    scores = {n: float(H[-1] @ C) * n for n in (1, 3)}
    threshold = sum(scores.values()) / 2
    gate = {"probe": "harmful", "pool": "last", "threshold": threshold, "layers": "all"}
    for direction in ("above", "below"):
        found = decision(gated({**gate, "direction": direction}, probe(numbers=numbers)))
        assert found.open and found.scores == ({n: pytest.approx(s) for n, s in scores.items()},)
    higher = max(scores, key=lambda n: scores[n])
    alone = decision(gated({**gate, "layers": [4 - higher]}, probe(numbers=numbers)))
    assert not alone.open


@pytest.mark.parametrize("rule", ["all", "any"])
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True), (False, False)])
def test_several_gates(rule: str, sides: tuple[bool, bool]) -> None:
    score = float(reader("linear", PROBE).pooled(1, H, "mean"))
    gates = [{"probe": "harmful", "threshold": score + (-1 if opens else 1)} for opens in sides]
    found = decision(gated({rule: gates}, probe(), probe()))
    assert found.open is (all(sides) if rule == "all" else any(sides))
    assert len(found.scores) == 2


def test_what_the_gate_leaves_open_comes_from_the_probe() -> None:
    own = Reading(form="cosine", pool="max", threshold=-0.75, direction="below")
    condition = gated({"probe": "harmful"}, probe(kind="vector", reading=own)).gates[0].conditions[0]
    assert condition.facts() == {"probe": "harmful@1", "site": "resid_post", "layers": [1], "form": "cosine",
                                 "pool": "max", "threshold": -0.75, "direction": "below"}


MISMATCH = {"payload": Payload.build("probe", {1: {"weight": torch.ones(3), "bias": torch.tensor(0.0)}})}


@pytest.mark.parametrize(("gate", "source", "error", "param"), [
    ({}, probe(fingerprint="other"), ArtifactMismatch, "gate.probe"),
    ({}, replace(probe(), **MISMATCH), ArtifactMismatch, "gate.probe"),
    ({}, probe(kind="subspace", reading=None), ArtifactMismatch, "gate.probe"),
    ({}, probe(reading=None), InvalidSpec, "gate.threshold"),
    ({"pool": "last"}, probe(), InvalidSpec, "gate.threshold"),
    ({"form": "cast"}, probe(kind="vector"), InvalidSpec, "gate.threshold"),
    ({"form": "cast"}, probe(), InvalidSpec, "gate.form"),
    ({"layers": [2]}, probe(), InvalidSpec, "gate.layers"),
    ({"layers": [9]}, probe(), LayerOutOfRange, "gate.layers[0]"),
    ({}, probe(site="mlp_act", numbers={3: {"weight": torch.ones(5), "bias": torch.tensor(0.0)}}), UnsupportedSite,
     "gate.layers"),
    ({"when": "token", "form": "cosine", "threshold": 0.1}, probe(kind="vector"), InvalidSpec, "gate.form"),
    ({"when": "token"}, probe(numbers={2: PROBE}), InvalidSpec, "gate.layers"),
    ({"when": "token"}, probe(site="resid_pre"), InvalidSpec, "gate.when"),
])
def test_a_gate_that_does_not_fit_is_refused(gate: dict[str, Any], source: Source, error: type[TrimtabError], param: str
                                             ) -> None:
    with pytest.raises(error) as caught:
        gated({"probe": "harmful", **gate}, source)
    assert caught.value.param == f"interventions[0].{param}"


def test_errors_of_several_gates_name_the_one() -> None:
    with pytest.raises(InvalidSpec) as caught:
        gated({"any": [{"probe": "a"}, {"probe": "b", "form": "cast"}]}, probe(), probe())
    assert caught.value.param == "interventions[0].gate.any[1].form"
    with pytest.raises(InvalidSpec, match="stands alone"):
        gated({"all": [{"probe": "a", "when": "token"}]}, probe())


@pytest.mark.parametrize("gate", [{}, {"all": []}, {"all": [{"probe": "a"}], "any": [{"probe": "a"}]},
                                  {"probe": "a", "threshold": "0"}, {"probe": "a", "when": "later"}, {"probe": "../a"},
                                  {"all": [{"probe": "a"}] * 9}])
def test_malformed_gates(gate: Any) -> None:
    with pytest.raises(ValueError):
        Intervention.model_validate(add(gate=gate))


def test_gates_of() -> None:
    one = Intervention.model_validate(add(gate={"probe": "a"})).gate
    two = Intervention.model_validate(add(gate={"any": [{"probe": "a"}, {"probe": "b"}]})).gate
    assert [g.probe for g in gates_of(one)] == ["a"] and [g.probe for g in gates_of(two)] == ["a", "b"]
    assert gates_of(None) == []


def test_an_undecided_program_cannot_run_and_a_decided_one_is_the_ungated_one() -> None:
    program = gated({"probe": "harmful"}, probe())
    plain = compile_program([Resolved(Intervention.model_validate(add()))], FACTS)
    for ask in (lambda: program.digest, lambda: program.acting):
        with pytest.raises(ValueError, match="undecided"):
            ask()
    opened, closed = program.decided(()), program.decided({0})
    assert opened.digest == plain.digest and opened.acting == 1
    assert closed.acting == 0 and closed.digest != plain.digest and not closed.compiled[0].rows
    assert opened.without(0).digest == plain.without(0).digest


# Decided per token

@pytest.mark.parametrize("direction", ["above", "below"])
def test_a_gate_per_token_is_part_of_the_row(direction: str) -> None:
    program = gated({"probe": "harmful", "when": "token", "threshold": 0.1, "direction": direction}, probe())
    assert not program.gates and program.acting == 1
    row = program.compiled[0].rows["resid_post", 1]
    rows = {name: tensor.expand(len(H), *tensor.shape) for name, tensor in row.tensors.items()}
    found = get_kernel(row.kernel)(H, rows)
    holds = [(float(h @ C) + 0.25 > 0.1) == (direction == "above") for h in H]
    assert 0 < sum(holds) < len(H)
    vector = torch.tensor(add()["inline"]["vector"])
    for before, after, held in zip(H, found, holds, strict=True):
        assert torch.equal(after, before + vector if held else before)


def test_every_kernel_can_be_gated() -> None:
    assert all(callable(get_kernel(f"gated:{name}")) for name in kernel_names())
