"""Parity with the package sae-lens on files that it wrote or read itself; see `scripts/saelens_fixtures.py`.

sparsify's layout is not among them: the package reads its decoder transposed, against sparsify's own code, which
`test_dictionaries.py` follows.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from server.cli.sae_files import with_beside
from steering.artifacts.dictionary import Dictionary
from vectors import Limits
from vectors.formats import detect
from vectors.formats.dictionaries.reading import read_dictionary
from vectors.formats.torch_pt import load_pt

FOLDER = Path(__file__).parents[1] / "data" / "saelens"
CASES = sorted(path.name for path in FOLDER.iterdir())
# What the fixture's own folder does not say, and those of a release do.
SAID: dict[str, dict[str, Any]] = {name: {"site": "resid_post", "layers": [3]} for name in ("gemma-scope", "goodfire")}


def read(name: str) -> Any:
    folder = FOLDER / name
    given = folder / "Llama-3.1-8B-Instruct-SAE-l19.pth" if name == "goodfire" else folder
    path, fields = with_beside(given, {"name": "x", **SAID.get(name, {})})
    if path.suffix in (".pt", ".pth"):
        return read_dictionary(load_pt(path, Limits()), fields, Limits())
    return detect(path.read_bytes()).read(path.read_bytes(), fields, Limits())


@pytest.mark.parametrize("name", CASES)
def test_features_and_reconstructions_are_those_of_the_package(name: str) -> None:
    metadata, payload = read(name)
    assert (metadata.site, list(payload.layers)) == ("resid_post", [3])
    expected, found = load_file(FOLDER / name / "expected.safetensors"), Dictionary(payload.layers[3])
    assert 1 < float((expected["features"] > 0).sum(1).float().mean()) < 25
    torch.testing.assert_close(found.features(expected["x"]), expected["features"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.reconstruction(expected["x"]), expected["decoded"], atol=1e-5, rtol=1e-5)


def test_the_cases_are_told_apart() -> None:
    """The control: no case is right by the conventions of another."""
    expected = {name: load_file(FOLDER / name / "expected.safetensors") for name in CASES}
    same = [(a, b) for a in CASES for b in CASES if a < b and torch.allclose(
        expected[a]["decoded"], expected[b]["decoded"], atol=1e-3)]
    # Equal by what they are: two releases of one layout, and one function under two names.
    assert set(same) == {("gemma-scope", "gemma-scope-2"), ("dictionary-learning-autoencoder", "standard"),
                         ("dictionary-learning-autoencodertopk", "topk"), ("goodfire", "standard-no-subtraction")}
    assert json.loads((FOLDER / "standard" / "cfg.json").read_text())["metadata"]["sae_lens_version"].startswith("6.")
