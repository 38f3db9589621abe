"""Which program wrote an SAE's tensors, and what its conventions are."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from steering.language.errors import InvalidPayload
from steering.language.vocabulary import Site
from vectors.formats.dictionaries.hooks import place_of

Config = Mapping[str, Any]
# What stands beside the numbers of an SAE and does not enter its function.
IDLE = {"sparsity", "step", "group_sizes", "num_tokens_since_fired", "activation_counts",
        "n_forward_passes_since_fired"}


@dataclass(frozen=True)
class Conventions:
    """As one program has them. None: the program does not fix it, and nothing says it.

    layout: name of the program. subtracted, scale, norm, decoder_norms: see `folding.Raw`. activation: relu, topk,
    jumprelu. threshold: one for all features. notes: what else is worth knowing.
    """

    layout: str
    subtracted: bool | None
    activation: str | None = None
    k: int | None = None
    scale: float | None = 1.0
    norm: str = "none"
    threshold: float | None = None
    decoder_norms: bool = False
    site: Site | None = None
    layer: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def recognised(tensors: Mapping[str, Tensor], config: Config) -> Conventions:
    """
    Raises:
        InvalidPayload: it is no SAE that is understood; the message says what it is, or what it lacks.
    """
    _refuse_others(tensors, config)
    for matches, conventions in LAYOUTS:
        if matches(tensors, config):
            return conventions(tensors, config)
    raise InvalidPayload(f"the tensors {', '.join(sorted(tensors)[:12])} are of no SAE layout that is known",
                         param="file", fix="Known are those of SAELens, Gemma Scope, Llama Scope, Qwen-Scope, "
                         "sparsify, dictionary_learning and Goodfire.")


def _refuse_others(tensors: Mapping[str, Tensor], config: Config) -> None:
    said = str(config.get("architecture", ""))
    two_places = config.get("hook_name_out") or config.get("hf_hook_point_out") or (
        "hook_point_out" in config and config["hook_point_out"] != config.get("hook_point_in"))
    if {"W_skip", "affine_skip_connection"} & set(tensors) or "transcoder" in said or config.get("transcode") or (
            two_places):
        raise InvalidPayload("the file is a transcoder, which reads one place and writes another; this server takes "
                             "autoencoders", param="file", fix="Use the SAE of the place that is to be changed.")


# SAELens.

_ARCHITECTURES = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "relu", "batchtopk": "jumprelu",
                  "matryoshka_batchtopk": "jumprelu"}
_NORMS = {"none": "none", "constant_norm_rescale": "constant", "layer_norm": "layer",
          "expected_average_only_in": "none"}


def _is_saelens(tensors: Mapping[str, Tensor], config: Config) -> bool:
    return "W_enc" in tensors and ("d_sae" in config or "sae_lens_version" in _metadata(config))


def _metadata(config: Config) -> Config:
    found = config.get("metadata") or config.get("meta") or {}
    return found if isinstance(found, dict) else {}


def _saelens(tensors: Mapping[str, Tensor], config: Config) -> Conventions:
    """Version 6 has what is known of the model under `metadata`, older ones at the top and under other names."""
    about = {**config, **_metadata(config)}
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    arguments = config.get("activation_fn_kwargs") or {}
    architecture = "topk" if function == "topk" else str(config.get("architecture", "standard"))
    if architecture not in _ARCHITECTURES or function not in ("relu", "topk"):
        raise InvalidPayload(f"the SAE is {architecture} with {function}, which this server does not compute",
                             param="file", fix=f"It takes {', '.join(_ARCHITECTURES)}, with relu.")
    if about.get("hook_head_index") is not None:
        raise InvalidPayload("the SAE is of a single head; this server takes those of all heads together", param="file")
    normalisation = config.get("normalize_activations") or "none"
    if normalisation is True:
        normalisation = "expected_average_only_in"
    if normalisation not in _NORMS:
        raise InvalidPayload(f"the SAE normalises by {str(normalisation)[:60]}", param="file", fix="Fold it into the "
                             f"weights with SAELens first; understood are {', '.join(_NORMS)}.")
    hook = about.get("hook_name", about.get("hook_point"))
    site, layer = place_of(str(hook)) if hook is not None else (None, None)
    scale = config.get("norm_scaling_factor") if normalisation == "expected_average_only_in" else 1.0
    return Conventions(
        "saelens", bool(config.get("apply_b_dec_to_input", True)), _ARCHITECTURES[architecture],
        config.get("k", arguments.get("k")), scale, _NORMS[normalisation],
        decoder_norms=architecture == "topk" and bool(config.get("rescale_acts_by_decoder_norm")), site=site,
        layer=layer, notes={"model_name": about.get("model_name"), "hook_name": hook, "architecture": architecture})


# Gemma Scope: no subtraction, and a threshold for each feature.

def _is_gemma(tensors: Mapping[str, Tensor], config: Config) -> bool:
    return "threshold" in tensors and tensors["threshold"].ndim == 1 and (
        "w_enc" in tensors or "W_enc" in tensors and not config or config.get("architecture") == "jump_relu")


def _gemma(tensors: Mapping[str, Tensor], config: Config) -> Conventions:
    hook = config.get("hf_hook_point_in")
    site, layer = place_of(str(hook)) if hook is not None else (None, None)
    return Conventions("gemma_scope", False, "jumprelu", site=site, layer=layer,
                       notes={"model_name": config.get("model_name"), "hook_name": hook})


# Llama Scope: activations are scaled to the root of the width on the average, and so is the threshold.

def _is_llama(tensors: Mapping[str, Tensor], config: Config) -> bool:
    return "encoder.weight" in tensors and "hook_point_in" in config


def _llama(tensors: Mapping[str, Tensor], config: Config) -> Conventions:
    hook, width = str(config["hook_point_in"]), len(tensors["decoder.bias"])
    site, layer = place_of(hook)
    scale, threshold = 1.0, config.get("jump_relu_threshold")
    norms = config.get("dataset_average_activation_norm")
    if isinstance(norms, dict) and norms.get("in"):
        scale = math.sqrt(width) / float(norms["in"])
    elif config.get("norm_activation") == "dataset-wise":
        scale = None  # type: ignore[assignment]
    if threshold is not None and scale is not None:
        threshold = float(threshold) * scale
    return Conventions("llama_scope", False, "jumprelu", scale=scale, threshold=threshold, site=site, layer=layer,
                       notes={"hook_name": hook, "dataset_average_activation_norm": norms})


# Qwen-Scope and others whose matrices have SAELens's names and no configuration.

def _is_bare(tensors: Mapping[str, Tensor], config: Config) -> bool:
    return "W_enc" in tensors and not config and "threshold" not in tensors


def _bare(tensors: Mapping[str, Tensor], config: Config) -> Conventions:
    return Conventions("bare", None)


# sparsify: subtracts, keeps k, and has its decoder as rows.

def _is_sparsify(tensors: Mapping[str, Tensor], config: Config) -> bool:
    return "encoder.weight" in tensors and "W_dec" in tensors


def _sparsify(tensors: Mapping[str, Tensor], config: Config) -> Conventions:
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        raise InvalidPayload(f"the SAE's activation is {str(config.get('activation', 'signed topk'))[:60]}, which this "
                             "server does not compute", param="file", fix="It takes topk of sparsify.")
    return Conventions("sparsify", True, "topk", config.get("k"))


# dictionary_learning.

def _is_dictionary_learning(tensors: Mapping[str, Tensor], config: Config) -> bool:
    names = set(tensors)
    return isinstance(config.get("trainer"), dict) or ("encoder.weight" in names and "decoder.weight" in names) or (
        "W_enc" in names and "threshold" in names and tensors["threshold"].ndim == 0)


_CLASSES = {"AutoEncoder": ("relu", True), "AutoEncoderNew": ("relu", False), "AutoEncoderTopK": ("topk", True),
            "BatchTopKSAE": ("jumprelu", True), "MatryoshkaBatchTopKSAE": ("jumprelu", True),
            "JumpReluAutoEncoder": ("jumprelu", False), "GatedAutoEncoder": ("relu", True)}


def _dictionary_learning(tensors: Mapping[str, Tensor], config: Config) -> Conventions:
    given = config.get("trainer")
    trainer: Config = given if isinstance(given, dict) else {}
    made = str(trainer.get("dict_class") or _class_by(tensors))
    if made not in _CLASSES:
        raise InvalidPayload(f"the SAE is a {made[:60]}, which this server does not compute", param="file",
                             fix=f"It takes {', '.join(_CLASSES)}.")
    activation, subtracted = _CLASSES[made]
    site, layer = _submodule(trainer)
    return Conventions("dictionary_learning", subtracted, activation, trainer.get("k"), site=site, layer=layer,
                       notes={"model_name": trainer.get("lm_name"), "dict_class": made})


def _class_by(tensors: Mapping[str, Tensor]) -> str:
    names = set(tensors)
    if {"gate_bias", "mag_bias"} & names:
        return "GatedAutoEncoder"
    if "decoder.bias" in names:
        return "AutoEncoderNew"
    if "threshold" in names:
        return "JumpReluAutoEncoder" if tensors["threshold"].ndim else "BatchTopKSAE"
    return "AutoEncoderTopK" if "k" in names else "AutoEncoder"


def _submodule(trainer: Config) -> tuple[Site | None, int | None]:
    layer, named = trainer.get("layer"), str(trainer.get("submodule_name") or "")
    match = re.fullmatch(r"(resid_post|resid_pre|mlp_out|attn_out)_layer_([0-9]{1,4})", named)
    if match is not None:
        return match[1], int(match[2])  # type: ignore[return-value]
    return None, layer if isinstance(layer, int) else None


# Goodfire: no subtraction.

def _is_goodfire(tensors: Mapping[str, Tensor], config: Config) -> bool:
    return "encoder_linear.weight" in tensors


def _goodfire(tensors: Mapping[str, Tensor], config: Config) -> Conventions:
    return Conventions("goodfire", False, "relu")


Layout = tuple[Callable[[Mapping[str, Tensor], Config], bool], Callable[[Mapping[str, Tensor], Config], Conventions]]
# The first that matches is taken.
LAYOUTS: tuple[Layout, ...] = (
    (_is_saelens, _saelens), (_is_goodfire, _goodfire), (_is_llama, _llama), (_is_sparsify, _sparsify),
    (_is_gemma, _gemma), (_is_dictionary_learning, _dictionary_learning), (_is_bare, _bare))


def overridden(found: Conventions, said: Mapping[str, Any]) -> Conventions:
    """With what the caller says, whose names are those of `SaeFields`."""
    names = {"subtract_decoder_bias": "subtracted", "input_norm": "norm"}
    return replace(found, **{names.get(name, name): value for name, value in said.items()})
