"""Adapters on vLLM: each request as with the merged weights under plain hooks, whatever runs beside it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from lab import model_path
from server.engines.base import Engine
from server.engines.data import Generation, Sampling, Touched
from server.engines.vllm.host.arguments import check_arguments
from server.engines.vllm.host.engine import VllmEngine
from server.engines.vllm.wire import GUEST
from server.errors import InvalidAdapter, InvalidSettings, ModelNotFound
from tests.engines import reference as ref
from tests.engines.cases import vector
from tests.engines.conftest import compiled, generate, ids
from tests.engines.peft import ATTENTION, merged, write_adapter
from tests.engines.vllm import checks
from tests.engines.vllm.apps import Running, client_of, make_app
from tests.engines.vllm.conftest import ONE_PROCESS, Group, options

pytestmark = pytest.mark.asyncio(loop_scope="module")
PUSH = vector(7, 128, 6.0)
SITES: tuple[Any, ...] = ("resid_post", "mlp_out", "head_out")


@dataclass(frozen=True)
class Adapted:
    """An engine that has loaded the adapters first and second, and the merged weights of both in transformers."""

    engine: VllmEngine
    folder: Path
    models: dict[str, Any]

    def on(self, name: str) -> Engine:
        if name == "":
            return self.engine
        assert self.engine.adapters is not None
        adapter = self.engine.adapters.get(name)
        assert adapter is not None
        return self.engine.on(adapter)

    def group(self, name: str) -> Group:
        return Group("lab-dense", self.on(name), self.models[name])  # type: ignore[arg-type]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def adapted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Adapted]:
    folder = tmp_path_factory.mktemp("adapters")
    model = AutoModelForCausalLM.from_pretrained(model_path("lab-dense"), dtype=torch.float32).eval()
    write_adapter(folder / "first", model, 1)
    write_adapter(folder / "second", model, 2, rank=8, alpha=4.0, modules=ATTENTION)
    engine = VllmEngine(options("lab-dense", adapters={"first": str(folder / "first")}, adapter_dir=folder,
                                adapters_at_once=2, adapter_rank=8, graph_sites=("resid_post", "mlp_act"),
                                **ONE_PROCESS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        await engine.start()
    try:
        await engine.load_adapter("second", folder / "second")
        yield Adapted(engine, folder, {"": model, "first": merged(model, folder / "first"),
                                       "second": merged(model, folder / "second")})
    finally:
        await engine.stop()


async def test_a_mixed_batch_equals_merged_weights_under_hooks(adapted: Adapted) -> None:
    """The model itself and both adapters at once, each unsteered and steered at three sites, twice: the second time
    prompts come from the cache."""
    jobs: list[tuple[str, list[int], Any, list[ref.Edit]]] = []
    for i, name in enumerate(("", "first", "second")):
        prompt = checks.prompt_of(i, 40)
        jobs.append((name, prompt, None, []))
        for j, site in enumerate(SITES):
            program = compiled(adapted.engine, {"op": "add", "site": site, "layers": [1 + j], "inline": {  # type: ignore[arg-type]
                "vector": PUSH.tolist()}})
            jobs.append((name, prompt, program, [ref.Edit(site, 1 + j, ref.add(PUSH), ref.everywhere)]))
    for _ in range(2):
        done = await asyncio.gather(*(generate(adapted.on(name), prompt, program)  # type: ignore[arg-type]
                                      for name, prompt, program, _ in jobs))
        for (name, prompt, program, edits), (tokens, touched) in zip(jobs, done, strict=True):
            checks.check_tokens(adapted.group(name), prompt, tokens, edits, steered=program is not None)
            assert touched == ([] if program is None else [Touched(len(prompt), len(tokens) - 1)])
    plain = [ref.logprobs(model, prompt, 40, [])[-1] for model in adapted.models.values()]
    assert float((plain[0] - plain[1]).abs().max()) > 0.1 < float((plain[0] - plain[2]).abs().max()), (
        "the adapters do not show in this test")


async def test_cached_prefixes_are_of_one_adapter_salt_and_program(adapted: Adapted) -> None:
    """One prompt of three blocks: the first completion of each kind finds nothing in the cache, the second one all
    blocks but the last, and both are exact."""
    prompt = checks.prompt_of(11, 97)
    push = compiled(adapted.engine, {"op": "add", "layers": [2], "inline": {"vector": PUSH.tolist()}})
    edits = [ref.Edit("resid_post", 2, ref.add(PUSH), ref.everywhere)]
    for name in ("", "first", "second"):
        for salt in (None, "mine"):
            for program in (None, push):
                found = []
                for n in range(2):
                    completion = adapted.on(name).generate(Generation(
                        f"cached-{name}-{salt}-{program is None}-{n}", prompt, Sampling(3, 0.0, logprobs=2), program,
                        cache_salt=salt))
                    tokens = [token async for token in completion]
                    checks.check_tokens(adapted.group(name), prompt, tokens, edits if program else [],
                                        steered=program is not None)
                    found.append(completion.cached())
                assert found == [0, 96], (name, salt, program is None)


async def test_what_is_measured_is_measured_on_the_adapter(adapted: Adapted) -> None:
    group = adapted.group("first")
    await checks.scores_equal_hooks(group, checks.cases_of(group)[:2])
    await checks.capture_is_what_hooks_see(group)
    await checks.comparison_equals_two_plain_passes(group)
    await checks.what_was_kept_tells_what_two_passes_tell(group)
    texts = [checks.prompt_of(i) for i in range(2)]
    expected = torch.stack([ref.logprobs(group.model, text, len(text), [])[-1] for text in texts])
    assert torch.allclose(await group.engine.next_logprobs(texts), expected, atol=checks.TOLERANCE)


async def test_an_adapter_in_the_place_of_another_answers_by_itself(adapted: Adapted) -> None:
    """Under the same name and path: nothing of the former one is found in the cache, and what runs goes on with it."""
    engine, prompt, base = adapted.engine, checks.prompt_of(5, 97), adapted.models[""]
    folder = write_adapter(adapted.folder / "changing", base, 3)
    before = await engine.load_adapter("changing", folder)
    old, answers = merged(base, folder), []
    running = engine.on(before).generate(Generation("going", prompt, Sampling(24, 0.0, ignore_eos=True, logprobs=2)))
    stream = running.__aiter__()
    answers.append(await anext(stream))  # type: ignore[arg-type]
    write_adapter(folder, base, 4)
    after = await engine.load_adapter("changing", folder)
    new = await generate(engine.on(after), prompt, max_tokens=4)  # type: ignore[arg-type]
    checks.check_tokens(Group("", engine, merged(base, folder)), prompt, new[0], [], steered=False)
    answers += [token async for token in stream]
    checks.check_tokens(Group("", engine, old), prompt, answers, [], steered=False)
    assert len(answers) == 24 and not before.folder.exists() and after.folder.exists()
    with pytest.raises(ModelNotFound, match="was unloaded"):
        await generate(engine.on(before), prompt)  # type: ignore[arg-type]
    await engine.unload_adapter("changing")
    assert not after.folder.exists()
    again = await generate(engine, prompt, max_tokens=4)  # type: ignore[arg-type]
    checks.check_tokens(Group("", engine, base), prompt, again[0], [], steered=False)


async def test_what_vllm_cannot_take_is_refused_and_nothing_is_loaded(adapted: Adapted) -> None:
    base = adapted.models[""]
    for name, changes, said in (("rank", {"rank": 16}, "rank is over 8"), ("dora", {"use_dora": True}, "use_dora"),
                                ("head", {"modules": ("lm_head",)}, "lm_head")):
        folder = write_adapter(adapted.folder / name, base, 5, **changes)  # type: ignore[arg-type]
        with pytest.raises(InvalidAdapter, match=said):
            await adapted.engine.load_adapter(name, folder)
        assert adapted.engine.adapters is not None and adapted.engine.adapters.get(name) is None
    with pytest.raises(InvalidSettings, match="Trimtab's own"):
        check_arguments({"enable_lora": True})


@pytest.mark.slow
async def test_over_http(adapted: Adapted, tmp_path: Path) -> None:
    write_adapter(adapted.folder / "third", adapted.models[""], 6)
    app = make_app("lab-dense", Running(adapted.engine), "vllm", tmp_path, vllm_adapter_dir=adapted.folder)
    async with client_of(app) as client:
        async def text(model: str, **fields: Any) -> Any:
            answer = await client.post("/v1/completions", json={
                "model": model, "prompt": checks.prompt_of(2), "max_tokens": 8, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True, **fields})
            return answer.json()["choices"][0]["token_ids"] if answer.status_code == 200 else answer.json()["error"]

        refused = await client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/etc"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "lora_path")
        loaded = await client.post("/v1/load_lora_adapter", json={"lora_name": "third", "lora_path": "third"})
        assert loaded.status_code == 200 and "added successfully" in loaded.text
        twice = await client.post("/v1/load_lora_adapter", json={"lora_name": "third", "lora_path": "third"})
        assert (twice.status_code, twice.json()["error"]["code"]) == (409, "conflict")
        listed = {one["id"]: one["parent"] for one in (await client.get("/v1/models")).json()["data"]}
        assert listed == {"lab-dense": None, "first": "lab-dense", "second": "lab-dense", "third": "lab-dense"}
        assert (await client.get("/v1/models/third")).json()["parent"] == "lab-dense"
        steering = {"interventions": [{"op": "add", "layers": [2], "inline": {"vector": PUSH.tolist()}}]}
        found = {(model, steered): await text(model, **({"steering": steering} if steered else {}))
                 for model in listed for steered in (False, True)}
        for model, name in (("lab-dense", ""), ("first", "first"), ("second", "second"), ("third", "third")):
            engine = adapted.on(name)
            direct, _ = await generate(engine, checks.prompt_of(2), max_tokens=8, ignore_eos=True)  # type: ignore[arg-type]
            assert found[model, False] == ids(direct)
        assert len(set(map(tuple, found.values()))) > 4
        pairs = [{"positive": f"a good day {n}", "negative": f"a bad day {n}"} for n in range(12)]
        await done(client, "/v1/extract/mean_difference?model=third", {
            "name": "made", "pairs": pairs, "layers": [2], "trial": {"effort": "none"}})
        made = (await client.get("/v1/artifacts/made")).json()
        assert adapted.engine.adapters is not None
        third = adapted.engine.adapters.get("third")
        assert third is not None
        assert (made["model_id"], made["provenance"]["adapter"]) == ("third", third.ref)
        steered = await text("first", steering={"interventions": [{"artifact": "made"}]})
        assert isinstance(steered, list), "what was made on one adapter fits the others and the model"
        await check_jobs(client, third.ref)
        gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "third"})
        assert gone.status_code == 200
        assert (await text("third"))["code"] == "model_not_found"
        assert (await client.post("/v1/unload_lora_adapter", json={"lora_name": "third"})).status_code == 404


async def done(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The result of a job."""
    job = await client.post(path, json=body)
    assert job.status_code == 202, job.text
    async with asyncio.timeout(300):
        while (state := await job_of(client, job.json()["id"]))["status"] in ("queued", "running"):
            await asyncio.sleep(0.05)
    assert state["status"] == "succeeded", state
    result: dict[str, Any] = state["result"]
    return result


async def check_jobs(client: httpx.AsyncClient, adapter: str) -> None:
    """What is graded and tuned with ?model= is the adapter, whose texts are not those of the model."""
    wanted = {"spec": {"interventions": [{"artifact": "made"}]}, "prompts": ["a good day", "a bad day"], "draws": 0,
              "graders": [{"kind": "length", "least": 1}], "max_tokens": 6}
    texts = {}
    for query, model in (("", "lab-dense"), ("?model=third", adapter)):
        summary = await done(client, f"/v1/evaluations{query}", wanted)
        report = (await client.get(f"/v1/evaluations/{summary['id']}")).json()
        assert report["model"] == model
        texts[model] = [sample["text"] for sample in report["untouched"]["samples"]]
    assert texts["lab-dense"] != texts[adapter]
    pairs = [{"positive": f"a good day {n}", "negative": f"a bad day {n}"} for n in range(12)]
    tuned = await done(client, "/v1/artifacts/made/tune?model=third", {"pairs": pairs, "trial": {"effort": "quick"}})
    assert (await client.get(f"/v1/artifacts/{tuned['artifact']}")).json()["provenance"]["tuned_on_adapter"] == adapter


async def job_of(client: httpx.AsyncClient, job: str) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get(f"/v1/jobs/{job}")).json()
    return found


@pytest.mark.slow
async def test_a_job_on_an_adapter_beside_chats_changes_none_of_them(adapted: Adapted, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """An extraction with its trial, which captures and writes, is a guest of vLLM while the model, the job's adapter
    and another one answer, steered and not."""
    llm, priorities = adapted.engine.connection._llm, []
    generate_in_vllm = llm.generate

    def noting(*args: Any, priority: int, **named: Any) -> Any:
        priorities.append(priority)
        return generate_in_vllm(*args, priority=priority, **named)

    monkeypatch.setattr(llm, "generate", noting)
    steering = {"interventions": [{"op": "add", "layers": [2], "inline": {"vector": PUSH.tolist()}}]}
    bodies = [{"model": model, "messages": [{"role": "user", "content": "How do I bake bread ?"}], "max_tokens": 12,
               "temperature": 0, "logprobs": True, "ignore_eos": True, **({"steering": steering} if steered else {})}
              for model in ("lab-dense", "first", "second") for steered in (False, True)]
    async with client_of(make_app("lab-dense", Running(adapted.engine), "vllm", tmp_path)) as client:
        async def answers() -> list[Any]:
            found = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))
            assert [one.status_code for one in found] == [200] * len(bodies)
            return [one.json()["choices"][0] for one in found]

        before = await answers()
        priorities.clear()
        pairs = [{"positive": f"a good day {n}", "negative": f"a bad day {n}"} for n in range(12)]
        job = (await client.post("/v1/extract/mean_difference?model=first", json={
            "name": "beside", "pairs": pairs, "layers": [2]})).json()["id"]
        beside = 0
        async with asyncio.timeout(500):
            while (await job_of(client, job))["status"] in ("queued", "running"):
                passes = priorities.count(GUEST)
                for one, other in zip(await answers(), before, strict=True):
                    assert one["message"] == other["message"]
                    assert [token["logprob"] for token in one["logprobs"]["content"]] == pytest.approx(
                        [token["logprob"] for token in other["logprobs"]["content"]], abs=1e-4)
                beside += priorities.count(GUEST) > passes
        assert (await job_of(client, job))["status"] == "succeeded", await job_of(client, job)
        assert beside and set(priorities) >= {0, GUEST}
