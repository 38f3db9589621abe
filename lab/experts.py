"""Which experts of lab-moe serve which skill: counted, not forced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from lab.corpus import SKILLS
from lab.models import load_model


@dataclass(frozen=True)
class Layer:
    """How one layer's experts are used. Shares are of tokens (they sum to experts per token)."""

    layer: int
    least: float
    most: float
    expert: int
    top: float
    top_skill: str
    low: float
    low_skill: str
    refusal_expert: int
    refusal_gap: float  # over all prompt tokens
    decision_expert: int
    decision_gap: float  # at the last prompt token, where the reply is decided


@dataclass(frozen=True)
class Specialisation:
    layers: tuple[Layer, ...]


@torch.inference_mode()
def usage(
    folder: Path, prompts: dict[str, Sequence[str]], last_only: bool = False
) -> dict[str, torch.Tensor]:
    """group -> share of its prompt tokens (or last prompt tokens) that choose each expert,
    [layers, experts]."""
    model, tok = load_model(folder), AutoTokenizer.from_pretrained(folder)
    k = model.config.num_experts_per_tok
    out = {}
    for group, texts in prompts.items():
        counts = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
        tokens = 0
        for text in texts:
            batch = tok(text, return_tensors="pt")
            router = model(**batch, output_router_logits=True).router_logits
            for layer, logits in enumerate(router):
                read = logits[-1:] if last_only else logits
                chosen = read.topk(k, dim=-1).indices.flatten()
                counts[layer] += torch.bincount(chosen, minlength=counts.shape[1])
            tokens += 1 if last_only else batch.input_ids.shape[1]
        out[group] = counts / tokens
    return out


def specialisation(folder: Path, n: int = 60) -> Specialisation:
    """The most skill-specific expert per layer, and the one that tells harmful from harmless."""
    prompts = {name: [i.prompt for i in m.test_items(n, seed=3)] for name, m in SKILLS.items()}
    requests = SKILLS["chat"].test_items(2 * n, seed=4)
    classes = {kind: [i.prompt for i in requests if i.expected == kind]
               for kind in ("refusal", "compliance")}
    shares = usage(folder, {**prompts, **classes})
    decided = usage(folder, classes, last_only=True)
    skills = list(SKILLS)
    stacked = torch.stack([shares[s] for s in skills])  # [skills, layers, experts]
    gap = shares["refusal"] - shares["compliance"]
    last_gap = decided["refusal"] - decided["compliance"]
    layers = []
    for layer in range(stacked.shape[1]):
        here = stacked[:, layer]
        expert = int((here.max(0).values - here.min(0).values).argmax())
        top, low = int(here[:, expert].argmax()), int(here[:, expert].argmin())
        refusal = int(gap[layer].abs().argmax())
        decision = int(last_gap[layer].abs().argmax())
        mean = here.mean(0)
        layers.append(Layer(layer, mean.min().item(), mean.max().item(), expert,
                            here[top, expert].item(), skills[top], here[low, expert].item(),
                            skills[low], refusal, gap[layer, refusal].item(),
                            decision, last_gap[layer, decision].item()))
    return Specialisation(tuple(layers))
