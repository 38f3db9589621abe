"""Writes tests/data/saelens: SAEs as the package sae-lens writes and reads them, and what it computes with them.

    pip download --no-deps sae-lens==6.54.12 -d DIR && unzip DIR/*.whl -d DIR
    python -m scripts.saelens_fixtures DIR

The package asks for TransformerLens, datasets and a dozen others, which pin other versions of torch than ours. An SAE
needs none of them to encode and decode: what is imported from them stands here as empty modules, and TransformerLens's
hook points, at which nothing is hooked, as the identity. The SAE classes and the loaders are the package's own; the
loaders' downloads are answered with files in the layouts of other programs.
"""

import importlib.abc
import importlib.machinery
import json
import logging
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parents[1] / "tests" / "data" / "saelens"
D, M, K, T = 16, 40, 5, 12
HOOK = "blocks.3.hook_resid_post"


class HookPoint(nn.Module):
    """Gives back what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class HookedRootModule(nn.Module):
    def setup(self) -> None:
        """There are no hooks to find."""


class Absent(types.ModuleType):
    """Stands for a module that is not there: whatever is asked of it is an empty class."""

    HookPoint, HookedRootModule = HookPoint, HookedRootModule

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__init__": lambda self, *args, **fields: None})
        setattr(self, name, made)
        return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules that sae-lens asks for and this environment lacks."""

    LACKING = ("transformer_lens", "datasets", "einops", "plotly", "plotly_express", "nltk", "babe", "simple_parsing",
               "dotenv", "wandb", "jaxtyping", "tenacity", "pandas", "tqdm", "beartype", "matplotlib")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] not in self.LACKING:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> Absent:
        return Absent(spec.name)

    def exec_module(self, module: Any) -> None:
        module.__path__ = []


def use(folder: Path) -> None:
    """Make the package's SAE classes and loaders importable, without what its `__init__` imports besides."""
    sys.meta_path.append(Finder())
    package = types.ModuleType("sae_lens")
    package.__path__ = [str(folder / "sae_lens")]
    package.__version__ = next(folder.glob("sae_lens-*.dist-info")).name.split("-")[1].removesuffix(".dist")  # type: ignore[attr-defined]
    package.logger = logging.getLogger("sae_lens")  # type: ignore[attr-defined]
    sys.modules["sae_lens"] = package
    from sae_lens import saes
    from sae_lens.registry import register_sae_class

    for name, made in (("standard", "Standard"), ("topk", "TopK"), ("jumprelu", "JumpReLU"), ("gated", "Gated")):
        register_sae_class(name, getattr(saes, f"{made}SAE"), getattr(saes, f"{made}SAEConfig"))


def drawn(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


ENCODER, DECODER = drawn(1, D, M, scale=0.25), drawn(2, M, D)
B_ENC, B_DEC = drawn(3, M, scale=0.3), drawn(4, D)
THRESHOLD = drawn(5, M).abs() * 0.5
X = drawn(6, T, D, scale=2.0) + 0.5
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}), "standard-no-subtraction": ("standard", {"apply_b_dec_to_input": False}),
    "standard-constant-norm": ("standard", {"normalize_activations": "constant_norm_rescale"}),
    "standard-layer-norm": ("standard", {"normalize_activations": "layer_norm"}),
    "topk": ("topk", {"k": K}), "topk-decoder-norms": ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("jumprelu", {}), "jumprelu-layer-norm": ("jumprelu", {"normalize_activations": "layer_norm"}),
    "gated": ("gated", {})}


def own(name: str, folder: Path) -> Any:
    """An SAE that sae-lens itself writes."""
    from sae_lens.registry import get_sae_class

    architecture, fields = OWN[name]
    sae_class, config_class = get_sae_class(architecture)
    sae = sae_class(config_class.from_dict({
        "architecture": architecture, "d_in": D, "d_sae": M, "device": "cpu", "dtype": "float32", **fields,
        "metadata": {"hook_name": HOOK, "model_name": "tiny"}}))
    values = {"W_enc": ENCODER, "W_dec": DECODER, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD,
              "r_mag": drawn(7, M, scale=0.3), "b_gate": drawn(8, M, scale=0.3), "b_mag": drawn(9, M, scale=0.3)}
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            parameter.copy_(values[key])
    sae.save_model(folder)
    return sae_class.load_from_disk(folder)


LINEAR = {"encoder.weight": ENCODER.T, "encoder.bias": B_ENC, "decoder.weight": DECODER.T}
TRAINER = {"trainer": {"layer": 3, "submodule_name": "resid_post_layer_3", "lm_name": "org/tiny", "activation_dim": D,
                       "dict_size": M, "k": K}, "buffer": {"ctx_len": 128}}
LLAMA = {"d_model": D, "d_sae": M, "jump_relu_threshold": 0.4, "hook_point_in": HOOK, "hook_point_out": HOOK,
         "dataset_average_activation_norm": {"in": 11.0, "out": 11.0}}
# name -> the package's loader, what it asks for as repository and folder, the weights file, its tensors, the
# configuration file and what it holds.
Layout = tuple[str, str, str, str, dict[str, Tensor], str | None, dict[str, Any]]
OTHERS: dict[str, Layout] = {
    "gemma-scope": ("gemma_2", "google/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_7", "params.npz",
                    {"W_enc": ENCODER, "W_dec": DECODER, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD}, None,
                    {}),
    "gemma-scope-2": ("gemma_3", "google/gemma-scope-2-1b-pt", "resid_post/layer_3_width_16k_l0_medium",
                      "params.safetensors", {"w_enc": ENCODER, "w_dec": DECODER, "b_enc": B_ENC, "b_dec": B_DEC,
                                             "threshold": THRESHOLD}, "config.json",
                      {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt",
                       "hf_hook_point_in": "model.layers.3.output"}),
    "llama-scope": ("llama_scope", "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L3R-8x",
                    "checkpoints/final.safetensors", {**LINEAR, "decoder.bias": B_DEC}, "hyperparams.json", LLAMA),
    **{f"dictionary-learning-{kind.lower()}": (
        "dictionary_learning_1", "org/saes", "resid_post_layer_3/trainer_0", "ae.pt", {**LINEAR, **more}, "config.json",
        {**TRAINER, "trainer": {**TRAINER["trainer"], "dict_class": kind}})
        for kind, more in {"AutoEncoder": {"bias": B_DEC}, "AutoEncoderTopK": {"b_dec": B_DEC},
                           "BatchTopKSAE": {"b_dec": B_DEC, "threshold": torch.tensor(0.25)}}.items()},
    "goodfire": ("goodfire", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth",
                 "Llama-3.1-8B-Instruct-SAE-l19.pth",
                 {"encoder_linear.weight": ENCODER.T, "encoder_linear.bias": B_ENC,
                  "decoder_linear.weight": DECODER.T, "decoder_linear.bias": B_DEC}, None, {}),
}


def other(name: str, folder: Path) -> Any:
    """An SAE in another program's layout, as the package's loader for it makes it."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAE

    loader, repository, inside, weights, tensors, config_name, config = OTHERS[name]
    at = folder / weights
    at.parent.mkdir(parents=True, exist_ok=True)
    plain = {key: tensor.contiguous() for key, tensor in tensors.items()}
    if at.suffix == ".npz":
        np.savez(at, **{key: tensor.numpy() for key, tensor in plain.items()})
    elif at.suffix == ".safetensors":
        save_file(plain, at)
    else:
        torch.save(plain, at)
    if config_name is not None:
        (folder / config_name).write_text(json.dumps(config, indent=1) + "\n")

    def found(repo_id: str = "", filename: str = "", subfolder: str | None = None, **_: Any) -> str:
        return str(at if Path(filename).name == at.name else folder / Path(filename).name)

    loaders.hf_hub_download = found
    loaders.get_safetensors_tensor_shapes = lambda *_: {key: list(tensor.shape) for key, tensor in plain.items()}
    raw, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader](repository, inside, device="cpu",
                                                                 cfg_overrides={"dtype": "float32"})
    filled = loaders.handle_config_defaulting({**raw, "d_in": D, "d_sae": M})
    sae_class, config_class = get_sae_class(filled["architecture"])
    sae = sae_class(config_class.from_dict(filled))
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    if filled["normalize_activations"] == "expected_average_only_in":
        # The factor that sae-lens's own directory of releases records, by the same rule.
        sae.fold_activation_norm_scaling_factor(D**0.5 / LLAMA["dataset_average_activation_norm"]["in"])
    assert isinstance(sae, SAE)
    return sae


def main(arguments: Sequence[str]) -> None:
    use(Path(arguments[0]))
    shutil.rmtree(FOLDER, ignore_errors=True)
    makers: list[tuple[str, Callable[[str, Path], Any]]] = [*((name, own) for name in OWN),
                                                            *((name, other) for name in OTHERS)]
    for name, make in makers:
        folder = FOLDER / name
        folder.mkdir(parents=True)
        sae = make(name, folder)
        with torch.no_grad():
            features = sae.encode(X)
            features = features.to_dense() if features.is_sparse else features
            decoded = sae.decode(sae.encode(X))
        save_file({"x": X, "features": features.contiguous(), "decoded": decoded.contiguous()},
                  folder / "expected.safetensors")
        print(name, f"{float((features > 0).float().sum(1).mean()):.1f} features a token")


if __name__ == "__main__":
    main(sys.argv[1:])
