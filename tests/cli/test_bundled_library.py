"""The example artifacts that come with lab-dense fit its committed weights and do what their cards say."""

import json
from pathlib import Path
from typing import Any

import pytest
from trimtab_client import Client

from lab import model_path
from lab.models import load_model
from lab.paths import LAB_DIR
from scripts.examples import EXAMPLES, PRESETS
from steering.compiler import compile_program
from steering.facts import ModelFacts
from steering.sites import fingerprint, model_facts
from steering.source import Resolved, Source
from steering.spec import Intervention
from vectors.artifact import Limits, Metadata
from vectors.formats import get_format

FOLDER = LAB_DIR / "artifacts" / "lab-dense"
FILES = sorted(FOLDER.glob("*.safetensors"))


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    model = load_model(model_path("lab-dense"))
    return model_facts(model, model_id="lab-dense", fingerprint=fingerprint(model))


def source_of(path: Path) -> tuple[Metadata, Source]:
    m, payload = get_format("safetensors").read(path.read_bytes(), {}, Limits())
    return m, Source(ref=f"{m.name}@1", digest="d", payload=payload, op=m.op, site=m.site, model_id=m.model_id,
                     fingerprint=m.fingerprint, layers=m.layers, strength=m.strength, options=m.options,
                     residual_norm=m.residual_norm, sigma=m.sigma)


def test_every_example_has_a_file() -> None:
    assert {path.stem for path in FILES} == {example.name for example in EXAMPLES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_fits_the_committed_model_and_compiles_by_name(path: Path, facts: ModelFacts) -> None:
    metadata, source = source_of(path)
    assert "bundled" in metadata.tags
    assert (metadata.model_id, metadata.fingerprint) == ("lab-dense", facts.fingerprint), "run make library"
    program = compile_program([Resolved(Intervention(artifact=metadata.name), source)], facts)
    assert program.compiled[0].rows


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_card_stands_beside_its_controls(path: Path) -> None:
    card: dict[str, Any] = source_of(path)[0].card or {}
    assert card["random"]["draws"] == 20
    assert card["steered"] > card["unsteered"]
    assert card["steered"] > card["random"]["max"]
    if "spared" in card:
        assert card["spared"]["steered"] >= card["spared"]["unsteered"] - 0.1


def test_the_presets_are_those_of_the_script() -> None:
    entries = json.loads((FOLDER / "presets.json").read_text())
    assert [entry["name"] for entry in entries] == [name for name, *_ in PRESETS]


def test_a_fresh_server_offers_them_as_models(lab_url: str) -> None:
    with Client(lab_url) as client:
        names = client.models()
        assert {f"lab-dense:{name}" for name, *_ in PRESETS} <= set(names)
        opening = "Review of a hotel. I stayed at it with my team on Monday."
        texts = {name: client.complete(opening, model=f"lab-dense:{name}", max_tokens=28, temperature=0).text
                 for name in ("cheerful", "gloomy")}
    judge = next(example.judge for example in EXAMPLES if example.name == "cheerful")
    assert {name: judge(text) for name, text in texts.items()} == {"cheerful": "positive", "gloomy": "negative"}
