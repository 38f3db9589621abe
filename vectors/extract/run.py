"""One extraction from request to artifact: read, fit every layer, choose one on dev, report on test."""

from collections.abc import Sequence
from typing import Any

import torch

from steering.artifacts.payload import Payload
from steering.language.errors import InvalidRequest
from steering.models.facts import ModelFacts
from steering.ops.base import VECTOR_SITES, get_operation, operations
from steering.programs.inline import parse_options
from steering.programs.layers import explicit_layers
from vectors.extract.contract import Cancelled, Capture, Extraction, ExtractOptions, ExtractRequest, Progress
from vectors.extract.controls import random_scores, shuffled_scores, summary
from vectors.extract.data import Dataset, prepare
from vectors.extract.errors import ConstantActivations, ExtractionCancelled
from vectors.extract.fit import LayerFit, fit_layer
from vectors.extract.method import get_method
from vectors.extract.result import make_metadata, make_report
from vectors.extract.store import ActivationStore

CAPTURE_SHARE, FIT_SHARE = 0.6, 0.2


def run(request: ExtractRequest, capture: Capture, progress: Progress, cancelled: Cancelled) -> Extraction:
    """Take a direction per layer from contrastive pairs.

    The positive class projects larger on it. Its length is the distance of the class means along it, so that strength
    `raw` 1 carries the mean negative text onto the mean positive one. Deterministic for equal requests.

    Raises:
        TrimtabError: InvalidData and its kinds for pairs, InvalidRequest for options, ExtractionCancelled.
    """
    options, facts = request.options, request.facts
    check_options(options)
    layers = _layers(options, facts)
    data = prepare(request.pairs, options.token, facts, options.seed)

    def staged(share: float, stage: str) -> None:
        start, width = {"capture": (0.0, CAPTURE_SHARE), "fit": (CAPTURE_SHARE, FIT_SHARE),
                        "control": (CAPTURE_SHARE + FIT_SHARE, 1 - CAPTURE_SHARE - FIT_SHARE)}[stage]
        progress(start + width * share, stage)

    with ActivationStore(layers, len(data.pairs), facts.width(options.site)) as store:
        store.fill(data.pairs, capture, options.site, options.token, staged, cancelled)
        fits, constant = _fit_all(options, store, data, staged, cancelled)
        best = max(fits, key=lambda fit: (fit.dev.auc, fit.dev.separation))
        controls = _controls(options, store, data, fits, best, staged, cancelled)
    report = {**make_report(options, data, fits, best, constant, controls, store.residual_norm), **request.spelling}
    metadata = make_metadata(request, data, fits, best, report, store.residual_norm)
    payload = Payload.build("vector", {fit.layer: {"vector": fit.vector.float()} for fit in fits})
    return Extraction(metadata, payload, report)


def check_options(options: ExtractOptions) -> None:
    """Raises InvalidRequest: a site that holds no vector, an op that takes none, or options that the op lacks."""
    if options.site not in VECTOR_SITES:
        raise InvalidRequest(f"no direction can be taken at {options.site}", param="site",
                             fix=f"Use one of {', '.join(VECTOR_SITES)}.")
    if "vector" not in get_operation(options.op).kinds:
        takers = [operation.name for operation in operations() if "vector" in operation.kinds]
        raise InvalidRequest(f"the op {options.op} does not take a vector", param="op",
                             fix=f"Use one of {', '.join(takers)}.")
    if options.options:
        parse_options(get_operation(options.op), options.options)


def _layers(options: ExtractOptions, facts: ModelFacts) -> list[int]:
    offered = facts.sites.get(options.site, ())
    if options.layers == "all" and offered:
        return sorted(offered)
    layers = sorted(explicit_layers(options.layers, facts))
    for layer in layers:
        facts.check_site(options.site, layer, "layers")
    return layers


def _fit_all(options: ExtractOptions, store: ActivationStore, data: Dataset, progress: Progress, cancelled: Cancelled
             ) -> tuple[list[LayerFit], list[int]]:
    """Fits of all layers, and the layers without one because nothing varies there."""
    method = get_method(options.method)
    fits: list[LayerFit] = []
    constant: list[int] = []
    for done, layer in enumerate(store.layers):
        _stop_if(cancelled)
        try:
            fits.append(fit_layer(method, layer, store, data, _generator(options.seed, layer)))
        except ConstantActivations:
            # "all" may contain such a layer without anyone having asked for it; a named layer must not go missing.
            if options.layers != "all":
                raise
            constant.append(layer)
        progress((done + 1) / len(store.layers), "fit")
    if not fits:
        raise ConstantActivations("at every layer all texts have the same activation", param="token",
                                  fix="Read another token: the texts end alike and nothing before differs.")
    return fits, constant


def _controls(options: ExtractOptions, store: ActivationStore, data: Dataset, fits: Sequence[LayerFit], best: LayerFit,
              progress: Progress, cancelled: Cancelled) -> dict[str, Any]:
    """Random directions at every layer; refits on dealt labels, which cost as much as the fit, at the best one."""
    random: dict[str, dict[str, Any]] = {}
    for done, fit in enumerate(fits):
        _stop_if(cancelled)
        train, test = (store.layer(fit.layer, data.splits[split]) for split in ("train", "test"))
        generator = _generator(options.seed + 1, fit.layer)
        random[str(fit.layer)] = {
            "isotropic": summary(fit.test, random_scores(train, test, generator, covariance=False)),
            "covariance": summary(fit.test, random_scores(train, test, generator, covariance=True)),
        }
        progress((done + 1) / (len(fits) + 1), "control")
    train, test = (store.layer(best.layer, data.splits[split]) for split in ("train", "test"))
    shuffled = shuffled_scores(get_method(options.method), train, test, _generator(options.seed + 2, best.layer),
                               before_each=lambda: _stop_if(cancelled))
    progress(1.0, "control")
    return {"random_directions": random, "shuffled_labels": summary(best.test, shuffled)}


def _generator(seed: int, layer: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed << 16) + layer)


def _stop_if(cancelled: Cancelled) -> None:
    if cancelled():
        raise ExtractionCancelled("the extraction was cancelled")
