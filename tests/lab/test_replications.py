"""The replications' requests are what the recipes take, their data keeps items in one split, and what is stored is what
the code would show."""

import json

import pytest
from matplotlib.figure import Figure

from lab.replications import page
from lab.replications.common import subject
from lab.replications.rows import ROWS
from vectors.extract import RECIPES, parse_request
from vectors.extract.contrastive import Contrastive

STORED = [row for row in ROWS if (page.RESULTS / f"{row.name}.json").exists()]


def test_every_recipe_is_replicated() -> None:
    used = {case.recipe for row in ROWS for case in row.cases(subject("lab-dense"))}
    assert used >= {name for name, recipe in RECIPES.items() if not isinstance(recipe, Contrastive)}
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_requests_parse_and_every_case_has_a_name_of_its_own(row) -> None:
    cases = list(row.cases(subject("lab-dense")))
    for case in cases:
        assert parse_request(case.recipe, {"name": case.name, **case.fields}).draws == 20
    assert len({case.name for case in cases}) == len(cases) > 0


def test_every_row_has_results_and_a_picture() -> None:
    assert list(ROWS) == STORED, "run make replications"
    for row in ROWS:
        assert (page.RESULTS / f"{row.name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("row", STORED, ids=lambda row: row.name)
def test_results_are_of_the_committed_model_and_can_be_shown(row) -> None:
    document = json.loads((page.RESULTS / f"{row.name}.json").read_text(encoding="utf-8"))
    assert document["fingerprint"] == subject(row.model).facts.fingerprint, "run make replications"
    assert all(finding.ours and finding.verdict for finding in row.findings(document))
    figure = Figure()
    row.draw(document, figure)
    assert figure.axes


@pytest.mark.parametrize("model", ["lab-dense", "lab-moe"])
def test_whole_answers_of_bundled_artifacts_stand_in_the_row_of_their_method(model: str) -> None:
    named = [name for row in ROWS if row.model == model for name in row.bundled]
    assert len(set(named)) == len(named) and set(named) <= set(page.whole_answers(model))
    shown = page.document()
    for row in ROWS:
        assert f"**What was judged.** {row.judged}" in shown
        for name in row.bundled:
            assert f"whole answers with the bundled `{name}`" in shown
    if model == "lab-dense":
        assert set(named) == set(page.whole_answers(model))
