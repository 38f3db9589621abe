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
    refusal_gap: float


@dataclass(frozen=True)
class Specialisation:
    layers: tuple[Layer, ...]


@torch.inference_mode()
def usage(folder: Path, prompts: dict[str, Sequence[str]]) -> dict[str, torch.Tensor]:
    """group -> share of its prompt tokens that choose each expert, [layers, experts]."""
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
                chosen = logits.topk(k, dim=-1).indices.flatten()
                counts[layer] += torch.bincount(chosen, minlength=counts.shape[1])
            tokens += batch.input_ids.shape[1]
        out[group] = counts / tokens
    return out


def specialisation(folder: Path, n: int = 60) -> Specialisation:
    """The most skill-specific expert per layer, and the one that tells harmful from harmless."""
    prompts = {name: [i.prompt for i in m.test_items(n, seed=3)] for name, m in SKILLS.items()}
    requests = SKILLS["chat"].test_items(2 * n, seed=4)
    for kind in ("refusal", "compliance"):
        prompts[kind] = [i.prompt for i in requests if i.expected == kind]
    shares = usage(folder, prompts)
    skills = list(SKILLS)
    stacked = torch.stack([shares[s] for s in skills])  # [skills, layers, experts]
    gap = shares["refusal"] - shares["compliance"]
    layers = []
    for layer in range(stacked.shape[1]):
        here = stacked[:, layer]
        expert = int((here.max(0).values - here.min(0).values).argmax())
        top, low = int(here[:, expert].argmax()), int(here[:, expert].argmin())
        refusal = int(gap[layer].abs().argmax())
        mean = here.mean(0)
        layers.append(Layer(layer, mean.min().item(), mean.max().item(), expert,
                            here[top, expert].item(), skills[top], here[low, expert].item(),
                            skills[low], refusal, gap[layer, refusal].item()))
    return Specialisation(tuple(layers))
