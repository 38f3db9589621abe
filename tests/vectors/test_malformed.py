"""Broken and hostile files: each is refused as an InvalidPayload, and nothing else comes out."""

import json
import struct
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from server.errors import status_of
from steering.artifacts.payload import Payload
from steering.language.errors import InvalidPayload
from tests.vectors.making import metadata, vector_payload
from vectors import Limits
from vectors.checks import check
from vectors.formats import detect, get_format

FIELDS = {"name": "x", "kind": "vector", "op": "add", "site": "resid_post"}
GOOD = {name: get_format(name).write(metadata(), vector_payload(1)) for name in ("safetensors", "gguf")}


def header(entries: object, data: bytes = bytes(32)) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: object = "F32", shape: object = (8,), offsets: object = (0, 32)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS: dict[str, bytes] = {
    "one byte": b"{",
    "length only": struct.pack("<Q", 2),
    "length past the end": struct.pack("<Q", 2**63) + b"{}",
    "length of everything": b"\xff" * 8 + b"{}",
    "cut in the header": GOOD["safetensors"][:40],
    "cut in the numbers": GOOD["safetensors"][:-1],
    "one byte too many": GOOD["safetensors"] + b"\0",
    "no JSON": header(b"{nonsense"),
    "not UTF-8": header(b'{"\xff": 1}'),
    "NaN in JSON": header(b'{"1.vector": NaN}'),
    "a list": header([]),
    "a number": header(1),
    "no tensors": header({}, b""),
    "JSON of depth 100000": header(b'{"a":' * 100_000),
    "header of 2 MiB": header(b"{" + b" " * 2**21 + b"}"),
    "10000 tensors": header({f"{n}.vector": entry() for n in range(8000)}),
    "entry is no object": header({"1.vector": 5}),
    "entry without type": header({"1.vector": {"shape": [8], "data_offsets": [0, 32]}}),
    "unknown type": header({"1.vector": entry("F1024")}),
    "type is a list": header({"1.vector": entry(["F32"])}),
    "boolean tensor": header({"1.vector": entry("BOOL", (32,))}),
    "8-bit float": header({"1.vector": entry("F8_E4M3", (32,))}),
    "negative shape": header({"1.vector": entry(shape=(-8,))}),
    "huge shape": header({"1.vector": entry(shape=(2**62, 2**62))}),
    "shape and bytes differ": header({"1.vector": entry(shape=(9,))}),
    "shape is text": header({"1.vector": entry(shape="8")}),
    "offsets backwards": header({"1.vector": entry(offsets=(32, 0))}),
    "offsets past the end": header({"1.vector": entry(offsets=(0, 64), shape=(16,))}),
    "offsets huge": header({"1.vector": entry(offsets=(2**64, 2**65))}),
    "tensors overlap": header({"1.vector": entry(), "2.vector": entry()}),
    "a hole between tensors": header({"1.vector": entry(offsets=(0, 16), shape=(4,)),
                                      "2.vector": entry(offsets=(20, 32), shape=(3,))}),
    "name without layer": header({"vector": entry()}),
    "negative layer": header({"-1.vector": entry()}),
    "huge layer": header({"99999999999999999999.vector": entry()}),
    "layer in other digits": header({"१.vector": entry()}),
    "unknown tensor name": header({"1.nonsense": entry()}),
    "path as a name": header({"../../etc/passwd": entry()}),
    "metadata is text": header({"__metadata__": "x", "1.vector": entry()}),
    "our metadata is no JSON": header({"__metadata__": {"trimtab": "{"}, "1.vector": entry()}),
    "our metadata is a list": header({"__metadata__": {"trimtab": "[]"}, "1.vector": entry()}),
    "our metadata is a number": header({"__metadata__": {"trimtab": 5}, "1.vector": entry()}),
    "our metadata has unknown fields": header({"__metadata__": {"trimtab": '{"evil": 1}'}, "1.vector": entry()}),
    "our metadata is deep": header({"__metadata__": {"trimtab": '{"card":' + '{"a":' * 5000 + "1" + "}" * 5001},
                                    "1.vector": entry()}),
    "NaN": save({"1.vector": torch.tensor([1.0, float("nan")])}),
    "infinity": save({"1.vector": torch.tensor([1.0, float("inf")])}),
    "too large for 32 bits": save({"1.vector": torch.tensor([1e300], dtype=torch.float64)}),
    "zero vector": save({"1.vector": torch.zeros(3)}),
    "empty vector": save({"1.vector": torch.zeros(0)}),
    "matrix": save({"1.vector": torch.ones(3, 3)}),
    "pickle": b"\x80\x04\x95{" + bytes(40),
}


def gguf_file(tensors: bytes = b"", notes: bytes | None = None, num_tensors: int = 0, num_notes: int = 1,
              version: int = 3, data: bytes = bytes(64)) -> bytes:
    notes = note("general.architecture", 8, text("controlvector")) if notes is None else notes
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_notes) + notes + tensors
    return head + bytes(-len(head) % 32) + data


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def note(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str = "direction.1", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCHITECTURE = note("general.architecture", 8, text("controlvector"))
GGUF: dict[str, bytes] = {
    "magic only": b"GGUF",
    "counts cut off": GOOD["gguf"][:20],
    "cut in the notes": GOOD["gguf"][:60],
    "cut in the tensors": GOOD["gguf"][:-40],
    "version 0": gguf_file(version=0),
    "version 1": gguf_file(version=1),
    "version 99": gguf_file(version=99),
    "a model": gguf_file(notes=note("general.architecture", 8, text("llama"))),
    "no architecture": gguf_file(notes=note("general.name", 8, text("x"))),
    "architecture is a number": gguf_file(notes=note("general.architecture", 4, struct.pack("<I", 1))),
    "no tensors": gguf_file(),
    "tensor count past the end": gguf_file(num_tensors=2**63),
    "note count past the end": gguf_file(num_notes=2**64 - 1),
    "string past the end": gguf_file(notes=struct.pack("<Q", 2**62) + b"x"),
    "string longer than memory": gguf_file(notes=note("a", 8, struct.pack("<Q", 2**64 - 1))),
    "key is not UTF-8": gguf_file(notes=struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<I", 4) + bytes(4)),
    "value is not UTF-8": gguf_file(notes=ARCHITECTURE + text("controlvector.method") + struct.pack("<IQ", 8, 2)
                                    + b"\xff\xfe", num_notes=2),
    "duplicate key": gguf_file(notes=ARCHITECTURE * 2, num_notes=2),
    "unknown type of note": gguf_file(notes=note("a", 77, bytes(8))),
    "endless array": gguf_file(notes=note("a", 9, struct.pack("<IQ", 0, 2**62))),
    "array of a million": gguf_file(notes=note("a", 9, struct.pack("<IQ", 0, 10**6) + bytes(10**6))),
    "arrays nested 5000 deep": gguf_file(notes=note("a", 9, struct.pack("<IQ", 9, 1) * 5000)),
    "alignment 0": gguf_file(notes=ARCHITECTURE + note("general.alignment", 4, struct.pack("<I", 0)), num_notes=2),
    "alignment 3": gguf_file(notes=ARCHITECTURE + note("general.alignment", 4, struct.pack("<I", 3)), num_notes=2),
    "alignment is text": gguf_file(notes=ARCHITECTURE + note("general.alignment", 8, text("32")), num_notes=2),
    "other tensor name": gguf_file(tensor("token_embd.weight"), num_tensors=1),
    "negative layer": gguf_file(tensor("direction.-1"), num_tensors=1),
    "layer in words": gguf_file(tensor("direction.one"), num_tensors=1),
    "layer with zeros before it": gguf_file(tensor("direction.01"), num_tensors=1),
    "huge layer": gguf_file(tensor("direction.99999999999"), num_tensors=1),
    "duplicate tensor": gguf_file(tensor() + tensor(), num_tensors=2),
    "matrix": gguf_file(tensor(dims=(2, 4)), num_tensors=1),
    "no axes": gguf_file(tensor(dims=()), num_tensors=1),
    "a thousand axes": gguf_file(tensor(dims=(1,) * 1000), num_tensors=1),
    "axis count past the end": gguf_file(text("direction.1") + struct.pack("<I", 2**32 - 1), num_tensors=1),
    "axes whose product overflows": gguf_file(tensor(dims=(2**63, 2)), num_tensors=1),
    "huge axis": gguf_file(tensor(dims=(2**60,)), num_tensors=1),
    "empty tensor": gguf_file(tensor(dims=(0,)), num_tensors=1),
    "quantised": gguf_file(tensor(dims=(32,), kind=2), num_tensors=1),
    "64-bit": gguf_file(tensor(kind=28), num_tensors=1),
    "integers": gguf_file(tensor(kind=26), num_tensors=1),
    "unknown tensor type": gguf_file(tensor(kind=9999), num_tensors=1),
    "offset past the end": gguf_file(tensor(offset=2**20), num_tensors=1),
    "offset that overflows": gguf_file(tensor(offset=2**64 - 1), num_tensors=1),
    "widths differ": gguf_file(tensor() + tensor("direction.2", (4,), offset=32), num_tensors=2, data=b"\1" * 64),
    "zero vector": gguf_file(tensor(), num_tensors=1),
    "NaN": gguf_file(tensor(), num_tensors=1, data=b"\xff" * 64),
    "our metadata is no JSON": gguf_file(tensor(), ARCHITECTURE + note("trimtab.metadata", 8, text("{")), 1, 2,
                                         data=b"\1" * 64),
    "our metadata is a number": gguf_file(tensor(), ARCHITECTURE + note("trimtab.metadata", 4, bytes(4)), 1, 2,
                                          data=b"\1" * 64),
    "our metadata is a list": gguf_file(tensor(), ARCHITECTURE + note("trimtab.metadata", 8, text("[]")), 1, 2,
                                        data=b"\1" * 64),
    "big-endian and cut off": b"GGUF" + struct.pack(">IQQ", 3, 1, 1),
}


def take_in(data: bytes) -> Payload:
    """All that an import does before the library is touched."""
    meta, payload = detect(data).read(data, FIELDS, Limits())
    check(meta, payload, Limits())
    return payload


@pytest.mark.parametrize("case", SAFETENSORS)
def test_malformed_safetensors(case: str) -> None:
    with pytest.raises(InvalidPayload) as caught:
        take_in(SAFETENSORS[case])
    assert status_of(caught.value) == 400 and caught.value.param is not None
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("case", GGUF)
def test_malformed_gguf(case: str) -> None:
    with pytest.raises(InvalidPayload) as caught:
        take_in(GGUF[case])
    assert status_of(caught.value) == 400 and caught.value.param is not None
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("data", [b"", b"\0", b"GGU", b"GGML" + bytes(50), bytes(100), b"PK\x03\x04" + bytes(50),
                                  b"\x80\x02}q\x00."])
def test_files_of_no_known_format(data: bytes) -> None:
    with pytest.raises(InvalidPayload) as caught:
        take_in(data)
    assert caught.value.param == "file"


def test_the_builders_of_this_file_build_good_files_too() -> None:
    """Without this, the cases above might fail for a reason other than the one they are named after."""
    assert list(take_in(header({"1.vector": entry()}, struct.pack("<8f", *range(8)))).layers) == [1]
    assert list(take_in(gguf_file(tensor(), num_tensors=1, data=struct.pack("<8f", *range(8)))).layers) == [1]
    array = note("a", 9, struct.pack("<IQ", 0, 100) + bytes(100))
    assert list(take_in(gguf_file(tensor(), ARCHITECTURE + array, 1, 2, data=b"?" * 64)).layers) == [1]


def survives(data: bytes) -> None:
    """Either refused as it should be, or read as finite numbers."""
    try:
        payload = take_in(data)
    except InvalidPayload:
        return
    assert all(bool(torch.isfinite(t).all()) for tensors in payload.layers.values() for t in tensors.values())


Corruption = Callable[[bytes], bytes]


@pytest.mark.parametrize("name", GOOD)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(data=st.data())
def test_random_damage(name: str, data: st.DataObject) -> None:
    damaged = bytearray(GOOD[name])
    for _ in range(data.draw(st.integers(1, 4))):
        # Most of a file is numbers, in which any damage is valid; so aim at the header.
        at = data.draw(st.integers(0, min(len(damaged) - 1, 400)))
        how = data.draw(st.sampled_from(["set", "flip", "cut", "insert", "delete", "repeat", "integer"]))
        if how == "set":
            damaged[at] = data.draw(st.integers(0, 255))
        elif how == "flip":
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del damaged[at:]
        elif how == "insert":
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=16))
        elif how == "delete":
            del damaged[at:at + data.draw(st.integers(1, 16))]
        elif how == "repeat":
            damaged[at:at] = damaged[at:at + 64]
        else:
            number = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]))
            damaged[at:at + 8] = struct.pack("<Q", number)
        if not damaged:
            break
    survives(bytes(damaged))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([b"GGUF\x03\0\0\0", b"GGUF", b"\x20\0\0\0\0\0\0\0{", b""]))
def test_random_bytes(data: bytes, start: bytes) -> None:
    survives(start + data)
