"""Porting an artifact: its layers matched, a map for each by texts held out, and its numbers through the map."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steering.artifacts.payload import Kind, Payload
from steering.language.errors import ArtifactMismatch, InvalidRequest
from steering.language.strength import Strength
from steering.models.facts import ModelFacts
from vectors.artifact import Metadata
from vectors.porting.aligned import METHODS, Aligned, Method, align
from vectors.porting.report import PortedLayer, PortReport, Tried

PORTED: tuple[Kind, ...] = ("vector", "subspace", "probe")
Choice = Literal["auto", "orthogonal", "ridge", "cca"]
# Share done and stage; it raises when the work is cancelled.
Progress = Callable[[float, str], None]
# Every so many-th text is held out. A token whose norm is so many times the median is a massive activation.
HELD_OUT, MASSIVE = 5, 8.0
LEAST_TEXTS, LEAST_TOKENS = 20, 200
# Another layer than that of equal relative depth must be better by so much.
BETTER = 0.02
# Below this share of the variance two sets of activations have nothing to do with each other.
LEAST_EXPLAINED = 0.1


@dataclass(frozen=True)
class Rows:
    """Activations of the same tokens in both models. source, target: layer -> `[tokens, width]`. text, position:
    `[tokens]`."""

    source: Mapping[int, Tensor]
    target: Mapping[int, Tensor]
    text: Tensor
    position: Tensor


@dataclass(frozen=True)
class Ported:
    metadata: Metadata
    payload: Payload
    report: PortReport


def check_portable(metadata: Metadata, payload: Payload, facts: ModelFacts) -> list[int]:
    """The artifact's layers that are ported: those that it acts at by itself.

    Raises:
        ArtifactMismatch: its kind has no directions, or it is of this model already.
    """
    if metadata.kind not in PORTED:
        raise ArtifactMismatch(f"a {metadata.kind} is not ported; indices of dims, neurons, heads and experts mean "
                               "nothing in another model, and no map is made of manifolds, maps and SAEs", param="ref",
                               fix=f"Kinds that are: {', '.join(PORTED)}. Make the others on this model.")
    if metadata.fingerprint == facts.fingerprint and facts.adapter is None:
        raise ArtifactMismatch("it was made on this model", param="ref", fix="Use it as it is.")
    wanted = metadata.layers if isinstance(metadata.layers, list) else list(payload.layers)
    found = [layer for layer in payload.layers if layer in wanted] or list(payload.layers)
    return found


def near(layer: int, source_layers: int, facts: ModelFacts, offered: Mapping[int, Any] | None = None) -> list[int]:
    """Layers of the target that are tried for one of the source: that of equal relative depth first, then its
    neighbours."""
    last = max(source_layers - 1, 1)
    middle = round(layer * (facts.num_layers - 1) / last)
    found = [n for n in (middle, middle - 1, middle + 1) if 0 <= n < facts.num_layers]
    return found if offered is None else [n for n in found if n in offered]


def port(ref: str, metadata: Metadata, payload: Payload, name: str, rows: Rows, candidates: Mapping[int, list[int]],
         method: Choice, facts: ModelFacts, created_by: str, progress: Progress = lambda share, stage: None) -> Ported:
    """
    Args:
        candidates: by layer of the source, layers of the target that are tried, the likeliest first.

    Raises:
        InvalidRequest: too few texts, or the activations do not correspond.
    """
    kept = _kept(rows)
    texts = torch.tensor(sorted(set(rows.text[kept].tolist())))
    if len(texts) < LEAST_TEXTS or int(kept.sum()) < LEAST_TOKENS:
        raise InvalidRequest(f"{len(texts)} texts of {int(kept.sum())} tokens are too few to fit a map and to try it",
                             param="source", fix=f"Capture {LEAST_TEXTS} texts or more, of {LEAST_TOKENS} tokens in "
                             "all; better are several thousand tokens.")
    # Texts are numbered anew, so that every fifth of those that are there is held out.
    number = torch.searchsorted(texts, rows.text[kept])
    held = number % HELD_OUT == HELD_OUT - 1
    layers, numbers, ratios = list[PortedLayer](), dict[int, dict[str, Tensor]](), dict[int, float]()
    norms, sigmas, warnings = dict[int, float](), dict[int, float](), list[str]()
    for n, (layer, options) in enumerate(candidates.items()):
        progress(n / len(candidates), "align")
        source = rows.source[layer][kept].float()
        found, aligned = _best(layer, source, {one: rows.target[one][kept].float() for one in options}, number, held,
                               method)
        target = rows.target[found.layer][kept].float()
        made = _through(payload.layers[layer], metadata.kind, aligned, found.norm_ratio)
        found.coordinate = _coordinate(payload.layers[layer], aligned, source[held], target[held])
        former = next((one for one in layers if one.layer == found.layer), None)
        if former is not None:
            warnings.append(f"layers {former.source_layer} and {layer} both fall on layer {found.layer}; "
                            "the one whose map gives more was kept")
            if former.explained >= found.explained:
                continue
            layers.remove(former)
        layers.append(found)
        numbers[found.layer], ratios[found.layer] = made, found.norm_ratio
        norms[found.layer] = float(target.norm(dim=1).mean())
        if metadata.kind != "subspace":
            direction = made["vector" if "vector" in made else "weight"].double()
            sigmas[found.layer] = float((target.double() @ (direction / direction.norm())).std())
    best = max(layers, key=lambda one: one.explained)
    if best.explained < LEAST_EXPLAINED:
        raise InvalidRequest(f"the activations do not correspond: the best map gives {best.explained:.3f} of the "
                             "variance of texts held out", param="source", fix="See that both models tokenise these "
                             "texts in the same way, and that they are of one kind.")
    width = max(source.shape[1], target.shape[1])
    if int((~held).sum()) < 4 * width:
        warnings.append(f"the map was fitted on {int((~held).sum())} tokens, fewer than 4 times the width of {width}")
    report = PortReport(source=ref, source_model=metadata.model_id, source_fingerprint=metadata.fingerprint,
                        site=metadata.site, layers=layers, texts=len(texts),
                        held_out_texts=len(set(number[held].tolist())),
                        tokens=int(kept.sum()), left_out=int((~kept).sum()), warnings=warnings)
    return Ported(_metadata(metadata, name, report, norms, sigmas, ratios, facts, created_by),
                  Payload.build(metadata.kind, dict(sorted(numbers.items()))), report)


def _kept(rows: Rows) -> Tensor:
    """Tokens that are neither the first of a text nor massive in one of the models."""
    kept = rows.position > 0
    for h in (*rows.source.values(), *rows.target.values()):
        norm = h.float().norm(dim=1)
        kept &= norm < MASSIVE * norm[rows.position > 0].median() if bool((rows.position > 0).any()) else norm < 0
    return kept


def _best(layer: int, source: Tensor, targets: Mapping[int, Tensor], text: Tensor, held: Tensor, method: Choice
          ) -> tuple[PortedLayer, Aligned]:
    methods: tuple[Method, ...] = METHODS if method == "auto" else (method,)
    tried: list[tuple[Tried, Aligned]] = []
    for number, target in targets.items():
        for one in methods:
            aligned = align(source[~held], target[~held], text[~held], one)
            tried.append((Tried(layer=number, method=one, explained=aligned.explained(source[held], target[held])),
                          aligned))
    first = next(iter(targets))
    likeliest = max((one for one in tried if one[0].layer == first), key=lambda one: one[0].explained)
    best = max(tried, key=lambda one: one[0].explained)
    chosen = best if best[0].explained > likeliest[0].explained + BETTER else likeliest
    target = targets[chosen[0].layer]
    dealt = torch.randperm(int((~held).sum()), generator=torch.Generator().manual_seed(0))
    shuffled = align(source[~held][dealt], target[~held], text[~held], chosen[0].method)
    return PortedLayer(
        source_layer=layer, layer=chosen[0].layer, method=chosen[0].method, explained=chosen[0].explained,
        shuffled=shuffled.explained(source[held], target[held]), coordinate=0.0,
        norm_ratio=float(target.norm(dim=1).mean() / source.norm(dim=1).mean()), tried=[one for one, _ in tried]
    ), chosen[1]


def _through(tensors: Mapping[str, Tensor], kind: Kind, aligned: Aligned, ratio: float) -> dict[str, Tensor]:
    """The numbers of a layer as those of the target."""
    if kind == "vector":
        vector = tensors["vector"].double()
        found = aligned.direction(vector)
        return {"vector": (found * (vector.norm() * ratio / found.norm())).float()}
    if kind == "probe":
        weight, more = aligned.reader(tensors["weight"])
        return {"weight": weight.float(), "bias": (tensors["bias"].double() + more).float()}
    basis = torch.linalg.qr(aligned.direction(tensors["basis"]).T)[0].T.contiguous().float()
    return {"basis": basis} | ({"mean": aligned.point(tensors["mean"]).float()} if "mean" in tensors else {})


def _coordinate(tensors: Mapping[str, Tensor], aligned: Aligned, source: Tensor, target: Tensor) -> float:
    """How well what the source holds along the artifact can be read in the target; of a basis the mean of its rows."""
    rows = tensors["basis"] if "basis" in tensors else (tensors["vector"] if "vector" in tensors else
                                                        tensors["weight"]).unsqueeze(0)
    found = []
    for row in rows:
        weight, _ = aligned.reader(row)
        pair = torch.stack([source.double() @ row.double(), target.double() @ weight])
        found.append(float(torch.corrcoef(pair)[0, 1].nan_to_num()))
    return sum(found) / len(found)


def _metadata(metadata: Metadata, name: str, report: PortReport, norms: Mapping[int, float],
              sigmas: Mapping[int, float], ratios: Mapping[int, float], facts: ModelFacts, created_by: str) -> Metadata:
    layers = sorted(norms)
    strength = metadata.strength
    if strength.unit == "unit":
        # The one unit that is a length of activations and is stated outside of the numbers.
        strength = Strength(value=strength.value * sum(ratios.values()) / len(ratios), unit="unit")
    warnings = ["ported from another model: its strength was scaled by norms and not tried here; evaluate or tune it",
                *report.warnings]
    ported = report.model_dump(mode="json", exclude={"artifact"})
    return Metadata.parse({
        **metadata.model_dump(include={"kind", "op", "site", "options", "sign_convention", "tags", "reading", "scope"}),
        "name": name, "layers": layers, "strength": strength,
        "description": metadata.description or f"Ported from {report.source} of {report.source_model}.",
        "model_id": facts.model_id, "fingerprint": facts.fingerprint, "d_model": facts.d_model,
        "residual_norm": {layer: _short(norms[layer]) for layer in layers},
        "sigma": {layer: _short(sigmas[layer]) for layer in layers if sigmas.get(layer, 0.0) > 0},
        "card": {"ported": ported, "warnings": warnings},
        "provenance": {"method": "port", "source": report.source, "source_model": report.source_model,
                       "source_fingerprint": report.source_fingerprint, "created_by": created_by,
                       **({} if facts.adapter is None else {"adapter": facts.adapter})}})


def _short(value: float) -> float:
    return float(f"{value:.6g}")
