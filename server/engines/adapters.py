"""Adapters that were trained on the served model (LoRA, as PEFT stores them): what a request may name beside it.

An engine that has the feature "adapters" loads them; `Engine.on` is the engine with one of them on the model.
"""

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open

from server.errors import InvalidAdapter, ModelNotFound
from steering.language.errors import printable

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MOST_CONFIG_BYTES = 2**20
# Layers of a block that take an adapter. Embeddings and the head do not, because logits are also computed outside of
# the batches for which vLLM knows whose token belongs to which adapter.
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Adapter:
    """
    Attributes:
        name: how requests call it. digest: of its files. number: no other one of this server had or will have it.
        folder: a copy that nobody changes.
    """

    name: str
    digest: str
    number: int
    folder: Path
    created: int

    @property
    def ref(self) -> str:
        """The name and what tells versions apart that had the same one."""
        return f"{self.name}@{self.digest[:16]}"


class _Config(BaseModel):
    """What PEFT writes beside the numbers, as far as it changes what they mean."""

    peft_type: str = "LORA"
    r: int = Field(ge=1, le=512, strict=True)
    lora_alpha: float = Field(gt=0, le=1e6)
    bias: str = "none"
    use_dora: bool = False
    use_rslora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    modules_to_save: Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = {}
    alpha_pattern: Mapping[str, float] = {}
    layer_replication: Any = None
    alora_invocation_tokens: Any = None
    init_lora_weights: bool | str | None = True


def check_adapter(folder: Path, most_rank: int) -> None:
    """See that an adapter can be served as it was trained, by the names and shapes of its tensors.

    Raises:
        InvalidAdapter: its files cannot be read, or it changes more than the linear layers of blocks.
    """
    config = _config(folder)
    wrong = {"peft_type": config.peft_type != "LORA", "bias": config.bias != "none", "use_dora": config.use_dora,
             "lora_bias": config.lora_bias, "fan_in_fan_out": config.fan_in_fan_out,
             "modules_to_save": bool(config.modules_to_save), "layer_replication": bool(config.layer_replication),
             "alora_invocation_tokens": bool(config.alora_invocation_tokens),
             "init_lora_weights": isinstance(config.init_lora_weights, str)
             and config.init_lora_weights.lower() not in ("gaussian", "eva", "orthogonal")}
    for name, refused in wrong.items():
        if refused:
            raise InvalidAdapter(f"{CONFIG} asks for {name}={printable(str(getattr(config, name)))[:80]}, which this "
                                 "server does not do", fix="Train or convert it to a plain LoRA adapter.")
    if max([config.r, *config.rank_pattern.values()]) > most_rank:
        raise InvalidAdapter(f"its rank is over {most_rank}", fix="Start the server with a larger vllm_adapter_rank.")
    halves: dict[str, set[str]] = {}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                found = _TENSOR.fullmatch(name)
                if found is None or found[1].rpartition(".")[2] not in LAYERS:
                    raise InvalidAdapter(f"it holds {printable(name)[:200]}, which is not of a linear layer of a block",
                                         fix=f"Adapt only {', '.join(LAYERS)}.")
                halves.setdefault(found[1], set()).add(found[2])
    except (OSError, SafetensorError) as error:
        raise InvalidAdapter(f"{WEIGHTS} cannot be read: {printable(str(error))[:200]}") from error
    if not halves or any(len(both) != 2 for both in halves.values()):
        raise InvalidAdapter("it does not hold both halves, lora_A and lora_B, of what it adapts")


def _config(folder: Path) -> _Config:
    try:
        with (folder / CONFIG).open("rb") as file:
            config = _Config.model_validate(json.loads(file.read(MOST_CONFIG_BYTES)))
    except (OSError, ValueError, RecursionError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise InvalidAdapter(f"{CONFIG} cannot be read: {printable(said)[:200]}",
                             fix="Give a folder as PEFT writes it.") from error
    if not math.isfinite(config.lora_alpha):
        raise InvalidAdapter(f"{CONFIG} has a lora_alpha that is not finite")
    return config


class Adapters:
    """Those that are loaded, by name. Their files are copied, so that what is served stays what was loaded when the
    folder that they came from changes: an engine may read them again at any time."""

    def __init__(self) -> None:
        self._loaded: dict[str, Adapter] = {}
        self._users: Counter[int] = Counter()
        self._number = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __len__(self) -> int:
        return len(self._loaded)

    def __iter__(self) -> Iterator[Adapter]:
        return iter(list(self._loaded.values()))

    def get(self, name: str) -> Adapter | None:
        return self._loaded.get(name)

    def copy(self, name: str, source: Path, most_rank: int) -> Adapter:
        """A checked copy under a number of its own, which requests cannot name yet. Blocks.

        Raises:
            InvalidAdapter: it cannot be served.
        """
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="trimtab-adapters-")
        self._number += 1
        folder = Path(self._folder.name) / str(self._number)
        folder.mkdir()
        try:
            digest = hashlib.sha256()
            for file in (CONFIG, WEIGHTS):
                try:
                    shutil.copyfile(source / file, folder / file)
                except OSError as error:
                    raise InvalidAdapter(f"{file} cannot be read: {os.strerror(error.errno or 0)}",
                                         fix="Give a folder as PEFT writes it, with safetensors.") from error
                with (folder / file).open("rb") as copied:
                    digest.update(hashlib.file_digest(copied, "sha256").digest())
            check_adapter(folder, most_rank)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return Adapter(name, digest.hexdigest(), self._number, folder, int(time.time()))

    @contextmanager
    def used(self, adapter: Adapter | None) -> Iterator[None]:
        """A request uses it in the body of the statement. Its files stay as long as one does.

        Raises:
            ModelNotFound: it was unloaded before the request began.
        """
        if adapter is None:
            yield
            return
        if self._loaded.get(adapter.name) is not adapter:
            raise ModelNotFound(f"the adapter {adapter.name} was unloaded", param="model")
        self._users[adapter.number] += 1
        try:
            yield
        finally:
            self._users[adapter.number] -= 1
            self._drop_unused(adapter)

    def add(self, adapter: Adapter) -> None:
        self.remove(adapter.name)
        self._loaded[adapter.name] = adapter

    def remove(self, name: str) -> Adapter | None:
        """Requests cannot name it any more."""
        found = self._loaded.pop(name, None)
        if found is not None:
            self._drop_unused(found)
        return found

    def _drop_unused(self, adapter: Adapter) -> None:
        if self._loaded.get(adapter.name) is not adapter and not self._users[adapter.number]:
            del self._users[adapter.number]
            shutil.rmtree(adapter.folder, ignore_errors=True)

    def close(self) -> None:
        self._loaded.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
