"""The replications' requests are what the recipes take, and their data keeps items in one split."""

import pytest

from lab.replications.common import subject
from lab.replications.rows import ROWS
from vectors.extract import parse_request, recipes


def test_every_recipe_is_replicated() -> None:
    assert {row.recipe for row in ROWS} == {recipe.name for recipe in recipes()}
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_requests_parse_and_every_case_has_a_name_of_its_own(row) -> None:
    cases = list(row.cases(subject("lab-dense")))
    for case, fields in cases:
        assert parse_request(row.recipe, {"name": case, **fields}).draws == 20
    assert len({case for case, _ in cases}) == len(cases) > 0
