"""Extraction: directions from contrastive pairs, and recipes with data of their own.

One method or recipe per file, registered by importing it here.
"""

from vectors.extract import (
    function_vector,
    logistic_probe,
    mean_difference,
    pca_pairwise,
    pca_repe,
    relation_neurons,
    sign_pattern,
    tunable_experts,
)
from vectors.extract.contract import (
    Cancelled,
    Capture,
    Extraction,
    ExtractOptions,
    ExtractRequest,
    Pair,
    Progress,
)
from vectors.extract.method import methods
from vectors.extract.recipe import RecipeOptions, get_recipe, parse_request, recipes, run_recipe
from vectors.extract.run import check_options, run
from vectors.extract.subject import Subject

__all__ = ["Cancelled", "Capture", "ExtractOptions", "ExtractRequest", "Extraction", "Pair", "Progress",
           "RecipeOptions", "Subject", "check_options", "function_vector", "get_recipe", "logistic_probe",
           "mean_difference", "methods", "parse_request", "pca_pairwise", "pca_repe", "recipes", "relation_neurons", "run",
           "run_recipe", "sign_pattern", "tunable_experts"]
