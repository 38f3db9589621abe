"""The bundled models as subjects, and running one recipe on one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab.paths import model_path
from steering.sites import fingerprint, model_facts
from vectors.extract import Extraction, parse_request, run_recipe
from vectors.extract.local import LocalSubject

Fields = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One replication. cases: (name, fields of the recipe's request); the artifact is named after the case.

    headline: of a report, (what was measured, our figure, the control's figures).
    """

    name: str
    recipe: str
    model: str
    claim: str
    cases: Callable[[LocalSubject], Iterator[tuple[str, Fields]]]
    headline: Callable[[dict[str, Any]], list[tuple[str, dict[str, Any]]]]


@lru_cache(maxsize=1)
def subject(name: str) -> LocalSubject:
    """A bundled model in float32 on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(model_path(name), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path(name))
    return LocalSubject(model, tokenizer, model_facts(model, model_id=name, fingerprint=fingerprint(model)))


def extract(row: Row, case: str, fields: Fields) -> Extraction:
    request = parse_request(row.recipe, {"name": case, **fields})
    return run_recipe(row.recipe, request, subject(row.model), lambda share, stage: None, lambda: False,
                      f"python -m lab.replications {row.name}")
