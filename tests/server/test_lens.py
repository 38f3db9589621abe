"""`POST /v1/lens`: what it lists, groups by spelling, and what it refuses."""

import threading
from typing import Any

import httpx
import pytest
import torch

from server.api import lens as lens_route
from server.engines.data import Scores
from steering.artifacts.payload import Payload
from steering.language.fields import MAX_INTERVENTIONS
from tests.server.conftest import MODEL
from tests.server.scripted import LAYERS, WIDTH, ScriptedEngine
from tests.server.test_steering import store
from vectors.artifact import Metadata
from vectors.library import Library


@pytest.fixture(autouse=True)
def _unembedding(engine: ScriptedEngine) -> torch.Tensor:
    """The engine speaks by a random matrix; what it is given is what the program puts at the last layer."""
    matrix = torch.randn(engine.facts.vocab_size, WIDTH, generator=torch.Generator().manual_seed(0))

    async def score(token_ids: Any, program: Any = None, *, full: bool = False, **_: Any) -> Scores:
        rows = torch.stack([item.rows["resid_post", LAYERS - 1].tensors["offset"] for item in program.compiled])
        return Scores(torch.zeros(len(token_ids)), (rows @ matrix.T).log_softmax(-1))

    engine.score = score  # type: ignore[method-assign]
    return matrix


def activation(token: int, layer: int) -> torch.Tensor:
    return torch.tensor([torch.sin(torch.tensor(float(token)) * (k + 1) + layer) for k in range(WIDTH)])


async def look(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/lens", json={"model": MODEL, "input": [40, 41, 42], **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_every_layer_and_position(client: httpx.AsyncClient, _unembedding: torch.Tensor) -> None:
    found = await look(client, positions=None, top_k=3)
    assert (found["lens"], found["tokens"], [layer["layer"] for layer in found["layers"]]) == (
        "logit", 3, list(range(LAYERS)))
    for layer in found["layers"]:
        for position, token in zip(layer["positions"], (40, 41, 42), strict=True):
            expected = (_unembedding @ activation(token, layer["layer"])).log_softmax(-1)
            values, ids = expected.topk(3)
            assert [t["id"] for t in position["top"]] == ids.tolist()
            assert [t["logprob"] for t in position["top"]] == pytest.approx(values.tolist(), abs=1e-4)
            assert position["entropy"] == pytest.approx(float(-(expected.exp() * expected).sum()), abs=1e-4)


async def test_groups_take_every_spelling(client: httpx.AsyncClient, vocabulary: Any, _unembedding: torch.Tensor
                                          ) -> None:
    found = await look(client, layers=[1], groups={"hello": ["hello", " hello", "hello there"], "bad": [" bad"]})
    reading = found["layers"][0]["positions"][0]["groups"]
    logprobs = (_unembedding @ activation(42, 1)).log_softmax(-1)
    ids = [vocabulary.encode(text, special_tokens=False)[0] for text in ("hello", " hello")]
    assert ids[0] != ids[1]
    best = max(ids, key=lambda i: float(logprobs[i]))
    assert reading["hello"]["logprob"] == pytest.approx(float(logprobs[ids].logsumexp(0)), abs=1e-4)
    assert reading["hello"]["rank"] == int((logprobs > logprobs[best]).sum())
    assert reading["hello"]["spelling"] in (("hello", "hello there") if best == ids[0] else (" hello",))
    assert found["first_tokens"]["hello"] == {"hello": "hello", " hello": " hello", "hello there": "hello"}


async def test_a_tuned_lens_maps_before_it_looks(client: httpx.AsyncClient, library: Library, engine: ScriptedEngine,
                                                 _unembedding: torch.Tensor) -> None:
    scale, shift = torch.linspace(0.5, 2, WIDTH), torch.linspace(-1, 1, WIDTH)
    library.create(Metadata(name="lens", kind="diagonal", op="affine", site="resid_post", fingerprint="f" * 64),
                   Payload.build("diagonal", {n: {"scale": scale.clone(), "shift": shift.clone()} for n in (0, 1)}))
    found = await look(client, lens="lens", layers=[1, LAYERS - 1])
    assert found["lens"] == "lens@1"
    for entry, mapped in zip(found["layers"], (activation(42, 1) * scale + shift, activation(42, LAYERS - 1)),
                             strict=True):
        expected = (_unembedding @ mapped).log_softmax(-1)
        assert entry["positions"][0]["top"][0]["id"] == int(expected.argmax())
        assert entry["positions"][0]["top"][0]["logprob"] == pytest.approx(float(expected.max()), abs=1e-4)
    missing = await client.post("/v1/lens", json={"model": MODEL, "input": [40], "lens": "lens", "layers": [2]})
    assert (missing.status_code, missing.json()["error"]["param"]) == (400, "layers")


async def test_rows_are_read_in_threads_a_few_at_a_time(client: httpx.AsyncClient, engine: ScriptedEngine,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    threads: set[int] = set()
    score, row = engine.score, lens_route._row

    async def counted(token_ids: Any, *arguments: Any, **fields: Any) -> Scores:
        held.append(len(token_ids))
        return await score(token_ids, *arguments, **fields)

    def seen(*arguments: Any) -> Any:
        threads.add(threading.get_ident())
        return row(*arguments)

    monkeypatch.setattr(engine, "score", counted)
    monkeypatch.setattr(lens_route, "_row", seen)
    found = await look(client, input=[40, 41, 42] * 40, positions=None)
    assert sum(held) == 120 * LAYERS and max(held) <= MAX_INTERVENTIONS
    assert [len(layer["positions"]) for layer in found["layers"]] == [120] * LAYERS
    assert threads and threading.get_ident() not in threads


async def test_steering_carries_its_receipt(client: httpx.AsyncClient, library: Library) -> None:
    store(library, "one")
    steering = {"interventions": [{"artifact": "one", "scope": {"prompt": {"positions": [0, 2]}}}]}
    found = await look(client, steering=steering)
    assert found["steering"]["applied"][0]["tokens"] == {"prompt": 2, "generation": 0}
    assert (await look(client))["steering"]["applied"] == []
    messages = [{"role": "user", "content": "hi"}]
    roles = {"interventions": [{"artifact": "one", "scope": {"prompt": {"roles": ["user"]}}}]}
    chat = await look(client, input=messages, steering=roles)
    assert 0 < chat["steering"]["applied"][0]["tokens"]["prompt"] < chat["tokens"]


@pytest.mark.parametrize(("fields", "status", "code", "param"), [
    ({"input": ""}, 400, "invalid_request", "input"),
    ({"input": [10**6]}, 400, "invalid_request", "input"),
    ({"input": [1] * 300}, 400, "context_length_exceeded", "input"),
    ({"layers": [9]}, 400, "layer_out_of_range", "layers[0]"),
    ({"positions": [3]}, 400, "invalid_request", "positions[0]"),
    ({"lens": "nobody"}, 404, "not_found", "lens"),
    ({"lens": "one"}, 409, "artifact_mismatch", "lens"),
    ({"top_k": 101}, 400, "invalid_request", "top_k"),
    ({"groups": {"a": []}}, 400, "invalid_request", "groups.a"),
    ({"model": "other"}, 404, "model_not_found", "model"),
    ({"steering": {"report": "summary"}}, 400, "invalid_spec", "steering.report"),
    ({"steering": {"monitor": ["one"]}}, 400, "invalid_spec", "steering.monitor"),
    ({"steering": {"guard": {"max_kl": 0.5}}}, 400, "invalid_spec", "steering.guard"),
    ({"steering": {"interventions": [{"artifact": "one", "scope": {"prompt": {"roles": ["user"]}}}]}}, 400,
     "invalid_spec", "steering.interventions"),
    ({"input": [1] * 255, "positions": list(range(255)) * 5}, 400, "invalid_request", "positions"),
])
async def test_refusals(client: httpx.AsyncClient, library: Library, fields: Any, status: int, code: str, param: str
                        ) -> None:
    store(library, "one")
    answer = await client.post("/v1/lens", json={"model": MODEL, "input": [1, 2], **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
