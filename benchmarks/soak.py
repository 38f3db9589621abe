"""A soak: random specs, aborts, artifact updates and preset switches from 16 clients, answers checked as they come.

    python -m benchmarks.soak [--minutes 2] [--engine vllm] [--clients 16] [--json FILE]

A sample of the answers is compared with an oracle, the same model in plain transformers with hooks of its own: the text
must be the same wherever the oracle is not itself in two minds (its best two tokens within a thousandth), and the
log-probabilities within a thousandth. Memory of the server and its processes is read every minute.
"""

import argparse
import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.command import options_of, run
from lab import model_path
from scripts.running import running_server

MODEL = "lab-dense"
TOKENS = 8
NUM_ARTIFACTS = 6
LAYERS = 6
OPS = ("add", "ablate", "clamp", "mask", "sign_flip")
CLAMP = 1.5
PRESET = "soak"


def vector(name: int, version: int, d_model: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * name + version)
    return 8 * torch.nn.functional.normalize(torch.randn(d_model, generator=generator), dim=0)


@dataclass(frozen=True)
class Step:
    """One intervention as the oracle knows it."""

    op: str
    layer: int
    vector: torch.Tensor
    generated_only: bool
    dims: tuple[int, ...] = ()

    def inline(self) -> dict[str, Any]:
        """The step as a request says it. Signs to flip are those of the vector."""
        if self.op == "mask":
            return {"dims": list(self.dims)}
        if self.op == "sign_flip":
            return {"dims": list(self.dims), "polarity": self.vector[list(self.dims)].sign().int().tolist()}
        return {"vector": self.vector.tolist(), **({"value": CLAMP} if self.op == "clamp" else {})}

    def act(self, h: torch.Tensor) -> torch.Tensor:
        """`h` [..., d_model] as the step leaves it."""
        unit = self.vector / self.vector.norm()
        along = (h @ unit)[..., None]
        listed = torch.zeros(h.shape[-1], dtype=torch.bool)
        listed[list(self.dims)] = True
        match self.op:
            case "add":
                return h + self.vector
            case "ablate":
                return h - along * unit
            case "clamp":
                return h + (CLAMP - along) * unit
            case "mask":
                return torch.where(listed, 0.0, h)
            case "sign_flip":
                return torch.where(listed & (h.sign() == self.vector.sign()), -h, h)
        raise ValueError(self.op)


class Oracle:
    def __init__(self) -> None:
        folder = model_path(MODEL)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.d_model = int(self.model.config.hidden_size)

    @torch.no_grad()
    def answer(self, prompt: str, steps: list[Step]) -> tuple[list[int], list[float], list[float]]:
        """Greedy tokens, their log-probabilities, and how far the best is ahead of the second."""
        ids = self.tokenizer.encode(prompt)
        length, logprobs, leads = len(ids), [], []
        for _ in range(TOKENS):
            row = self._logits(ids, length, steps)[-1].log_softmax(-1)
            best = row.topk(2)
            ids.append(int(best.indices[0]))
            logprobs.append(float(best.values[0]))
            leads.append(float(best.values[0] - best.values[1]))
        return ids[length:], logprobs, leads

    def _logits(self, ids: list[int], length: int, steps: list[Step]) -> torch.Tensor:
        handles = [self.model.model.layers[step.layer].register_forward_hook(_hook(step, length)) for step in steps]
        try:
            return self.model(torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()


def _hook(step: Step, length: int) -> Any:
    def hook(module: Any, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        touched = torch.arange(h.shape[1]) >= (length if step.generated_only else 0)
        out = torch.where(touched[None, :, None], step.act(h), h)
        return (out, *output[1:]) if isinstance(output, tuple) else out

    return hook


@dataclass
class Soak:
    """Everything the clients share. `newest`: version of each artifact and of the preset that was surely stored."""

    http: httpx.AsyncClient
    oracle: Oracle
    random: random.Random
    newest: dict[int, int] = field(default_factory=dict)
    layer_of: dict[tuple[int, int], int] = field(default_factory=dict)
    presets: dict[int, tuple[int, int]] = field(default_factory=dict)
    library_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    oracle_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)

    async def store(self, name: int) -> None:
        """A further version of an artifact: other numbers at another layer."""
        version = self.newest.get(name, 0) + 1
        layer = self.random.randrange(LAYERS)
        answer = await self.http.post("/v1/artifacts", json={
            "metadata": {"name": f"soak-{name}", "kind": "vector", "op": "add", "site": "resid_post"},
            "tensors": {str(layer): {"vector": vector(name, version, self.oracle.d_model).tolist()}}})
        answer.raise_for_status()
        assert answer.json()["version"] == version
        self.layer_of[name, version] = layer
        self.newest[name] = version
        self.counts["versions"] += 1

    async def switch_preset(self) -> None:
        name = self.random.randrange(NUM_ARTIFACTS)
        version = self.newest[name]
        answer = await self.http.post("/v1/presets", json={
            "name": PRESET, "spec": {"interventions": [{"artifact": f"soak-{name}@{version}"}]}})
        answer.raise_for_status()
        self.presets[answer.json()["version"]] = (name, version)
        self.counts["preset switches"] += 1

    def named(self, name: int, version: int, generated_only: bool = False) -> Step:
        return Step("add", self.layer_of[name, version], vector(name, version, self.oracle.d_model), generated_only)

    def pick(self) -> tuple[dict[str, Any], list[Step]]:
        """Random steering, and what it should do."""
        interventions: list[dict[str, Any]] = []
        steps: list[Step] = []
        for _ in range(self.random.choice((0, 1, 1, 2, 3))):
            generated_only = self.random.random() < 0.3
            scope = {"prompt": "none", "generation": "all"} if generated_only else {}
            if self.random.random() < 0.5:
                name = self.random.randrange(NUM_ARTIFACTS)
                version = self.random.randint(1, self.newest[name])
                interventions.append({"artifact": f"soak-{name}@{version}", "scope": scope})
                steps.append(self.named(name, version, generated_only))
            else:
                step = Step(self.random.choice(OPS), self.random.randrange(LAYERS),
                            vector(99, self.random.randrange(10**6), self.oracle.d_model), generated_only,
                            tuple(self.random.sample(range(self.oracle.d_model), 12)))
                interventions.append({"op": step.op, "layers": [step.layer], "inline": step.inline(), "scope": scope})
                steps.append(step)
        self.counts.update(step.op for step in steps)
        return ({"interventions": interventions} if interventions else {}), steps


async def client(soak: Soak, until: float) -> None:
    words = ["The", "cat", "sat", "near", "Monday", "is", "a", "day", "she", "felt"]
    while time.monotonic() < until:
        draw = soak.random.random()
        if draw < 0.04:
            async with soak.library_lock:  # who stores knows which version it will be
                await (soak.store(soak.random.randrange(NUM_ARTIFACTS)) if draw < 0.02 else soak.switch_preset())
        prompt = " ".join(soak.random.choices(words, k=soak.random.randint(1, 60)))
        steering, steps = soak.pick()
        if draw > 0.9 and soak.presets:
            steering, steps = {"preset": PRESET}, []
        body = {"model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1,
                "ignore_eos": True, "steering": steering}
        if soak.random.random() < 0.1:
            await abort(soak, body)
            continue
        answer = await soak.http.post("/v1/completions", json=body)
        soak.counts["requests"] += 1
        if answer.status_code != 200:
            soak.counts[f"status {answer.status_code}"] += 1
            soak.wrong.append(answer.text[:300])
            continue
        if steering.get("preset"):
            found = int(answer.json()["steering"]["presets"]["preset"].rpartition("@")[2])
            steps = [soak.named(*soak.presets[found])]
        if soak.random.random() < 0.1:
            async with soak.oracle_lock:  # its hooks are on one model
                await asyncio.to_thread(compare, soak, prompt, steps, answer.json())


async def abort(soak: Soak, body: dict[str, Any]) -> None:
    """Read a little of a stream and go away."""
    async with soak.http.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 60}) as answer:
        async for _ in answer.aiter_lines():
            if soak.random.random() < 0.4:
                break
    soak.counts["aborts"] += 1


def compare(soak: Soak, prompt: str, steps: list[Step], answer: dict[str, Any]) -> None:
    ids, logprobs, leads = soak.oracle.answer(prompt, steps)
    given = answer["choices"][0]["logprobs"]
    soak.counts["checked"] += 1
    for i, expected in enumerate(logprobs):
        if abs(given["token_logprobs"][i] - expected) > 1e-3:
            if min(leads[:i + 1]) < 1e-3:
                return
            soak.wrong.append(f"{prompt[:60]!r} token {i}: {given['token_logprobs'][i]:.5f}, oracle {expected:.5f}, "
                              f"steps {[(s.op, s.layer, s.generated_only) for s in steps]}")
            return


def memory() -> float:
    """MiB of this process and all that it started."""
    me = psutil.Process()
    return sum(p.memory_info().rss for p in (me, *me.children(recursive=True))) / 2**20


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    oracle = Oracle()
    slots = {"slots": 24, "max_requests": 32, "kv_cache_tokens": 4096}
    async with running_server(MODEL, engine=arguments.engine, **slots) as url, \
            httpx.AsyncClient(base_url=url, timeout=600) as http:
        soak = Soak(http, oracle, random.Random(arguments.seed))
        for name in range(NUM_ARTIFACTS):
            await soak.store(name)
        await soak.switch_preset()
        start = time.monotonic()
        end = start + 60 * arguments.minutes
        telling = asyncio.create_task(_tell(soak, start))
        await asyncio.gather(*(client(soak, end) for _ in range(arguments.clients)))
        telling.cancel()
        soak.memory_mib.append(memory())
        health = (await http.get("/health")).status_code
        gauges = [line for line in (await http.get("/metrics")).text.splitlines()
                  if line.startswith('trimtab_engine{stat="slots_used"}')]
    result = {"engine": arguments.engine, "minutes": arguments.minutes, "clients": arguments.clients,
              "counts": dict(soak.counts), "wrong": len(soak.wrong), "health": health, "slots_used": gauges,
              "memory_mib_by_minute": [round(m) for m in soak.memory_mib]}
    console = Console()
    console.print(result)
    for text in soak.wrong[:10]:
        console.print(text, style="red")
    assert not soak.wrong and health == 200 and gauges[0].endswith(" 0.0")
    return result


async def _tell(soak: Soak, start: float) -> None:
    """A line every minute, so that a soak that is cut short has shown something."""
    console = Console()
    while True:
        await asyncio.sleep(60)
        soak.memory_mib.append(memory())
        console.print(f"{(time.monotonic() - start) / 60:.0f} min: {dict(soak.counts)}, {len(soak.wrong)} wrong, "
                      f"{soak.memory_mib[-1]:.0f} MiB")


if __name__ == "__main__":
    parser = options_of(__doc__)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="vllm")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    run(parser, main)
