"""`.pt` files as their makers leave them: the layer is read where it is said, and never made up."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter

from steering.artifacts.payload import Payload
from steering.language.errors import InvalidPayload
from vectors.artifact import Limits, Metadata
from vectors.formats import detect
from vectors.formats.torch_pt import read_pt

V = torch.tensor([1.0, 2.0, 3.0, 4.0])


def read(folder: Path, name: str, content: Any, **arguments: Any) -> tuple[Metadata, Payload]:
    torch.save(content, folder / name)
    return read_pt(folder / name, {"name": "x"}, Limits(), **arguments)


@pytest.mark.parametrize("name", ["task_vector_layer-10.pt", "layer_10.pt", "happy.L10.pt", "resid_post_layer_10.pt",
                                  "caa-l10-v2.pt", "blk.10.pt", "Layer 10.pt", "layer10.pt"])
def test_the_name_says_the_layer(tmp_path: Path, name: str) -> None:
    metadata, payload = read(tmp_path, name, V)
    assert list(payload.layers) == [10] and torch.equal(payload.layers[10]["vector"], V)
    assert metadata.provenance["layers_from"] == "the file's name" and metadata.site == "resid_post"


@pytest.mark.parametrize("name", ["v.pt", "v-10.pt", "llama-3-8b.pt", "xl2.pt", "l2norm.pt", "qwen2.5-7b.pt",
                                  "layer-x.pt", "player10.pt"])
def test_a_name_that_says_none_is_refused_with_the_option(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidPayload, match="nothing says its layer") as caught:
        read(tmp_path, name, V)
    assert caught.value.param == "--first-layer" and "--first-layer N" in str(caught.value.fix)
    metadata, payload = read(tmp_path, name, V, first_layer=3)
    assert list(payload.layers) == [3] and metadata.provenance["layers_from"] == "the option --first-layer"


@pytest.mark.parametrize(("content", "layers", "strength"), [
    ({"layer": 15, "vector": V, "coeff": 3.0}, [15], 3.0),
    ({"layer_idx": torch.tensor([15]), "direction": V.view(1, 4), "alpha": 2}, [15], 2.0),
    ({"layers": [15, 20], "vectors": torch.stack([V, V]), "coeff": -1.5}, [15, 20], -1.5),
    ({"layers": [15, 20], "vectors": [V, V]}, [15, 20], 1.0),
    ({"layer_activations": {15: V}, "layer_type": "decoder_block"}, [15], 1.0)])
def test_the_file_says_the_layer_and_the_strength(tmp_path: Path, content: Any, layers: Sequence[int], strength: float
                                                  ) -> None:
    metadata, payload = read(tmp_path, "v.pt", content)
    assert list(payload.layers) == layers and metadata.strength.value == strength
    assert all(torch.equal(tensors["vector"], V) for tensors in payload.layers.values())
    assert metadata.provenance["layers_from"] == "the file"


def test_fields_that_are_given_win(tmp_path: Path) -> None:
    torch.save({"layer": 15, "vector": V, "coeff": 3.0}, tmp_path / "v.pt")
    metadata, payload = read_pt(tmp_path / "v.pt", {"name": "x", "site": "mlp_out", "strength": {"value": 0.5}},
                                Limits(), first_layer=2)
    assert (list(payload.layers), metadata.site, metadata.strength.value) == ([2], "mlp_out", 0.5)


@pytest.mark.parametrize(("beside", "told", "site"), [
    ("v.json", {"layer": 12}, "resid_post"), ("v_metadata.json", {"pos": -1, "layer": 12}, "resid_pre"),
    ("v.pt.json", {"layer_index": 12, "method": "pca"}, "resid_post")])
def test_a_json_beside_it_says_the_layer(tmp_path: Path, beside: str, told: Any, site: str) -> None:
    (tmp_path / beside).write_text(json.dumps(told))
    metadata, payload = read(tmp_path, "v.pt", V)
    assert (list(payload.layers), metadata.site) == ([12], site)
    assert metadata.provenance["layers_from"] == beside


@pytest.mark.parametrize(("name", "content", "complaint"), [
    ("layer-9.pt", {"layer": 15, "vector": V}, "the file says layer 15 and the file's name says layer 9"),
    ("layer-9-of-layer-10.pt", V, "more than one layer: 9, 10"),
    ("v.pt", torch.stack([V, V, V]), "holds 3 rows and does not say which layer"),
    ("layer-9.pt", torch.stack([V, V, V]), "holds 3 rows and does not say which layer"),
    ("v.pt", {"layers": [1, 2], "vectors": torch.stack([V, V, V])}, "names 2 layers for 3 rows"),
    ("v.pt", {"layer": 15, "vectors": torch.stack([V, V])}, "says layer 15 for 2 rows"),
    ("v.pt", {"layer_activations": {1: V}, "layer_type": "embedding"}, "layer_type is 'embedding'"),
    ("v.pt", {"layer_1": V, "1": V}, "layer 1 is there twice"),
    ("v.pt", {"layer": 3, "vector": "text"}, "no tensor where the vectors should be")])
def test_what_is_unclear_is_refused(tmp_path: Path, name: str, content: Any, complaint: str) -> None:
    with pytest.raises(InvalidPayload, match=complaint):
        read(tmp_path, name, content)


def test_a_json_beside_it_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text("{")
    with pytest.raises(InvalidPayload, match="v.json beside the file"):
        read(tmp_path, "v.pt", V)


class Anything:
    pass


@pytest.mark.parametrize(("content", "complaint"), [
    ({"layer": 1, "vector": Anything()}, r"holds a Python object \(\S*Anything\)"),
    ({"layer": 1, "vector": V.numpy()}, r"holds a Python object \(numpy\S*\)")])
def test_pickles_of_objects_are_one_clean_sentence(tmp_path: Path, content: Any, complaint: str) -> None:
    with pytest.raises(InvalidPayload, match=complaint) as caught:
        read(tmp_path, "v.pt", content)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 and "torch.save" in str(caught.value.fix)


def test_rows_of_rounding_noise_are_left_out_and_named(tmp_path: Path) -> None:
    metadata, payload = read(tmp_path, "v.pt", torch.stack([1e-14 * V, V, 0 * V, 2 * V]), first_layer=0)
    assert list(payload.layers) == [1, 3] and metadata.provenance["left_out_layers"] == [0, 2]
    _, small = read(tmp_path, "v.pt", torch.stack([1e-4 * V, V]), first_layer=0)
    assert list(small.layers) == [0, 1]
    with pytest.raises(InvalidPayload, match="rounding noise"):
        read(tmp_path, "layer_1.pt", 1e-14 * V)


def test_the_same_in_a_gguf_file(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "v.gguf", "controlvector")
    for layer, vector in ((1, 1e-14 * V), (2, V)):
        writer.add_tensor(f"direction.{layer}", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = (tmp_path / "v.gguf").read_bytes()
    metadata, payload = detect(data).read(data, {"name": "x"}, Limits())
    assert list(payload.layers) == [2] and metadata.provenance["left_out_layers"] == [1]
