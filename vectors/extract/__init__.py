"""Extraction: from data to an artifact, by one of the methods that `registry` lists."""

from vectors.extract.contract import Cancelled, Extraction, Pair, Progress
from vectors.extract.recipe import Recipe, RecipeOptions
from vectors.extract.registry import METHODS, RECIPES, get_recipe, parse_request
from vectors.extract.run import Prepared, prepare
from vectors.extract.subject import Subject

__all__ = ["METHODS", "RECIPES", "Cancelled", "Extraction", "Pair", "Prepared", "Progress", "Recipe", "RecipeOptions",
           "Subject", "get_recipe", "parse_request", "prepare"]
