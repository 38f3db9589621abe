"""LoRA adapters of random numbers in the form in which PEFT writes them, and the model with one merged into it."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, model: Any, seed: int, *, rank: int = 4, alpha: float = 8.0,
                  modules: Sequence[str] = (*ATTENTION, *MLP), **config: Any) -> Path:
    """An adapter of every block of `model`, strong enough to be seen in every log-probability."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in modules:
            wide, narrow = module.weight.shape
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, narrow, generator=generator) / narrow ** 0.5
            tensors[f"{prefix}.lora_B.weight"] = 0.1 * torch.randn(wide, rank, generator=generator) / rank ** 0.5
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "target_modules": list(modules),
        "bias": "none", **config}))
    return folder


def merged(model: Any, folder: Path) -> Any:
    """A copy of `model` with the adapter in its weights: W + alpha / r * B A."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors, made = load_file(folder / "adapter_model.safetensors"), copy.deepcopy(model)
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            place = name.removesuffix(".lora_A.weight")
            up = tensors[f"{place}.lora_B.weight"]
            with torch.no_grad():
                made.get_submodule(place.removeprefix("base_model.model.")).weight += (
                    config["lora_alpha"] / config["r"] * up @ down)
    return made
