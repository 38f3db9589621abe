"""Extraction: directions from contrastive pairs, and recipes with data of their own.

One method or recipe per file, registered by importing it here.
"""

from vectors.extract import (
    aligned_concept,
    angular_steering,
    condition,
    entropic_steering,
    function_vector,
    head_ablation,
    head_shift,
    logistic_probe,
    manifold,
    mean_difference,
    native_skills,
    pca_pairwise,
    pca_repe,
    refusal_direction,
    relation_neurons,
    sign_pattern,
    tunable_experts,
    tuned_lens,
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
from vectors.extract.recipe import RecipeOptions, get_recipe, parse_fields, parse_request, recipes, run_recipe
from vectors.extract.run import check_options, run
from vectors.extract.subject import Subject

__all__ = ["Cancelled", "Capture", "ExtractOptions", "ExtractRequest", "Extraction", "Pair", "Progress",
           "RecipeOptions", "Subject", "aligned_concept", "angular_steering", "check_options", "condition",
           "entropic_steering", "function_vector", "get_recipe", "head_ablation", "head_shift", "logistic_probe",
           "manifold", "mean_difference", "methods", "native_skills", "parse_fields", "parse_request", "pca_pairwise",
           "pca_repe", "recipes", "refusal_direction", "relation_neurons", "run", "run_recipe", "sign_pattern",
           "tunable_experts", "tuned_lens"]
