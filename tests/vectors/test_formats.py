import ast
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from transformers import LlamaConfig, LlamaForCausalLM

import vectors.formats.torch_pt
from steering.artifacts.payload import KINDS
from steering.language.errors import InvalidPayload, InvalidRequest, PayloadTooLarge
from tests.vectors.making import every_kind, metadata, same_numbers, vector_payload
from vectors import InvalidMetadata, Library, Limits
from vectors.formats import detect, formats, get_format
from vectors.formats.base import register
from vectors.formats.safetensors import Safetensors
from vectors.formats.torch_pt import read_pt


def write_gguf(path: Path, directions: dict[str, np.ndarray], architecture: str = "controlvector",
               **notes: object) -> Path:
    """A control vector as other programs write it, by the gguf package itself."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {"model_hint": "llama", "layer_count": len(directions), **notes}.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"controlvector.{key}", value)  # type: ignore[operator]
    for name, tensor in directions.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rows(count: int, width: int = 16) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    return {f"direction.{n + 1}": generator.standard_normal(width, dtype=np.float32) for n in range(count)}


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_round_trip(kind: str, library: Library) -> None:
    meta, payload = every_kind()[kind]
    data = get_format("safetensors").write(meta, payload)
    assert detect(data).name == "safetensors"
    read_meta, read_payload = detect(data).read(data, {}, Limits())
    assert read_meta == meta
    assert same_numbers(read_payload, payload)
    created = library.create(read_meta, read_payload)
    again = get_format("safetensors").write(created.metadata, library.payload(created))
    assert library.create(*detect(again).read(again, {}, Limits())).ref == created.ref


def test_safetensors_are_what_the_library_of_that_name_reads(tmp_path: Path) -> None:
    payload = vector_payload(1)
    path = tmp_path / "a.safetensors"
    path.write_bytes(get_format("safetensors").write(metadata(tags=["x"]), payload))
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["trimtab"])["tags"] == ["x"]
        assert sorted(file.keys()) == ["1.vector", "3.vector"]
        assert torch.equal(file.get_tensor("3.vector"), payload.layers[3]["vector"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
def test_files_of_other_makers_need_only_the_fields(dtype: torch.dtype) -> None:
    tensor = torch.tensor([1.0, -2.0, 3.0]).to(dtype)
    fields = {"name": "x", "kind": "vector", "op": "add", "site": "resid_pre"}
    meta, payload = Safetensors().read(save({"2.vector": tensor}), fields, Limits())
    assert (meta.name, meta.site) == ("x", "resid_pre")
    assert payload.layers[2]["vector"].tolist() == [1, -2, 3]


@pytest.mark.parametrize("name", ["safetensors", "gguf"])
def test_given_fields_win_over_the_file(name: str) -> None:
    data = get_format(name).write(metadata(tags=["old"], description="kept"), vector_payload(1))
    meta, _ = get_format(name).read(data, {"name": "renamed", "tags": ["new"]}, Limits())
    assert (meta.name, meta.tags, meta.description) == ("renamed", ("new",), "kept")
    with pytest.raises(InvalidMetadata) as caught:
        get_format(name).read(data, {"site": "nowhere"}, Limits())
    assert caught.value.param == "metadata.site"


@pytest.mark.parametrize("name", ["safetensors", "gguf"])
def test_layers_to_write_can_be_picked(name: str) -> None:
    meta, payload = metadata(layers=[1, 3, -1]), vector_payload(1, layers=(0, 1, 3))
    read, numbers = get_format(name).read(get_format(name).write(meta, payload, [1]), {}, Limits())
    assert (read.layers, list(numbers.layers)) == ([1, -1], [1])
    for wrong in ([], [2], [1, 9]):
        with pytest.raises(InvalidRequest) as caught:
            get_format(name).write(meta, payload, wrong)
        assert caught.value.param == "layers"


def test_gguf_values_are_those_that_the_gguf_package_reads(tmp_path: Path) -> None:
    directions = rows(5)
    directions["direction.4"] = directions["direction.4"].astype(np.float16)
    path = write_gguf(tmp_path / "v.gguf", directions, method="pca", strength=1.5)
    meta, payload = detect(path.read_bytes()).read(path.read_bytes(), {"name": "x"}, Limits())
    reference = gguf.GGUFReader(path)
    assert len(reference.tensors) == len(payload.layers) == 5
    for tensor in reference.tensors:
        number = int(tensor.name.split(".")[1])
        assert np.array_equal(payload.layers[number]["vector"].numpy(), tensor.data)
        assert np.array_equal(payload.layers[number]["vector"].numpy(), directions[tensor.name])
    assert (meta.kind, meta.op, meta.site, meta.model_id) == ("vector", "add", "resid_post", None)
    assert meta.provenance["method"] == "pca"
    assert meta.provenance["gguf"] == {"model_hint": "llama", "layer_count": 5, "method": "pca", "strength": 1.5}


def test_gguf_direction_n_acts_on_the_output_of_block_n(tmp_path: Path) -> None:
    """As repeng makes the files: `direction.N` is read at the output of block N, which is hidden_states[N + 1]."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
                                         num_attention_heads=2, num_key_value_heads=2)).eval()
    outputs: dict[int, torch.Tensor] = {}
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda module, args, out, number=number: outputs.__setitem__(
            number, (out[0] if isinstance(out, tuple) else out)[0, -1]))
    with torch.no_grad():
        states = model(torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states
    path = write_gguf(tmp_path / "v.gguf", {f"direction.{n}": states[n + 1][0, -1].numpy() for n in (1, 2)})
    meta, payload = get_format("gguf").read(path.read_bytes(), {"name": "x"}, Limits())
    assert meta.site == "resid_post"
    for layer, tensors in payload.layers.items():
        assert torch.equal(tensors["vector"], outputs[layer])


def test_gguf_layer_0_is_read_but_not_written(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "v.gguf", {f"direction.{n}": np.ones(4, np.float32) for n in (0, 1)})
    meta, payload = get_format("gguf").read(path.read_bytes(), {"name": "x"}, Limits())
    assert list(payload.layers) == [0, 1]
    with pytest.raises(InvalidRequest, match="layer 0"):
        get_format("gguf").write(meta, payload)
    assert list(get_format("gguf").read(get_format("gguf").write(meta, payload, [1]), {}, Limits())[1].layers) == [1]


def test_written_gguf_has_what_llama_cpp_asks_for(tmp_path: Path) -> None:
    payload = vector_payload(1, layers=(1, 2, 10))
    path = tmp_path / "v.gguf"
    path.write_bytes(get_format("gguf").write(metadata(model_id="lab-dense"), payload))
    reader = gguf.GGUFReader(path)
    fields = {key: reader.fields[key].contents() for key in (
        "general.architecture", "controlvector.model_hint", "controlvector.layer_count")}
    assert fields == {"general.architecture": "controlvector", "controlvector.model_hint": "lab-dense",
                      "controlvector.layer_count": 3}
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2", "direction.10"]
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(tensor.data, payload.layers[int(tensor.name[10:])]["vector"].numpy())


def test_gguf_round_trip_keeps_metadata_and_numbers() -> None:
    meta = metadata(model_id="m", fingerprint="f", residual_norm={1: 2.5}, strength={"value": 2, "unit": "rel"},
                    layers=[1], provenance={"report": {"auc": 0.9}})
    payload = vector_payload(4)
    read_meta, read_payload = get_format("gguf").read(get_format("gguf").write(meta, payload), {}, Limits())
    assert read_meta == meta
    assert same_numbers(read_payload, payload)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "vector"])
def test_gguf_holds_vectors_only(kind: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        get_format("gguf").write(*every_kind()[kind])
    assert caught.value.param == "format"


def test_gguf_holds_vectors_of_resid_post_only() -> None:
    with pytest.raises(InvalidRequest):
        get_format("gguf").write(metadata(site="resid_pre"), vector_payload(1))


def test_formats_are_registered_once_and_pickles_never() -> None:
    assert [known.name for known in formats()] == ["gguf", "npz", "safetensors"]
    with pytest.raises(ValueError, match="twice"):
        register(Safetensors)
    for name in ("pt", "torch_pt", "pickle", "../x", ""):
        with pytest.raises(InvalidRequest):
            get_format(name)
    root = Path(vectors.formats.torch_pt.__file__).parents[2]
    importers = [path for package in ("vectors", "server") for path in (root / package).rglob("*.py")
                 if path.name not in ("torch_pt.py", "cli.py") and "cli" not in path.parts and any(
                     "torch_pt" in ast.dump(node) for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, (ast.Import, ast.ImportFrom)))]
    assert importers == []


def test_files_over_the_limit_are_refused_unread() -> None:
    limits = Limits(payload_bytes=1000)
    for data in (b"GGUF" + bytes(2**21), (16).to_bytes(8, "little") + b"{" + bytes(2**21)):
        with pytest.raises(PayloadTooLarge):
            detect(data).read(data, {"name": "x"}, limits)


PT_FILES = {
    "by number": ({3: torch.ones(4), 5: torch.ones(4)}, {}, [3, 5]),
    "by text": ({"3": torch.ones(4), "layer_5": torch.ones(4), "layers.7": torch.ones(4)}, {}, [3, 5, 7]),
    "wrapped": ({"directions": {2: torch.ones(4)}, "note": 1}, {}, [2]),
    "wrapped rows": ({"vector": torch.ones(3, 4)}, {"first_layer": 0}, [0, 1, 2]),
    "rows": (torch.ones(3, 4), {"first_layer": 2}, [2, 3, 4]),
    "rows with embedding": (torch.arange(12.0).view(3, 4), {"first_layer": -1}, [0, 1]),
    "one": (torch.ones(4), {"first_layer": 6}, [6]),
    "one-row matrices": ({"1": torch.ones(1, 4)}, {}, [1]),
}


@pytest.mark.parametrize("case", PT_FILES)
def test_pt_dictionaries(tmp_path: Path, case: str) -> None:
    content, arguments, layers = PT_FILES[case]
    path = tmp_path / "v.pt"
    torch.save(content, path)
    meta, payload = read_pt(path, {"name": "x"}, Limits(), **arguments)
    assert list(payload.layers) == layers
    assert meta.provenance["source_file"] == "v.pt"
    assert all(tensors["vector"].shape == (4,) for tensors in payload.layers.values())
    if case == "rows with embedding":
        assert payload.layers[0]["vector"].tolist() == [4, 5, 6, 7]


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_pt_files_never_run_code(tmp_path: Path) -> None:
    torch.save({"3": Malice(tmp_path / "pwned")}, tmp_path / "v.pt")
    with pytest.raises(InvalidPayload):
        read_pt(tmp_path / "v.pt", {"name": "x"}, Limits())
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [{}, [], {"a": torch.ones(4)}, {"1": "text"}, {1: torch.zeros(4)},
                                     {"1": torch.tensor([1.0, float("nan")])}, torch.ones(2, 2, 2),
                                     {"layer_x": torch.ones(2)}, 5, None])
def test_pt_files_that_make_no_vector(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(InvalidPayload):
        read_pt(tmp_path / "v.pt", {"name": "x"}, Limits())


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02}q\x00.", b"rubbish" * 100])
def test_pt_files_that_are_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "v.pt").write_bytes(data)
    with pytest.raises(InvalidPayload):
        read_pt(tmp_path / "v.pt", {"name": "x"}, Limits())


def test_pt_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest):
        read_pt(tmp_path / "none.pt", {"name": "x"}, Limits())
