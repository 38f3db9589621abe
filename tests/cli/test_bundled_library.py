"""The example artifacts that come with the lab models fit their committed weights and do what their cards say."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from trimtab_client import Client

from lab import model_path
from lab.models import load_model
from lab.paths import LAB_DIR
from lab.replications.answers import measured, verdict
from lab.replications.common import subject
from scripts.bundled_answers import ASKED, cards
from scripts.bundled_recipes import FROM_RECIPES
from scripts.examples import EXAMPLES, PRESETS
from scripts.readme import outcomes
from steering.artifacts.source import Resolved, Source
from steering.language.intervention import Intervention
from steering.models.describe import model_facts
from steering.models.facts import ModelFacts
from steering.models.fingerprints import fingerprint
from steering.programs.compiler import compile_program
from vectors.artifact import Limits, Metadata
from vectors.calibration import calibration_of
from vectors.evaluate.graders import Answer, SentimentGrader, grade
from vectors.extract.registry import get_recipe
from vectors.formats import get_format

FOLDER = LAB_DIR / "artifacts" / "lab-dense"
# Those of SmolLM2, whose weights are not committed, have a test of their own.
FILES = sorted((LAB_DIR / "artifacts").glob("lab-*/*.safetensors"))
DOSES = LAB_DIR.parent / "docs" / "calibration"
CALIBRATED = json.loads((DOSES / "doses.json").read_text())
BY_EFFECT = [FOLDER / f"{example.name}.safetensors" for example in EXAMPLES]
BY_RECIPE = {LAB_DIR / "artifacts" / one.model / f"{one.name}.safetensors": one for one in FROM_RECIPES}


@cache
def facts_of(name: str) -> ModelFacts:
    model = load_model(model_path(name))
    return model_facts(model, model_id=name, fingerprint=fingerprint(model))


def source_of(path: Path) -> tuple[Metadata, Source]:
    m, payload = get_format("safetensors").read(path.read_bytes(), {}, Limits())
    return m, Source(ref=f"{m.name}@1", digest="d", payload=payload, op=m.op, site=m.site, model_id=m.model_id,
                     fingerprint=m.fingerprint, layers=m.layers, strength=m.strength, options=m.options,
                     residual_norm=m.residual_norm, sigma=m.sigma)


def label(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


def test_every_artifact_has_a_file_and_every_file_a_maker() -> None:
    made = {path for path in FILES if path in BY_EFFECT or path in BY_RECIPE}
    assert {*BY_EFFECT, *BY_RECIPE} <= made, "run make library"


def test_there_is_one_of_every_kind_that_a_recipe_makes() -> None:
    kinds = {(path.parent.name, source_of(path)[0].kind) for path in FILES}
    assert {("lab-dense", kind) for kind in ("vector", "subspace", "sign_pattern", "neuron_set", "head_set",
                                                "manifold", "probe", "diagonal")} <= kinds
    assert ("lab-moe", "expert_set") in kinds


@pytest.mark.parametrize("path", FILES, ids=label)
def test_an_artifact_fits_the_committed_model_and_compiles_by_name(path: Path) -> None:
    metadata, source = source_of(path)
    facts = facts_of(path.parent.name)
    assert "bundled" in metadata.tags
    assert metadata.name == path.stem
    assert (metadata.model_id, metadata.fingerprint) == (path.parent.name, facts.fingerprint), "run make library"
    program = compile_program([Resolved(Intervention(artifact=metadata.name), source)], facts)
    assert program.compiled[0].rows


@pytest.mark.parametrize("path", BY_EFFECT, ids=label)
def test_a_card_stands_beside_its_controls(path: Path) -> None:
    card: dict[str, Any] = source_of(path)[0].card or {}
    test, random = card["test"], card["controls"]["random_vectors"]
    assert random["draws"] == 20
    assert test["steered"] > test["unsteered"]
    assert test["steered"] > random["max"]
    if "spared" in test:
        assert test["spared"]["steered"] >= test["spared"]["unsteered"] - 0.1


@pytest.mark.parametrize("path", FILES, ids=label)
def test_every_card_has_purpose_place_strength_and_scores_of_both_splits(path: Path) -> None:
    metadata = source_of(path)[0]
    card: dict[str, Any] = metadata.card or {}
    assert card["for"] == metadata.description
    assert card["layers"] and card["strength"] == metadata.strength.model_dump(mode="json")
    assert any(isinstance(value, float) for value in card["dev"].values())
    assert card["dev"].keys() <= card["test"].keys(), "what was measured on dev was measured on test, too"
    assert card["controls"]


@pytest.mark.parametrize("path", BY_RECIPE, ids=label)
def test_the_card_of_a_recipe_says_what_the_controls_reach_and_what_the_replication_showed(path: Path) -> None:
    metadata, one = source_of(path)[0], BY_RECIPE[path]
    card: dict[str, Any] = metadata.card or {}
    assert metadata.description == one.description
    assert card.get("replication", []) == one.shown(), "run make library"
    assert all(finding["control"] and finding["verdict"] for finding in card.get("replication", []))
    for standing in card["controls"].values():
        assert standing["draws"] >= 20
        assert {"found", "mean", "max", "percentile"} <= standing.keys()


@pytest.mark.parametrize("path", FILES, ids=label)
def test_an_artifact_acts_where_its_method_says(path: Path) -> None:
    metadata = source_of(path)[0]
    assert metadata.scope == get_recipe(metadata.provenance["method"]).scope
    assert "scope" not in (metadata.card or {})


@pytest.mark.parametrize(("model", "name"), ASKED)
def test_a_claim_about_answers_rests_on_whole_ones(model: str, name: str) -> None:
    """What is on the card is what the verdict says, and more than any of 20 random artifacts does."""
    found = cards()[model, name]
    assert found["verdict"] == verdict(found) and found["verdict"].endswith("%.") == ("others" in found)
    assert "beyond every random one" in found["verdict"]
    assert found["random"]["draws"] == 20 and found["prompts"] >= 12
    assert all(len(one["texts"]) == len(one["outcomes"]) == 3 for one in found["samples"])


def test_the_page_of_outcomes_shows_what_is_on_the_cards() -> None:
    assert (DOSES.parent / "outcomes.md").read_text(encoding="utf-8") == outcomes()


def test_whole_answers_are_measured_anew_as_they_stand() -> None:
    """One of them, with all its random draws."""
    path = FOLDER / "to-french.safetensors"
    metadata, source = source_of(path)
    found = measured(subject("lab-dense"), metadata, source.payload, ASKED["lab-dense", "to-french"])
    known = cards()["lab-dense", "to-french"]
    assert (found["untouched"], found["steered"]) == (known["untouched"], known["steered"])
    assert found["random"] == known["random"]


def test_sentiment_refusal_and_language_are_calibrated() -> None:
    assert {"cheerful", "refusal", "french"} <= set(CALIBRATED)


@pytest.mark.parametrize("path", [FOLDER / f"{name}.safetensors" for name in CALIBRATED], ids=label)
def test_a_card_is_calibrated_on_the_committed_model(path: Path) -> None:
    """Doses compile, the placebo floor stands beside the curve, and held-out completions had the dose asked for."""
    metadata, source = source_of(path)
    facts = facts_of(path.parent.name)
    calibration = calibration_of(metadata.card)
    assert calibration is not None, "run make library"
    setting = calibration.settings[0]
    assert setting.fingerprint == facts.fingerprint and setting.draws == 20 and len(setting.floor) >= 2
    assert setting.target_prompts >= 8 and all(row.target is not None for row in setting.floor)
    results = CALIBRATED[metadata.name]
    assert results["fingerprint"] == facts.fingerprint and results["doses"]
    known = replace(source, calibrated=(setting.calibrated(),))
    for row in results["doses"]:
        assert abs(row["kl"] - abs(row["dose"])) <= 0.25 * abs(row["dose"])
        wanted = Intervention.model_validate({"artifact": metadata.name, "strength": {"kl": row["dose"]}})
        scale = compile_program([Resolved(wanted, known)], facts).compiled[0].applied.strength["scale"]
        assert next(iter(scale.values())) == pytest.approx(row["strength"], rel=1e-6)
    assert {file.suffix for file in DOSES.glob(f"{metadata.name}.*")} == {".json", ".png", ".svg"}


def test_the_presets_are_those_of_the_script() -> None:
    entries = json.loads((FOLDER / "presets.json").read_text())
    assert [entry["name"] for entry in entries] == [preset.name for preset in PRESETS]


def test_a_fresh_server_offers_them_as_models(lab_url: str) -> None:
    with Client(lab_url) as client:
        names = client.models()
        assert {f"lab-dense:{preset.name}" for preset in PRESETS} <= set(names)
        opening = "Review of a hotel. I stayed at it with my team on Monday."
        texts = {name: client.complete(opening, model=f"lab-dense:{name}", max_tokens=64, temperature=0).text
                 for name in ("cheerful", "gloomy")}
    verdicts = grade(SentimentGrader(), [Answer(texts["cheerful"]), Answer(texts["gloomy"])])
    assert [verdict.outcome for verdict in verdicts] == ["positive", "negative"]
