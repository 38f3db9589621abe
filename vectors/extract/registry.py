"""The table of extraction methods, and requests to them from plain data."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from pydantic import ValidationError

from steering.language.errors import InvalidRequest
from vectors.extract.recipe import Recipe, RecipeOptions

# Each line is a module of `vectors.extract.methods`, which holds the method of that name as METHOD.
METHODS: tuple[str, ...] = (
    "aligned_concept",
    "angular_steering",
    "condition",
    "entropic_steering",
    "function_vector",
    "head_ablation",
    "head_shift",
    "logistic_probe",
    "manifold",
    "mean_difference",
    "native_skills",
    "normality",
    "pca_pairwise",
    "pca_repe",
    "refusal_direction",
    "relation_neurons",
    "sae",
    "sign_pattern",
    "snmf",
    "sparsity",
    "tunable_experts",
    "tuned_lens",
)


def _load(name: str) -> Recipe:
    method = import_module(f"vectors.extract.methods.{name}").METHOD
    if not isinstance(method, Recipe) or method.name != name:
        raise ValueError(f"vectors.extract.methods.{name}.METHOD is no method of that name")
    return method


RECIPES: Mapping[str, Recipe] = {name: _load(name) for name in METHODS}


def get_recipe(name: str) -> Recipe:
    """Raises InvalidRequest: no method has this name."""
    if name not in RECIPES:
        raise InvalidRequest(f"there is no extraction method {name[:64]!r}", param="method",
                             fix=f"Use one of {', '.join(METHODS)}.")
    return RECIPES[name]


def parse_request(name: str, fields: Mapping[str, Any]) -> RecipeOptions:
    """The method's request from plain data.

    Raises:
        InvalidRequest: naming the field.
    """
    try:
        return get_recipe(name).request.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(first["msg"].removeprefix("Value error, "), param=first["loc"]) from None
