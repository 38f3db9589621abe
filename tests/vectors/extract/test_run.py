"""From request to artifact: what is reported, refused, cancelled, and that the artifact compiles."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from steering.artifacts.source import Resolved, Source
from steering.language.errors import InvalidRequest, InvalidSpec, LayerOutOfRange, TrimtabError, UnsupportedSite
from steering.language.intervention import Intervention
from steering.programs.compiler import compile_program
from tests.vectors.extract.planted import (
    DIRECTIONS,
    FACTS,
    NUM_LAYERS,
    Planted,
    cosine,
    never,
    pairs,
    request,
    run,
    silent,
)
from vectors.artifact import Limits, Metadata
from vectors.checks import check
from vectors.extract import Extraction
from vectors.extract.refusals import ConstantActivations, ExtractionCancelled, FitFailed
from vectors.extract.scratch import Scratch
from vectors.extract.subject import BATCH_TEXTS, BATCH_TOKENS, batches


def source_of(extraction: Extraction) -> Source:
    m = extraction.metadata
    return Source(ref=f"{m.name}@1", digest="d", payload=extraction.payload, op=m.op, site=m.site,
                  model_id=m.model_id, fingerprint=m.fingerprint, layers=m.layers, strength=m.strength,
                  options=m.options, residual_norm=m.residual_norm, sigma=m.sigma)


def test_the_artifact_is_complete_and_compiles_by_name_alone() -> None:
    extraction = run(request(pairs(60), tags=["demo"], description="Planted."), Planted(), silent, never)
    metadata = extraction.metadata
    assert (metadata.kind, metadata.op, metadata.site, metadata.layers) == ("vector", "add", "resid_post", [2])
    assert (metadata.model_id, metadata.fingerprint, metadata.d_model) == ("planted", "f" * 16, 48)
    assert metadata.tags == ("demo",)
    assert metadata.provenance["method"] == "mean_difference"
    assert metadata.provenance["report"] == extraction.report
    assert Metadata.parse(json.loads(metadata.document())) == metadata
    assert check(metadata, extraction.payload, Limits()) == metadata
    program = compile_program([Resolved(Intervention(artifact="planted"), source_of(extraction))], FACTS)
    assert list(program.compiled[0].rows) == [("resid_post", 2)]


@pytest.mark.parametrize("unit", ["rel", "sigma"])
def test_recorded_norms_make_units_usable(unit: str) -> None:
    extraction = run(request(pairs(60)), Planted(), silent, never)
    texts = [Planted().token(ids, 2, 2) for pair in pairs(60) for ids in (pair.positive, pair.negative)]
    norm = float(torch.stack(texts).norm(dim=1).mean())
    assert extraction.metadata.residual_norm[2] == pytest.approx(norm, rel=1e-5)
    spread = float((torch.stack(texts) @ DIRECTIONS[2]).std())
    assert extraction.metadata.sigma[2] == pytest.approx(spread, rel=0.1)
    intervention = Intervention.model_validate({"artifact": "planted", "strength": {"value": 0.5, "unit": unit}})
    assert compile_program([Resolved(intervention, source_of(extraction))], FACTS).compiled[0].rows


def test_ablation_is_meant_for_all_sites_with_the_best_layers_direction() -> None:
    extraction = run(request(pairs(60), op="ablate", site="resid_pre"), Planted(), silent, never)
    assert extraction.metadata.options == {"multi_site": True, "source_layer": 2}
    program = compile_program([Resolved(Intervention(artifact="planted"), source_of(extraction))], FACTS)
    assert {layer for _, layer in program.compiled[0].rows} == set(range(NUM_LAYERS))
    assert {site for site, _ in program.compiled[0].rows} == {"resid_pre", "attn_out", "mlp_out"}


def test_the_report_sets_scores_beside_controls() -> None:
    report = run(request(pairs(100)), Planted(), silent, never).report
    assert report["pairs"] == {"train": 60, "dev": 20, "test": 20}
    best = report["layers"]["2"]
    assert best["control"]["isotropic"]["draws"] == best["control"]["covariance"]["draws"] == 20
    assert best["control"]["isotropic"]["percentile"] >= 95
    assert report["shuffled_labels"]["draws"] == 20
    assert report["shuffled_labels"]["percentile"] >= 90
    assert 0.3 < report["shuffled_labels"]["mean_auc"] < 0.7
    # Directions of different layers were planted apart; each agrees with itself.
    cosines = torch.tensor(report["cosine"])
    assert torch.equal(cosines.diagonal(), torch.ones(NUM_LAYERS))
    assert float(cosines[2, 3]) == pytest.approx(float(DIRECTIONS[2] @ DIRECTIONS[3]), abs=0.1)
    json.dumps(report, allow_nan=False)


def test_equal_requests_give_equal_artifacts() -> None:
    one, two = (run(request(pairs(40), method="pca_repe", seed=9), Planted(), silent, never) for _ in range(2))
    assert one.metadata == two.metadata
    assert all(torch.equal(one.payload.layers[n]["vector"], two.payload.layers[n]["vector"]) for n in range(NUM_LAYERS))


def test_the_mean_leaves_the_sink_out() -> None:
    extraction = run(request(pairs(60), token="mean"), Planted(), silent, never)
    assert cosine(extraction.payload.layers[2]["vector"], DIRECTIONS[2]) > 0.95
    assert extraction.metadata.residual_norm[2] < 20
    # The control: the sink is there, and a thousand long.
    assert float(Planted().text(pairs(1)[0].positive, 2, [0]).norm()) == pytest.approx(1000, rel=1e-4)


def test_constant_layers_are_named_or_refused() -> None:
    report = run(request(pairs(40)), Planted(constant_layers=[0]), silent, never).report
    assert report["constant_layers"] == [0]
    assert sorted(report["layers"]) == ["1", "2", "3"]
    with pytest.raises(ConstantActivations) as caught:
        run(request(pairs(40), layers=[0, 1]), Planted(constant_layers=[0]), silent, never)
    assert caught.value.param == "layers"
    with pytest.raises(ConstantActivations) as caught:
        run(request(pairs(40), token=0), Planted(), silent, never)
    assert caught.value.param == "token"


@pytest.mark.parametrize(("options", "error", "param"), [
    ({"site": "router"}, InvalidRequest, "site"),
    ({"op": "rotate"}, InvalidRequest, "op"),
    ({"layers": [4]}, LayerOutOfRange, "layers[0]"),
    ({"site": "mlp_act"}, UnsupportedSite, "layers"),
    ({"op": "ablate", "options": {"typo": 1}}, InvalidSpec, "options.typo"),
])
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], error: type[TrimtabError], param: str) -> None:
    with pytest.raises(error) as caught:
        run(request(pairs(40), **options), Planted(), silent, never)
    assert caught.value.param == param


def test_a_clamp_is_set_to_what_the_positive_texts_have_and_bounds_are_in_the_card() -> None:
    planted = Planted()
    found = run(request(pairs(60), op="clamp"), planted, silent, never).metadata
    assert found.card is not None
    sides, best = found.card["coordinates"], found.card["layers"][0]
    assert found.options == {"value": sides["positive"]["mean"]}
    # The label's shift of 8 along the direction, half of it to either side of where the items are.
    assert sides["positive"]["mean"] - sides["negative"]["mean"] == pytest.approx(8.0, rel=0.05)
    assert sides["negative"]["p5"] < sides["negative"]["mean"] < sides["positive"]["mean"] < sides["positive"]["p95"]
    assert best == 2
    bounded = run(request(pairs(60), op="clamp", options={"max": 0.5}), planted, silent, never).metadata
    assert bounded.options == {"max": 0.5}


def test_options_are_checked_before_anything_is_read() -> None:
    planted = Planted()
    with pytest.raises(TrimtabError):
        run(request(pairs(40), op="ablate", options={"typo": 1}), planted, silent, never)
    assert planted.calls == []


def test_activations_that_are_not_finite_are_refused() -> None:
    class Broken(Planted):
        def token(self, ids: Any, position: int, layer: int) -> torch.Tensor:
            return super().token(ids, position, layer) * (float("inf") if ids[1] == 13 else 1.0)

    with pytest.raises(FitFailed) as caught:
        run(request(pairs(40)), Broken(), silent, never)
    assert caught.value.param == "pairs[3]"


@pytest.mark.parametrize("asked", [1, 2, 5, 9])
def test_cancelling_ends_the_run_and_leaves_no_file(asked: int, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    answers = iter([False] * asked + [True])
    with pytest.raises(ExtractionCancelled):
        run(request(pairs(40)), Planted(), silent, lambda: next(answers))
    assert list(tmp_path.iterdir()) == []


def test_progress_runs_from_zero_to_one() -> None:
    seen: list[tuple[float, str]] = []
    run(request(pairs(100)), Planted(), lambda share, stage: seen.append((share, stage)), never)
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert [stage for n, (_, stage) in enumerate(seen) if n == 0 or seen[n - 1][1] != stage] == [
        "capture", "fit", "control"]


def test_batches_are_bounded_and_hold_every_text_once() -> None:
    many = [pair.positive * (n % 5 + 1) * 60 for n, pair in enumerate(pairs(160))]
    found = list(batches(many))
    assert [n for batch in found for n in batch] == list(range(160))
    assert max(sum(len(many[n]) for n in batch) for batch in found) <= BATCH_TOKENS
    assert max(map(len, found)) <= BATCH_TEXTS
    assert len(found) < 40


def test_what_is_stored_is_what_was_read() -> None:
    planted = Planted()
    with Scratch([1, 3], 20, 48) as store:
        for n, ids in enumerate(ids for pair in pairs(10) for ids in (pair.positive, pair.negative)):
            for layer in (1, 3):
                store.put(layer, n, planted.token(ids, 2, layer))
        rows = store.rows(3, [14, 5])
    assert torch.equal(rows[0].float(), planted.token(pairs(10)[7].positive, 2, 3).float())
    assert torch.equal(rows[1].float(), planted.token(pairs(10)[2].negative, 2, 3).float())
