"""Monitors: scores of probes per token, beside a completion that does not change."""

from collections.abc import Sequence
from typing import Any

import httpx
import pytest
import torch

from server.engines.data import Captured, CaptureRequest
from server.observability.instruments import Registry
from server.requests.monitor import MAX_NAMES, Monitor, MonitorChoice, MonitorMetrics
from steering.artifacts.payload import Payload
from steering.language.gates import Reading
from steering.programs.reading import Reader
from tests.server.conftest import MODEL, chat
from tests.server.scripted import WIDTH, ScriptedEngine
from tests.server.test_steering import ask, store
from vectors.artifact import Metadata
from vectors.library import Library

DIMS = torch.tensor([0, 1, 4])
SIGNS = torch.tensor([1, -1, 1])


@pytest.fixture(autouse=True)
def _probes(library: Library) -> None:
    metadata = Metadata(name="mood", kind="probe", op="add", site="resid_post", reading=Reading(threshold=0.25))
    library.create(metadata, Payload.build("probe", {
        1: {"weight": torch.eye(WIDTH)[0], "bias": torch.tensor(0.125)}, 3: {"weight": torch.eye(WIDTH)[2],
                                                                          "bias": torch.tensor(0.0)}}))
    library.create(Metadata(name="signs", kind="sign_pattern", op="sign_flip", site="resid_pre"),
                   Payload.build("sign_pattern", {2: {"dims": DIMS, "polarity": SIGNS}}))
    store(library, "one")


def activations(ids: Sequence[int], layer: int) -> torch.Tensor:
    """What the scripted engine captures, written down once more."""
    return torch.stack([torch.sin(torch.tensor(ids, dtype=torch.float32) * (k + 1) + layer) for k in range(WIDTH)],
                       dim=1)


async def test_scores_of_every_token(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    steering = {"interventions": [{"artifact": "one"}], "monitor": ["mood", "signs@1"]}
    answer = await ask(client, steering, n=2)
    mood, signs = answer["steering"]["monitor"]
    assert (mood["probe"], mood["status"], mood["layers"], mood["threshold"]) == ("mood@1", "read", [1, 3], 0.25)
    assert (signs["form"], signs["site"], signs["threshold"]) == ("agreement", "resid_pre", None)
    for n, completion in enumerate(engine.completions):
        prompt, said = completion.generation.prompt_ids, completion.given
        for layer, dim, bias in ((1, 0, 0.125), (3, 2, 0.0)):
            expected = (activations([*prompt, *said], layer)[:, dim] + bias).tolist()
            choice = mood["choices"][n]
            assert choice["prompt"][str(layer)] == pytest.approx(expected[:len(prompt)], abs=1e-6)
            assert choice["generation"][str(layer)] == pytest.approx(expected[len(prompt):], abs=1e-6)
        agree = ((activations(said, 2)[:, DIMS] > 0) == (SIGNS > 0)).float().mean(dim=1).tolist()
        assert signs["choices"][n]["generation"]["2"] == pytest.approx(agree)


async def test_with_and_without_say_the_same(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    spec = {"interventions": [{"artifact": "one"}]}
    plain = await ask(client, spec, logprobs=True)
    watched = await ask(client, {**spec, "monitor": ["mood"]}, logprobs=True)
    assert plain["choices"] == watched["choices"] and plain["steering"]["monitor"] == []
    first, second = (c.generation for c in engine.completions)
    assert first.program is second.program and first.sampling == second.sampling


async def test_the_pass_is_under_the_program_and_knows_what_was_generated(
        client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    seen: list[tuple[CaptureRequest, Any]] = []
    capture = engine.capture

    async def recording(requests: Any, program: Any = None) -> list[Captured]:
        seen.extend((request, program) for request in requests)
        return await capture(requests, program)

    engine.capture = recording  # type: ignore[method-assign]
    scope = {"prompt": {"roles": ["user"]}, "generation": "all"}
    await ask(client, {"interventions": [{"artifact": "one", "scope": scope}], "monitor": ["mood"]})
    (request, program), generation = seen[0], engine.completions[0].generation
    assert program is generation.program and request.prompt_length == len(generation.prompt_ids)
    assert request.roles == generation.roles and request.roles is not None


async def test_streams_and_plain_completions(client: httpx.AsyncClient) -> None:
    body = {"model": MODEL, "prompt": ["hello", "good day"], "max_tokens": 4, "steering": {"monitor": ["mood"]}}
    answer = (await client.post("/v1/completions", json=body)).json()
    assert [c["index"] for c in answer["steering"]["monitor"][0]["choices"]] == [0, 1]
    text = (await client.post("/v1/chat/completions", json=chat(stream=True, steering={"monitor": ["mood"]}))).text
    assert text.count('"monitor":[{') == 1


async def test_a_pass_that_fails_leaves_the_completion(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    async def broken(requests: Any, program: Any = None) -> Any:
        raise RuntimeError("out of memory")

    engine.capture = broken  # type: ignore[method-assign]
    answer = await ask(client, {"monitor": ["mood"]})
    assert answer["choices"][0]["message"]["content"] == " good day"
    report = answer["steering"]["monitor"][0]
    assert report["status"] == "failed" and report["choices"] == [] and "memory" not in report["reason"]
    assert "trimtab_monitor_failed_total 1.0" in (await client.get("/metrics")).text


async def test_scores_that_are_not_finite_are_said_and_spoil_no_mean(client: httpx.AsyncClient, engine: ScriptedEngine
                                                                    ) -> None:
    capture, name = engine.capture, 'trimtab_monitor_score{part="generation",probe="mood"} '
    await ask(client, {"monitor": ["mood"]})
    before = (await client.get("/metrics")).text.partition(name)[2].partition("\n")[0]

    async def overflowing(requests: Any, program: Any = None) -> Any:
        return [{site: {layer: values * torch.inf for layer, values in layers.items()}
                 for site, layers in found.items()} for found in await capture(requests, program)]

    engine.capture = overflowing  # type: ignore[method-assign]
    report = (await ask(client, {"monitor": ["mood"]}))["steering"]["monitor"][0]
    assert report["status"] == "failed" and "not finite" in report["reason"] and report["choices"] == []
    engine.capture = capture  # type: ignore[method-assign]
    assert (await ask(client, {"monitor": ["mood"]}))["steering"]["monitor"][0]["status"] == "read"
    page = (await client.get("/metrics")).text
    assert float(page.partition(name)[2].partition("\n")[0]) == pytest.approx(float(before))
    assert "trimtab_monitor_failed_total 1.0" in page


async def test_reading_goes_on_under_the_kill_switch(client: httpx.AsyncClient) -> None:
    await client.put("/v1/admin/kill-switch", json={"on": True})
    answer = await ask(client, {"interventions": [{"artifact": "one"}], "monitor": ["mood"]})
    assert answer["steering"]["disabled"] and answer["steering"]["monitor"][0]["status"] == "read"


@pytest.mark.parametrize(("monitor", "status", "code"), [
    (["mood", "nobody"], 404, "not_found"), (["mood", "heads"], 409, "artifact_mismatch"),
    (["mood", "foreign"], 409, "artifact_mismatch")])
async def test_refusals(client: httpx.AsyncClient, library: Library, monitor: list[str], status: int, code: str
                        ) -> None:
    library.create(Metadata(name="heads", kind="head_set", op="head_mask", site="head_out"),
                   Payload.build("head_set", {1: {"heads": torch.tensor([0])}}))
    store(library, "foreign", fingerprint="another")
    answer = await client.post("/v1/chat/completions", json=chat(steering={"monitor": monitor}))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, "steering.monitor[1]")


def normality() -> Payload:
    """Normal is what lies near zero, up to a length of about sqrt(2) in all WIDTH dims together."""
    return Payload.build("normality", {2: {
        "mean": torch.zeros(WIDTH), "scale": torch.ones(WIDTH), "basis": torch.eye(WIDTH)[:2],
        "variance": torch.full((2,), 0.5), "rest": torch.tensor(0.5), "patterns": torch.tensor([[1.0, 1.0]]),
        "window": torch.tensor(8), "dimension": torch.tensor(6.0), "bandwidth": torch.tensor(2.0),
        "spectral_mean": torch.zeros(6), "spectral_whiten": torch.eye(6), "diffusion": torch.tensor([1.0, 0.5]),
        "thresholds": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])}})


@pytest.fixture
def normal(library: Library) -> None:
    library.create(Metadata(name="normal", kind="normality", site="resid_post", reading=Reading(
        form="mahalanobis", threshold=0.9)), normality())


async def test_one_artifact_in_several_forms(client: httpx.AsyncClient, engine: ScriptedEngine, normal: None) -> None:
    """Scores by hand where the covariance is the same in all directions; each form has the threshold of its own."""
    answer = await ask(client, {"monitor": [
        "normal", {"artifact": "normal", "form": "residual"}, {"artifact": "normal", "form": "membership", "trend": 4},
        {"artifact": "normal", "form": "spectral"}]}, max_tokens=6)
    plain, residual, member, spectral = answer["steering"]["monitor"]
    assert [(one["form"], one["threshold"]) for one in (plain, residual, member, spectral)] == [
        ("mahalanobis", 2.0), ("residual", 1.0), ("membership", 3.0), ("spectral", 4.0)]
    [completion] = engine.completions
    prompt = completion.generation.prompt_ids
    seen = activations([*prompt, *completion.given], 2)
    told = plain["choices"][0]
    assert [*told["prompt"]["2"], *told["generation"]["2"]] == pytest.approx(
        (seen.square().sum(dim=1) / 0.5 / WIDTH).sqrt().tolist(), abs=1e-5)
    told = residual["choices"][0]
    assert told["generation"]["2"] == pytest.approx(
        (seen[len(prompt):, 2:].square().sum(dim=1) / 0.5 / (WIDTH - 2)).sqrt().tolist(), abs=1e-5)
    bits = ((seen[:, :2] <= 0).float().mean(dim=1)).tolist()
    told = member["choices"][0]
    assert told["generation"]["2"] == pytest.approx(bits[len(prompt):])
    later = [[(b > a) - (b < a) for i, a in enumerate(four) for b in four[i + 1:]]
             for four in (bits[n - 3:n + 1] for n in range(len(prompt), len(bits)))]
    assert told["trend"]["2"] == pytest.approx([sum(signs) / 6 for signs in later])
    whole = [*spectral["choices"][0]["prompt"]["2"], *spectral["choices"][0]["generation"]["2"]]
    assert [one is None for one in whole] == [n < 8 for n in range(len(whole))]
    page = (await client.get("/metrics")).text
    for label in ("normal", "normal:residual", "normal:membership", "normal:spectral"):
        assert f'trimtab_monitor_tokens_total{{part="generation",probe="{label}"}}' in page


@pytest.mark.parametrize(("steering", "code", "param"), [
    ({"monitor": [{"artifact": "mood", "form": "spectral"}]}, "invalid_spec", "steering.monitor[0].form"),
    ({"monitor": [{"artifact": "mood", "layers": [2]}]}, "invalid_spec", "steering.monitor[0].layers"),
    ({"monitor": [{"artifact": "mood", "trend": 3}]}, "invalid_spec", "steering.monitor[0].trend"),
    ({"interventions": [{"artifact": "normal"}]}, "artifact_mismatch", "steering.interventions[0].artifact"),
    ({"interventions": [{"artifact": "normal", "op": "add", "override": ["op"]}]}, "artifact_mismatch",
     "steering.interventions[0].op"),
    ({"interventions": [{"artifact": "one", "gate": {"probe": "normal", "form": "spectral", "threshold": 1.0}}]},
     "invalid_spec", "steering.interventions[0].gate.form"),
    ({"interventions": [{"artifact": "one"}], "guard": {"monitor": [{"artifact": "one"}]}}, "invalid_spec",
     "steering.guard.monitor[0].threshold"),
    ({"interventions": [{"artifact": "one"}], "guard": {"monitor": [{"artifact": "nobody"}]}}, "not_found",
     "steering.guard.monitor[0]"),
])
async def test_what_cannot_be_read_so_is_refused(client: httpx.AsyncClient, normal: None, steering: dict[str, Any],
                                                 code: str, param: str) -> None:
    answer = await client.post("/v1/chat/completions", json=chat(steering=steering))
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error


async def test_too_many(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json=chat(steering={"monitor": ["mood"] * 17}))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "steering.monitor")


def test_metrics_are_running_means_with_bounded_names() -> None:
    registry = Registry()
    metrics = MonitorMetrics(registry)

    def read(name: str, prompt: list[float], said: list[float], direction: Any = "above") -> None:
        reader = Reader(f"{name}@1", "resid_post", "linear", {2: {}})
        metrics.read(Monitor(reader, 0.0, direction), MonitorChoice(index=0, prompt={"2": prompt},
                                                                     generation={"2": said}))

    def value(kind: str, name: str, part: str = "generation") -> float:
        return registry.get_sample_value(f"trimtab_monitor_{kind}", {"probe": name, "part": part}) or 0.0

    # What the first position has, a sink in many models, is no score of the prompt.
    read("a", [1000.0, 1.0, -1.0, 1.0], [2.0] * 500)
    read("a", [], [-2.0] * 500)
    assert value("score", "a", "prompt") == pytest.approx(1 / 3)
    kept = 0.5 ** 0.5
    assert value("score", "a") == pytest.approx(kept * 2.0 - (1 - kept) * 2.0)
    assert value("tokens_total", "a") == 1000 and value("tokens_met_total", "a") == 500
    assert value("tokens_met_total", "a", "prompt") == 2 and value("tokens_total", "a", "prompt") == 3
    read("b", [], [-1.0], "below")
    assert value("tokens_met_total", "b") == 1
    for n in range(1000):
        read(f"name-{n}", [], [1.0])
    names = {s.labels["probe"] for metric in registry.collect() for s in metric.samples if "probe" in s.labels}
    assert len(names) <= MAX_NAMES + 1 and "other" in names
