"""Porting: maps are those of other packages, planted maps are found and shuffled tokens give none, numbers go through
them as differences, points and readers do, and what cannot be ported is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import Ridge

from steering.artifacts.payload import Payload
from steering.language.errors import ArtifactMismatch, InvalidRequest
from steering.models.facts import ModelFacts
from tests.vectors.extract.toy import Toy
from vectors.artifact import Metadata
from vectors.porting.aligned import METHODS, Method, align
from vectors.porting.read import read_rows
from vectors.porting.run import Rows, check_portable, near, port

SOURCE, TARGET, TEXTS, LENGTH = 12, 16, 60, 20


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(tokens: int = TEXTS * LENGTH) -> torch.Tensor:
    """Activations with directions of unequal variance and a mean that is not 0."""
    return seeded(tokens, SOURCE) * torch.linspace(0.3, 3.0, SOURCE, dtype=torch.float64) + 2.0


TURN = torch.linalg.qr(seeded(TARGET, TARGET, seed=1))[0][:SOURCE]
SKEWED = seeded(SOURCE, TARGET, seed=2)
NUMBER = torch.arange(TEXTS).repeat_interleave(LENGTH)


def facts(width: int = TARGET, layers: int = 3) -> ModelFacts:
    return replace(Toy().facts, d_model=width, num_layers=layers, fingerprint="t" * 16, model_id="target")


def rows(target: torch.Tensor, source: torch.Tensor | None = None) -> Rows:
    return Rows({1: spread() if source is None else source}, {1: target, 0: seeded(len(target), TARGET, seed=9)},
                NUMBER, torch.arange(LENGTH).repeat(TEXTS))


def metadata(kind: str = "vector", **fields: object) -> Metadata:
    return Metadata.parse({"name": "calm", "kind": kind, "op": "add" if kind != "subspace" else "ablate",
                           "site": "resid_post", "layers": [1], "model_id": "source", "fingerprint": "s" * 16,
                           **fields})


def made(payload: Payload, target: torch.Tensor, method: str = "auto", **fields: object):  # type: ignore[no-untyped-def]
    return port("calm@1", metadata(payload.kind, **fields), payload, "ported", rows(target), {1: [1, 0]},
                method, facts(), "a test")  # type: ignore[arg-type]


def vector(seed: int = 5) -> Payload:
    return Payload.build("vector", {1: {"vector": seeded(SOURCE, seed=seed).float()}})


def test_maps_are_those_of_other_packages() -> None:
    s, t = spread(), spread() @ SKEWED + 0.3 * seeded(TEXTS * LENGTH, TARGET, seed=3)
    away_s, away_t = (s - s.mean(0)).numpy(), (t - t.mean(0)).numpy()
    square = t[:, :SOURCE] - t[:, :SOURCE].mean(0)
    turn, scale = orthogonal_procrustes(away_s, square.numpy())
    found = align(s, t[:, :SOURCE], NUMBER, "orthogonal")
    np.testing.assert_allclose(found.there.numpy(), turn * scale / np.square(away_s).sum(), rtol=1e-8, atol=1e-10)

    ridge = align(s, t, NUMBER, "ridge")
    assert ridge.penalty is not None
    reference = Ridge(alpha=ridge.penalty * np.square(away_s).sum(0).mean()).fit(s.numpy(), t.numpy())
    np.testing.assert_allclose(ridge.there.numpy(), reference.coef_.T, rtol=1e-6, atol=1e-9)

    cca = align(s, t, NUMBER, "cca")
    # Björck and Golub 1973: by QR and SVD of the data, where ours goes by square roots of covariances.
    (q_s, r_s), (q_t, _) = np.linalg.qr(away_s), np.linalg.qr(away_t)
    u, best, _ = np.linalg.svd(q_s.T @ q_t)
    # Along the canonical directions of the source, mapped and own coordinates of the target correlate as those do.
    for n, wanted in enumerate(best):
        direction = torch.from_numpy(np.linalg.solve(r_s, u[:, n]))
        weight, _ = cca.reader(direction)
        found = np.corrcoef(away_s @ direction.numpy(), away_t @ weight.numpy())[0, 1]
        assert float(found) == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_turn_is_found_and_shuffled_tokens_give_none(method: Method) -> None:
    target = 3.0 * spread() @ TURN + 0.05 * seeded(TEXTS * LENGTH, TARGET, seed=4)
    payload = vector()
    found = made(payload, target, method)
    [layer] = found.report.layers
    wanted = payload.layers[1]["vector"].double() @ TURN
    got = found.payload.layers[1]["vector"].double()
    assert float(got @ wanted / got.norm() / wanted.norm()) > 0.99
    assert layer.explained > 0.98 and layer.coordinate > 0.98 and layer.shuffled < 0.05
    # As long, against the target's activations, as it was against the source's.
    assert float(got.norm() / wanted.norm()) == pytest.approx(layer.norm_ratio, rel=1e-5)
    ratio = float(target.norm(dim=1).mean() / spread().norm(dim=1).mean())
    assert layer.norm_ratio == pytest.approx(ratio, rel=0.05)


def test_what_is_no_turn_needs_a_map_that_is_none() -> None:
    target = spread() @ SKEWED + 0.05 * seeded(TEXTS * LENGTH, TARGET, seed=4)
    found = made(vector(), target)
    [layer] = found.report.layers
    assert layer.method in ("ridge", "cca") and layer.explained > 0.98
    tried = {(one.layer, one.method): one.explained for one in layer.tried}
    assert tried[1, "orthogonal"] < layer.explained - 0.05
    # The neighbour has nothing to do with it.
    assert max(tried[0, method] for method in METHODS) < 0.05
    wanted = vector().layers[1]["vector"].double() @ SKEWED
    got = found.payload.layers[1]["vector"].double()
    assert float(got @ wanted / got.norm() / wanted.norm()) > 0.99


def test_readers_and_subspaces_go_through_as_what_they_are() -> None:
    target = 3.0 * spread() @ TURN + 1.0
    weight, bias = seeded(SOURCE, seed=6).float(), torch.tensor(0.7)
    found = made(Payload.build("probe", {1: {"weight": weight, "bias": bias}}), target, "ridge")
    numbers = found.payload.layers[1]
    scores = target.float() @ numbers["weight"] + numbers["bias"]
    wanted = spread().float() @ weight + bias
    assert float((scores - wanted).std()) < 0.03 * float(wanted.std())
    assert float(scores.mean()) == pytest.approx(float(wanted.mean()), abs=0.01)

    basis = torch.linalg.qr(seeded(SOURCE, 3, seed=7))[0].T.float()
    found = made(Payload.build("subspace", {1: {"basis": basis}}), target, "orthogonal")
    got = found.payload.layers[1]["basis"].double()
    wanted = basis.double() @ TURN
    assert float(torch.linalg.svdvals(got @ wanted.T).min()) > 0.999


def test_what_is_stored_says_where_it_comes_from() -> None:
    target = 3.0 * spread() @ TURN
    found = made(vector(), target, strength={"value": 2.0, "unit": "unit"}, tags=["tone"])
    [layer] = found.report.layers
    m = found.metadata
    assert (m.name, m.model_id, m.fingerprint, m.d_model) == ("ported", "target", "t" * 16, TARGET)
    assert m.layers == [1] and m.tags == ("tone",)
    assert m.strength.unit == "unit" and m.strength.value == pytest.approx(2.0 * layer.norm_ratio)
    assert m.residual_norm[1] == pytest.approx(float(target.norm(dim=1).mean()), rel=0.05)
    assert m.provenance["source"] == "calm@1" and m.provenance["source_fingerprint"] == "s" * 16
    assert m.card is not None and m.card["ported"]["layers"][0]["explained"] == layer.explained  # type: ignore[index]
    assert "not tried here" in m.card["warnings"][0]  # type: ignore[index]
    assert found.report.held_out_texts == TEXTS // 5 and found.report.left_out == TEXTS


def test_massive_tokens_and_first_ones_do_not_rule_the_map() -> None:
    source, target = spread(), 3.0 * spread() @ TURN
    wild = torch.arange(TEXTS) * LENGTH
    source[wild], target[wild] = 500.0, -700.0
    source[7], target[9] = 900.0, 900.0
    given = rows(target, source)
    found = port("calm@1", metadata(), vector(), "ported", given, {1: [1]}, "orthogonal", facts(), "a test")
    assert found.report.layers[0].explained > 0.99 and found.report.left_out == TEXTS + 2


def test_layers_are_matched_by_relative_depth() -> None:
    assert near(11, 12, facts(layers=24)) == [23, 22]
    assert near(0, 12, facts(layers=24)) == [0, 1]
    assert near(5, 11, facts(layers=21)) == [10, 9, 11]
    assert near(5, 11, facts(layers=21), {9: None, 10: None}) == [10, 9]


def test_what_cannot_be_ported_is_refused() -> None:
    heads = Payload.build("head_set", {1: {"heads": torch.tensor([1])}})
    of_heads = Metadata.parse({"name": "h", "kind": "head_set", "op": "head_mask", "site": "head_out"})
    with pytest.raises(ArtifactMismatch, match="head_set is not ported"):
        check_portable(of_heads, heads, facts())
    with pytest.raises(ArtifactMismatch, match="made on this model"):
        check_portable(metadata(fingerprint="t" * 16), vector(), facts())
    assert check_portable(metadata(), vector(), facts()) == [1]
    with pytest.raises(InvalidRequest, match="do not correspond"):
        made(vector(), seeded(TEXTS * LENGTH, TARGET, seed=8))
    few = rows(3.0 * spread() @ TURN)
    few = Rows(few.source, few.target, NUMBER // 10, few.position)
    with pytest.raises(InvalidRequest, match="6 texts"):
        port("calm@1", metadata(), vector(), "ported", few, {1: [1]}, "auto", facts(), "a test")


def test_the_target_reads_the_same_tokens() -> None:
    toy = Toy()
    tokens = [(0, 3, 4), (0, 5)]
    source = {1: seeded(5, SOURCE)}
    found = read_rows(tokens, source, torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 0, 1]), "resid_post",
                      {1: [1, 2]}, toy, lambda share, stage: None)
    for layer in (1, 2):
        alone = torch.cat([one[layer] for one in toy.capture(tokens, "resid_post", [layer], None)])
        assert torch.equal(found.target[layer], alone)
