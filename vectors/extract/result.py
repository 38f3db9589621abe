"""What an extraction says about itself: the report for people and the metadata that is stored."""

from collections.abc import Sequence
from typing import Any

import torch

from steering.language.strength import Strength
from steering.ops.base import RESIDUAL_SITES
from vectors.artifact import Metadata
from vectors.extract.contract import ExtractOptions, ExtractRequest
from vectors.extract.data import Dataset
from vectors.extract.fit import LayerFit


def make_report(options: ExtractOptions, data: Dataset, fits: Sequence[LayerFit], best: LayerFit, constant: list[int],
                controls: dict[str, Any], residual_norm: dict[int, float]) -> dict[str, Any]:
    """Scores and controls per layer, as plain JSON data."""
    unit = torch.stack([fit.vector / fit.vector.norm() for fit in fits])
    return {
        "method": options.method, "site": options.site, "token": options.token, "best_layer": best.layer,
        "pairs": {split: len(members) for split, members in data.splits.items()},
        "layers": {str(fit.layer): {
            "dev": fit.dev.as_dict(), "test": fit.test.as_dict(), "norm": _rounded(float(fit.vector.norm())),
            "residual_norm": _rounded(residual_norm[fit.layer]), "sigma": _rounded(fit.sigma),
            "control": controls["random_directions"][str(fit.layer)]} for fit in fits},
        "constant_layers": constant,
        "shuffled_labels": {"layer": best.layer, **controls["shuffled_labels"]},
        "cosine": [[round(float(value), 3) for value in row] for row in unit @ unit.T],
    }


def make_metadata(request: ExtractRequest, data: Dataset, fits: Sequence[LayerFit], best: LayerFit,
                  report: dict[str, Any], residual_norm: dict[int, float]) -> Metadata:
    """What is recorded about the artifact: it acts at the best layer unless its op is meant for all of them."""
    options, facts = request.options, request.facts
    op_options = dict(options.options)
    if options.op == "ablate" and not op_options and options.site in RESIDUAL_SITES:
        op_options = {"multi_site": True}
    if options.op == "clamp" and not op_options:
        # What the positive texts have on average; the card names the range of both sides.
        op_options = {"value": best.coordinates["positive"]["mean"]}
    everywhere = bool(op_options.get("multi_site"))
    if everywhere:
        # One direction at every site and layer is what makes this the refusal-direction method.
        op_options.setdefault("source_layer", best.layer)
    return Metadata.parse({
        "name": options.name, "kind": "vector", "op": options.op, "site": options.site,
        "layers": None if everywhere else [best.layer], "strength": Strength(value=1.0), "options": op_options,
        "sign_convention": "positive strength moves towards the positive texts of the pairs",
        "description": options.description, "tags": options.tags, "model_id": facts.model_id,
        "fingerprint": facts.fingerprint, "d_model": facts.d_model,
        "residual_norm": {fit.layer: residual_norm[fit.layer] for fit in fits},
        "sigma": {fit.layer: fit.sigma for fit in fits},
        "provenance": {"method": options.method, "data_hash": data.digest, "num_pairs": len(data.pairs),
                       "token": options.token, "seed": options.seed, "created_by": request.created_by,
                       "report": report},
        "card": {"layers": [best.layer], "strength": Strength(value=1.0).model_dump(mode="json"),
                 "dev": best.dev.as_dict(), "test": {"pairs": report["pairs"]["test"], **best.test.as_dict()},
                 "coordinates": best.coordinates,
                 "random_percentile": report["layers"][str(best.layer)]["control"]["covariance"]["percentile"],
                 "shuffled_percentile": report["shuffled_labels"]["percentile"]},
    })


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
