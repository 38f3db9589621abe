"""Weights of the served model, read from its checkpoint, which both engines load from the same folder."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from steering.language.errors import UnsupportedModel, UnsupportedSite
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.models.families import FAMILIES
from steering.models.readers import CENTRED, FROM_ONE, RESIDUAL, TRANSPOSED, Reader, output_reader, residual_reader


class Weights:
    """Methods block. Only the tensors that are asked for are read."""

    def __init__(self, model: str, facts: ModelFacts) -> None:
        """
        Args:
            model: a folder, or a name at Hugging Face whose files are in its cache.

        Raises:
            UnsupportedModel: its weights are not those of plain safetensors files.
        """
        self._facts = facts
        if facts.adapter is not None or facts.family not in FAMILIES:
            raise _unreadable(facts, "where its readers stand is not known" if facts.adapter is None else
                              "with an adapter it has other weights than its checkpoint")
        self._files = _files(model, facts)

    def readers(self, site: Site, layer: int, named: list[str]) -> dict[str, Tensor]:
        """What reads a site, by name, `[out, width]` float32.

        Raises:
            UnsupportedSite, InvalidRequest, UnsupportedModel.
        """
        family = self._facts.family
        if site in ("head_out", "mlp_act"):
            return {"output projection": self._matrix(output_reader(family, site, layer, self._files), site)}
        if site not in RESIDUAL:
            raise UnsupportedSite(f"what reads {site} is the whole residual stream after it", param="site",
                                  fix="Check the direction at resid_post, with the readers that you believe in.")
        return {name: self._matrix(residual_reader(family, name, self._files), site) for name in named}

    def _matrix(self, reader: Reader, site: Site) -> Tensor:
        family, width = self._facts.family, self._facts.width(site)
        parts = [self._read(name) for name in reader.weights]
        if family in TRANSPOSED:
            parts = [part if name.split(".")[-2] in ("wte", "lm_head") else part.T
                     for name, part in zip(reader.weights, parts, strict=True)]
        if any(part.ndim != 2 or part.shape[1] != width for part in parts):
            raise _unreadable(self._facts, f"its weights {reader.weights[0]} are not of width {width}")
        found = torch.cat(parts)
        if reader.gain is None:
            return found
        gain = self._read(reader.gain) + (1.0 if family in FROM_ONE else 0.0)
        found = found * gain
        return found - found.mean(dim=1, keepdim=True) if family in CENTRED else found

    def _read(self, name: str) -> Tensor:
        try:
            with safe_open(self._files[name], "pt") as file:
                found = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _unreadable(self._facts, f"{name} cannot be read: {error}") from error
        if found.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise _unreadable(self._facts, f"its weights are stored as {found.dtype}")
        return found.float()


def _files(model: str, facts: ModelFacts) -> Mapping[str, Path]:
    """Which file of the checkpoint has each tensor."""
    folder = Path(model)
    if not folder.is_dir():
        found = None
        with suppress(OSError):
            found = cached_file(model, "config.json", local_files_only=True)
        folder = folder if found is None else Path(found).parent
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            mapped = json.loads(index.read_text())["weight_map"]
            return {str(name): folder / str(file) for name, file in mapped.items()}
        single = folder / "model.safetensors"
        if single.is_file():
            with safe_open(single, "pt") as file:
                return dict.fromkeys(file.keys(), single)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _unreadable(facts, f"its files cannot be read: {error}") from error
    raise _unreadable(facts, "it is no folder of safetensors")


def _unreadable(facts: ModelFacts, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"the weights of {facts.model_id} are needed, and {why}",
                            param="site", fix="Serve the model from a folder of safetensors, without an adapter.")
