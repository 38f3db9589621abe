"""Directions from contrastive pairs: one method per file, registered by importing it here."""

from vectors.extract import logistic_probe, mean_difference, pca_pairwise, pca_repe
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
from vectors.extract.run import check_options, run

__all__ = ["Cancelled", "Capture", "ExtractOptions", "ExtractRequest", "Extraction", "Pair", "Progress",
           "check_options", "logistic_probe", "mean_difference", "methods", "pca_pairwise", "pca_repe", "run"]
