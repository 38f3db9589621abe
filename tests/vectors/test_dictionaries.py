"""SAEs as seven programs write them, against what each computes, written down here from their code.

Parity with the package sae-lens itself is in `test_saelens.py`.
"""

import io
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from steering.artifacts.dictionary import Dictionary
from steering.language.errors import InvalidPayload, InvalidRequest, PayloadTooLarge, TrimtabError
from vectors import InvalidMetadata, Limits
from vectors.formats import detect, get_format
from vectors.formats.dictionaries.hooks import place_in_path, place_of

D, M, K, T = 16, 40, 5, 12
Array = np.ndarray
PLACE = {"name": "x", "site": "resid_post", "layers": [3]}


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


G = rng(1)
X = G.normal(size=(T, D)) * 2 + 0.5
ENC, DEC = G.normal(size=(D, M)) / 4, G.normal(size=(M, D))
B_ENC, B_DEC = G.normal(size=M) * 0.3, G.normal(size=D)
THRESHOLD = G.uniform(0.1, 0.8, size=M)
R_MAG, B_GATE, B_MAG = G.normal(size=M) * 0.3, G.normal(size=M) * 0.3, G.normal(size=M) * 0.3
SAELENS = {"d_in": D, "d_sae": M, "metadata": {"hook_name": "blocks.3.hook_resid_post", "sae_lens_version": "6.5.0"}}
SAELENS_TENSORS = {"W_enc": ENC, "W_dec": DEC, "b_enc": B_ENC, "b_dec": B_DEC}
LINEAR = {"encoder.weight": ENC.T, "encoder.bias": B_ENC, "decoder.weight": DEC.T}


def relu(pre: Array) -> Array:
    return np.maximum(pre, 0)


def above(threshold: Any) -> Callable[[Array], Array]:
    return lambda pre: relu(pre) * (pre > threshold)


def largest(pre: Array) -> Array:
    out = np.zeros_like(pre)
    for row, kept in zip(pre, out, strict=True):
        index = np.argsort(-row)[:K]
        kept[index] = relu(row[index])
    return out


def computed(act: Callable[[Array], Array], subtract: bool, scale: float = 1.0) -> tuple[Array, Array]:
    """Features of X and what is decoded from them."""
    features = act((X * scale - subtract * B_DEC) @ ENC + B_ENC)
    return features, (features @ DEC + B_DEC) / scale


def with_norms() -> tuple[Array, Array]:
    norms = np.linalg.norm(DEC, axis=1)
    features = largest(((X - B_DEC) @ ENC + B_ENC) * norms)
    return features, features / norms @ DEC + B_DEC


def gated() -> tuple[Array, Array]:
    e = (X - B_DEC) @ ENC
    features = relu(e * np.exp(R_MAG) + B_MAG) * (e + B_GATE > 0)
    return features, features @ DEC + B_DEC


def constant() -> tuple[Array, Array]:
    factor = math.sqrt(D) / np.linalg.norm(X, axis=1, keepdims=True)
    features = relu((X * factor - B_DEC) @ ENC + B_ENC)
    return features, (features @ DEC + B_DEC) / factor


def layered() -> tuple[Array, Array]:
    mean = X.mean(1, keepdims=True)
    deviation = (X - mean).std(1, ddof=1, keepdims=True)
    features = relu(((X - mean) / (deviation + 1e-5) - B_DEC) @ ENC + B_ENC)
    return features, (features @ DEC + B_DEC) * deviation + mean


DENSE_NORM = 11.0
LLAMA = {"hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post",
         "jump_relu_threshold": 0.4, "dataset_average_activation_norm": {"in": DENSE_NORM, "out": DENSE_NORM}}
SCALE = math.sqrt(D) / DENSE_NORM
TRAINER = {"layer": 3, "submodule_name": "resid_post_layer_3", "lm_name": "EleutherAI/pythia-70m"}

# name -> tensors as the program writes them, the JSON beside them, what it computes, and the layout's name.
Written = tuple[dict[str, Array], dict[str, Any], tuple[Array, Array], str]
FILES: dict[str, Written] = {
    "saelens 6": (SAELENS_TENSORS, {**SAELENS, "architecture": "standard"}, computed(relu, True), "saelens"),
    "saelens 6 without subtraction": (SAELENS_TENSORS, {**SAELENS, "apply_b_dec_to_input": False},
                                      computed(relu, False), "saelens"),
    "saelens topk": (SAELENS_TENSORS, {**SAELENS, "architecture": "topk", "k": K}, computed(largest, True), "saelens"),
    "saelens topk by decoder norms": (
        SAELENS_TENSORS, {**SAELENS, "architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
        with_norms(), "saelens"),
    "saelens jumprelu": ({**SAELENS_TENSORS, "threshold": THRESHOLD}, {**SAELENS, "architecture": "jumprelu"},
                         computed(above(THRESHOLD), True), "saelens"),
    "saelens gated": ({"W_enc": ENC, "W_dec": DEC, "b_dec": B_DEC, "r_mag": R_MAG, "b_gate": B_GATE, "b_mag": B_MAG},
                      {**SAELENS, "architecture": "gated"}, gated(), "saelens"),
    "saelens constant norm": (SAELENS_TENSORS, {**SAELENS, "normalize_activations": "constant_norm_rescale"},
                              constant(), "saelens"),
    "saelens layer norm": (SAELENS_TENSORS, {**SAELENS, "normalize_activations": "layer_norm"}, layered(), "saelens"),
    "saelens average norm": (SAELENS_TENSORS, {**SAELENS, "normalize_activations": "expected_average_only_in",
                                               "norm_scaling_factor": 0.3}, computed(relu, True, 0.3), "saelens"),
    "saelens 3": (SAELENS_TENSORS, {"d_in": D, "d_sae": M, "hook_point": "blocks.3.hook_resid_post",
                                    "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K},
                                    "normalize_activations": False}, computed(largest, True), "saelens"),
    "gemma scope 1": ({**SAELENS_TENSORS, "threshold": THRESHOLD}, {}, computed(above(THRESHOLD), False),
                      "gemma_scope"),
    "gemma scope 2": ({"w_enc": ENC, "w_dec": DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD},
                      {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.3.output",
                       "model_name": "google/gemma-3-1b-pt"}, computed(above(THRESHOLD), False), "gemma_scope"),
    "llama scope": ({**LINEAR, "decoder.bias": B_DEC}, LLAMA, computed(above(0.4 * SCALE), False, SCALE),
                    "llama_scope"),
    "llama scope r1": ({**LINEAR, "decoder.bias": B_DEC, "log_jumprelu_threshold": np.log(THRESHOLD)},
                       {"hook_point_in": "blocks.3.hook_resid_post"}, computed(above(THRESHOLD), False),
                       "llama_scope"),
    "qwen scope": ({"W_enc": ENC.T, "W_dec": DEC.T, "b_enc": B_ENC, "b_dec": B_DEC}, {}, computed(largest, False),
                   "bare"),
    "sparsify": ({"encoder.weight": ENC.T, "encoder.bias": B_ENC, "W_dec": DEC, "b_dec": B_DEC},
                 {"k": K, "d_in": D, "expansion_factor": 2}, computed(largest, True), "sparsify"),
    "dictionary_learning relu": ({**LINEAR, "bias": B_DEC}, {"trainer": {**TRAINER, "dict_class": "AutoEncoder"}},
                                 computed(relu, True), "dictionary_learning"),
    "dictionary_learning april": ({**LINEAR, "decoder.bias": B_DEC},
                                  {"trainer": {**TRAINER, "dict_class": "AutoEncoderNew"}}, computed(relu, False),
                                  "dictionary_learning"),
    "dictionary_learning topk": ({**LINEAR, "b_dec": B_DEC, "k": np.asarray(K), "threshold": np.asarray(0.1)},
                                 {"trainer": {**TRAINER, "dict_class": "AutoEncoderTopK", "k": K}},
                                 computed(largest, True), "dictionary_learning"),
    "dictionary_learning batchtopk": ({**LINEAR, "b_dec": B_DEC, "k": np.asarray(K), "threshold": np.asarray(0.25)},
                                      {"trainer": {**TRAINER, "dict_class": "BatchTopKSAE", "k": K}},
                                      computed(above(0.25), True), "dictionary_learning"),
    "dictionary_learning jumprelu": ({**SAELENS_TENSORS, "threshold": THRESHOLD},
                                     {"trainer": {**TRAINER, "dict_class": "JumpReluAutoEncoder"}},
                                     computed(above(THRESHOLD), False), "dictionary_learning"),
    "dictionary_learning gated": (
        {"encoder.weight": ENC.T, "decoder.weight": DEC.T, "decoder_bias": B_DEC, "r_mag": R_MAG, "gate_bias": B_GATE,
         "mag_bias": B_MAG}, {"trainer": {**TRAINER, "dict_class": "GatedAutoEncoder"}}, gated(),
        "dictionary_learning"),
    "goodfire": ({"encoder_linear.weight": ENC.T, "encoder_linear.bias": B_ENC, "decoder_linear.weight": DEC.T,
                  "decoder_linear.bias": B_DEC}, {}, computed(relu, False), "goodfire"),
}
SAID = {"qwen scope": {"subtract_decoder_bias": False, "activation": "topk", "k": K}}
FORMATS = [("safetensors", name) for name in FILES] + [("npz", name) for name in ("gemma scope 1", "saelens topk")]


def file_of(format: str, tensors: dict[str, Array]) -> bytes:
    if format == "safetensors":
        return save({name: torch.from_numpy(np.ascontiguousarray(array.astype(
            np.int64 if array.dtype.kind == "i" else np.float32))).reshape(array.shape)
            for name, array in tensors.items()})
    held = io.BytesIO()
    np.savez(held, **{name: array.astype(np.float32) for name, array in tensors.items()})
    return held.getvalue()


def read(data: bytes, fields: dict[str, Any]) -> tuple[Any, Any]:
    return detect(data).read(data, fields, Limits())


@pytest.mark.parametrize(("format", "name"), FORMATS)
def test_what_is_read_computes_what_its_maker_computes(format: str, name: str) -> None:
    tensors, config, (features, decoded), layout = FILES[name]
    fields = {**PLACE, "sae": {"config": config, **SAID.get(name, {})}}
    metadata, payload = read(file_of(format, tensors), fields)
    assert (metadata.kind, metadata.op, metadata.site, metadata.layers) == ("sae", "sae", "resid_post", [3])
    assert metadata.provenance["source_format"] == layout
    found, x = Dictionary(payload.layers[3]), torch.tensor(X, dtype=torch.float32)
    assert 1 < np.count_nonzero(features, axis=1).mean() < M, "the case has no sparsity to get wrong"
    np.testing.assert_allclose(found.features(x).numpy(), features, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.reconstruction(x).numpy(), decoded, rtol=1e-5, atol=1e-5)
    for i in (0, 7, 31):
        np.testing.assert_allclose(found.feature(x, i).numpy(), features[:, i], rtol=1e-5, atol=1e-5)
    again = read(get_format("safetensors").write(metadata, payload), {})
    assert again[0] == metadata, "what is read once is stored in the house's own form"


@pytest.mark.parametrize("name", ["saelens 6", "saelens 3", "gemma scope 2", "llama scope", "dictionary_learning relu"])
def test_files_that_say_where_they_are_of_need_no_more(name: str) -> None:
    tensors, config, _, _ = FILES[name]
    metadata, payload = read(file_of("safetensors", tensors), {"name": "x", "sae": {"config": config}})
    assert (metadata.site, list(payload.layers)) == ("resid_post", [3])


@pytest.mark.parametrize(("hook", "place"), [
    ("blocks.8.hook_resid_pre", ("resid_pre", 8)), ("blocks.0.attn.hook_z", ("head_out", 0)),
    ("blocks.2.hook_mlp_out", ("mlp_out", 2)), ("blocks.2.mlp.hook_post", ("mlp_act", 2)),
    ("model.layers.7.output", ("resid_post", 7)), ("layers.7", ("resid_post", 7)), ("layers.7.mlp", ("mlp_out", 7)),
    ("model.layers.5.self_attn.o_proj.input", ("head_out", 5)), ("transformer.h.3", ("resid_post", 3)),
    ("model.layers.5.post_feedforward_layernorm.output", ("mlp_out", 5))])
def test_places_by_other_names(hook: str, place: tuple[str, int]) -> None:
    assert place_of(hook) == place


@pytest.mark.parametrize("hook", ["blocks.3.hook_resid_mid", "hook_embed", "blocks.3.ln1.hook_normalized", "nowhere"])
def test_a_place_that_is_no_site_is_named(hook: str) -> None:
    with pytest.raises(InvalidPayload, match="no site"):
        place_of(hook)


@pytest.mark.parametrize(("path", "place"), [
    ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz", ("resid_post", 20)),
    ("gemma-scope-2b-pt-att/layer_3/width_16k/params.npz", ("head_out", 3)),
    ("resid_post/layer_12_width_16k_l0_medium/params.safetensors", ("resid_post", 12)),
    ("attn_out/layer_12_width_16k_l0_medium/params.safetensors", ("head_out", 12)),
    ("resid_post_layer_4/trainer_2/ae.pt", ("resid_post", 4)), ("SAE-Res-Qwen3-1.7B/layer9.sae.pt", ("resid_post", 9)),
    ("Llama-3.1-8B-Instruct-SAE-l19.pth", (None, 19)), ("layers.11/sae.safetensors", (None, 11)),
    ("all/sae.safetensors", (None, None))])
def test_places_in_paths(path: str, place: tuple[Any, Any]) -> None:
    assert place_in_path(tuple(path.split("/"))) == place


REFUSED: dict[str, tuple[dict[str, Array], dict[str, Any], str]] = {
    "transcoder": ({**SAELENS_TENSORS, "W_skip": ENC @ DEC}, SAELENS, "transcoder"),
    "transcoder by its places": (SAELENS_TENSORS, {**SAELENS, "hook_name_out": "blocks.3.hook_mlp_out"}, "transcoder"),
    "sparsify transcoder": ({"encoder.weight": ENC.T, "encoder.bias": B_ENC, "W_dec": DEC, "b_dec": B_DEC},
                            {"k": 5, "transcode": True}, "transcoder"),
    "no scale": (SAELENS_TENSORS, {**SAELENS, "normalize_activations": "expected_average_only_in"}, "scale"),
    "whitened": (SAELENS_TENSORS, {**SAELENS, "normalize_activations": "covariance_whitening"}, "whitening"),
    "tanh": (SAELENS_TENSORS, {**SAELENS, "activation_fn_str": "tanh-relu"}, "tanh-relu"),
    "one head": (SAELENS_TENSORS, {**SAELENS, "hook_head_index": 3}, "single head"),
    "temporal": (SAELENS_TENSORS, {**SAELENS, "architecture": "temporal"}, "temporal"),
    "no threshold": (SAELENS_TENSORS, {**SAELENS, "architecture": "jumprelu"}, "threshold"),
    "no k": (SAELENS_TENSORS, {**SAELENS, "architecture": "topk"}, "its k"),
    "nothing said": (SAELENS_TENSORS, {}, "activation"),
    "unknown tensor": ({**SAELENS_TENSORS, "W_more": DEC}, SAELENS, "W_more"),
    "no decoder bias": ({"W_enc": ENC, "W_dec": DEC, "b_enc": B_ENC}, SAELENS, "decoder bias"),
    "shapes": ({**SAELENS_TENSORS, "W_dec": DEC[:-1]}, SAELENS, "features"),
    "another width": ({**SAELENS_TENSORS, "W_dec": DEC[:, :-1]}, SAELENS, "wide"),
    "not finite": ({**SAELENS_TENSORS, "b_dec": np.full(D, np.nan)}, SAELENS, "finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_by_name(name: str) -> None:
    tensors, config, words = REFUSED[name]
    with pytest.raises(InvalidPayload, match=words):
        read(file_of("safetensors", tensors), {**PLACE, "sae": {"config": config}})


def test_nothing_is_guessed_of_the_place() -> None:
    tensors, config, _, _ = FILES["gemma scope 1"]
    for fields, param in (({"site": "resid_post"}, "metadata.layers"), ({"layers": [3]}, "metadata.site")):
        with pytest.raises(InvalidPayload) as caught:
            read(file_of("npz", tensors), {"name": "x", **fields})
        assert caught.value.path[-1] == param.rpartition(".")[2]
    with pytest.raises(InvalidRequest):
        read(file_of("npz", tensors), {**PLACE, "layers": [3, 4]})


def test_fields_beside_the_file_are_checked() -> None:
    tensors = FILES["gemma scope 1"][0]
    for wrong in ({"nonsense": 1}, {"scale": 0.0}, {"k": -1}, {"activation": "gelu"}, {"texts": []}, []):
        with pytest.raises(InvalidMetadata):
            read(file_of("npz", tensors), {**PLACE, "sae": wrong})


def test_too_large_for_the_library() -> None:
    data = file_of("npz", FILES["gemma scope 1"][0])
    with pytest.raises(PayloadTooLarge):
        detect(data).read(data, PLACE, Limits(payload_bytes=4 * M * D))


@pytest.mark.parametrize("cut", [4, 30, 200, -10])
def test_damaged_npz(cut: int) -> None:
    data = file_of("npz", FILES["gemma scope 1"][0])
    with pytest.raises(InvalidPayload):
        read(data[:cut], PLACE)


def test_npz_of_objects_is_not_unpickled() -> None:
    held = io.BytesIO()
    np.savez(held, W_enc=np.array([{"a": 1}, print], dtype=object), b_dec=B_DEC)
    with pytest.raises(InvalidPayload, match="malformed npz"):
        read(held.getvalue(), PLACE)


def test_a_file_of_torch_is_no_npz() -> None:
    held = io.BytesIO()
    torch.save({name: torch.tensor(array) for name, array in SAELENS_TENSORS.items()}, held)
    with pytest.raises(TrimtabError):
        read(held.getvalue(), {**PLACE, "sae": {"config": json.loads(json.dumps(SAELENS))}})


def test_npz_that_unpacks_to_more_than_is_taken() -> None:
    held = io.BytesIO()
    np.savez_compressed(held, W_enc=np.zeros((600, 600)))
    assert len(held.getvalue()) < 4000
    with pytest.raises(PayloadTooLarge):
        detect(held.getvalue()).read(held.getvalue(), PLACE, Limits(payload_bytes=1024))
