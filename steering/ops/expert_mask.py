"""Switch experts of a mixture off or on, scale or bias them (MoTE, 2025, arXiv 2502.11096; SteerMoE, 2025, arXiv
2509.09660)."""

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from steering.language.errors import InvalidSpec
from steering.language.fields import Switch
from steering.ops.base import Operation, Options, Place, Row, Tensors, check_index


class ExpertMaskOptions(Options):
    belongs_to = {"scale": ("scale",), "bias": ("bias",), "renormalise": ("off", "scale")}

    mode: Literal["off", "off_refill", "force", "scale", "bias"] = Field(
        default="off", description="off: weight 0, the slot stays empty; off_refill: never selected, the next best "
        "takes the slot; force: always selected; scale: weight times `scale`; bias: `bias` added to the router logit.")
    scale: float = Field(default=0.0, strict=True, ge=0, le=1000, description="Factor for mode scale.")
    bias: float = Field(default=0.0, strict=True, ge=-1e4, le=1e4, description="Logit bias for mode bias.")
    renormalise: Switch = Field(default=True,
                                description="Give the selected weights their former sum back (off, scale).")

    @model_validator(mode="after")
    def _bias_given(self) -> Self:
        if self.mode == "bias" and "bias" not in self.model_fields_set:
            raise ValueError("mode bias needs a bias")
        return self


class ExpertMask(Operation):
    """Before selection: logits + bias (minus infinity for off_refill), `force` lifts an expert above all others.
    After selection: gate weights times `gate`, renormalised to their former sum if asked.
    """

    name = "expert_mask"
    options = ExpertMaskOptions
    kinds = ("expert_set",)
    sites = ("router",)

    def row(self, tensors: Tensors, options: ExpertMaskOptions, place: Place) -> Row:
        experts = self._checked(tensors, options, place)
        bias, gate, force = torch.zeros(place.width), torch.ones(place.width), torch.zeros(place.width)
        if options.mode == "off":
            gate[experts] = torch.tensor(1 - place.scale)
        elif options.mode == "scale":
            gate[experts] = torch.tensor(1 + place.scale * (options.scale - 1))
        elif options.mode == "bias":
            bias[experts] = torch.tensor(place.scale * options.bias)
        elif options.mode == "off_refill":
            bias[experts] = -math.inf
        else:
            force[experts] = 1.0
        renormalise = float(options.renormalise and options.mode in ("off", "scale"))
        return Row("route", {"bias": bias, "gate": gate, "force": force, "renormalise": torch.tensor(renormalise)})

    def reference(self, h: torch.Tensor, tensors: Tensors, options: ExpertMaskOptions, place: Place) -> torch.Tensor:
        """`h [T, E]` are softmax-routed logits; returns dense gate weights `[T, E]` (top-k, normalised to sum 1)."""
        experts = self._checked(tensors, options, place).tolist()
        k = place.facts.experts_per_token
        out = torch.zeros_like(h)
        for t, logits in enumerate(h.tolist()):
            for e in experts:
                if options.mode == "off_refill":
                    logits[e] = -math.inf
                elif options.mode == "bias":
                    logits[e] += place.scale * options.bias
            forced = experts if options.mode == "force" else []
            highest = max(logits)
            for e in forced:
                logits[e] = highest + 0.01
            top = max(logits)
            scores = [math.exp(x - top) for x in logits]
            chosen = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]
            total = sum(scores[e] for e in chosen)
            weights = {e: scores[e] / total for e in chosen}
            factor = {"off": 1 - place.scale, "scale": 1 + place.scale * (options.scale - 1)}.get(options.mode, 1.0)
            for e in experts:
                if e in weights:
                    weights[e] *= factor
            if options.renormalise and options.mode in ("off", "scale") and sum(weights.values()) > 0:
                weights = {e: w / sum(weights.values()) for e, w in weights.items()}
            for e, weight in weights.items():
                out[t, e] = weight
        return out

    def _checked(self, tensors: Tensors, options: ExpertMaskOptions, place: Place) -> torch.Tensor:
        experts = tensors["experts"]
        check_index(experts, place.facts.num_experts, "expert", ("inline", "experts"))
        if options.mode in ("off_refill", "force") and place.scale != 1.0:
            raise InvalidSpec(f"expert_mask {options.mode} has no strength", param="strength",
                              fix="Use mode bias or scale for something in between.")
        if options.mode == "force" and len(experts) > place.facts.experts_per_token:
            raise InvalidSpec(f"{len(experts)} experts forced, a token has {place.facts.experts_per_token}",
                              param=("inline", "experts"))
        if options.mode == "off_refill" and place.facts.num_experts - len(experts) < place.facts.experts_per_token:
            raise InvalidSpec("too few experts would be left to fill a token's slots", param=("inline", "experts"),
                              fix="Switch fewer off, or use mode off.")
        return experts


OPERATION = ExpertMask()
