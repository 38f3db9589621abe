"""Calibrates the bundled artifacts and checks their doses on held-out prompts: `python -m scripts.calibrate_bundled`.

Through the HTTP API of a server on lab-dense, as a user would do it. The cards go into the files of
lab/artifacts/lab-dense; curves and pictures to docs/calibration/; the table to docs/doses.md. Prompts of the train and
dev splits make the curves, those of the test split check them, with seeds of their own.
"""

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab_client import AsyncClient

from lab import datasets
from lab.corpus.chat import COMPLIANCE_MARKS, REFUSAL_MARKS
from lab.corpus.languages import MARKERS
from lab.corpus.sentiment import NEGATIVE, POSITIVE
from scripts.bundled_library import FOLDER, MODEL
from scripts.running import running_server
from server.observability.logs import configure_logging

DOCS = Path(__file__).parent.parent / "docs"
PICTURES = DOCS / "calibration"
RESULTS = PICTURES / "doses.json"
MAX_TOKENS = 24
MAX_PROMPTS = 96
POINTS = 8
DOSES = (0.1, 0.3, 1.0)
# Completions per dose: enough that their mean is known to a few per cent.
COMPLETIONS = 192
CONCURRENT = 48
BOUND = 0.25
FIRST_SEED = 10_000


@dataclass(frozen=True)
class Subject:
    """One artifact. prompts: data set of neutral ones; label: of the target prompts, where they are others."""

    name: str
    prompts: str
    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]
    label: str | None = None

    def of(self, splits: tuple[str, ...], label: str | None = None) -> list[Any]:
        """Prompts with a label, or of all labels in turn: as many of each, however many a split has."""
        found: dict[Any, dict[str, Any]] = {}
        for record in (record for split in splits for record in datasets.load(self.prompts, split)):
            if label is None or record["label"] == label:
                of_label = found.setdefault(record.get("label"), {})
                of_label[record["text"]] = record.get("messages", record["text"])
        # In an order that has nothing to do with the alphabet: the first ones stand for all.
        in_turn = zip(*([prompts[text] for text in sorted(prompts, key=hash_of)]
                        for _, prompts in sorted(found.items(), key=lambda item: str(item[0]))), strict=False)
        return [prompt for prompts in in_turn for prompt in prompts]

    def options(self) -> dict[str, Any]:
        return {"max_tokens": MAX_TOKENS, "points": POINTS, "target": {
            "prompts": self.of(("train", "dev"), self.label)[:MAX_PROMPTS],
            "scorer": {"kind": "words", "any": sorted(self.wanted), "none": sorted(self.unwanted)}}}


def hash_of(text: str) -> int:
    return sum((i + 1) * ord(letter) * 2654435761 for i, letter in enumerate(text)) % 2**32


def language(name: str) -> Subject:
    others = sorted({word for other, words in MARKERS.items() if other != name for word in words})
    return Subject(name, "language_neutral", tuple(MARKERS[name]), tuple(others))


SUBJECTS = (Subject("cheerful", "sentiment_neutral", tuple(POSITIVE), tuple(NEGATIVE)),
            Subject("refusal", "harmful_harmless", COMPLIANCE_MARKS, REFUSAL_MARKS, label="harmful"),
            language("french"), language("german"))


async def measured(client: AsyncClient, name: str, prompts: list[Any], dose: float) -> dict[str, float]:
    """Mean KL of held-out completions that ask for a dose, with its standard error and the strength it came down to."""
    gate = asyncio.Semaphore(CONCURRENT)
    steering = {"interventions": [{"artifact": name, "strength": {"kl": dose}}], "report": "summary"}

    async def one(number: int) -> tuple[float, float]:
        prompt = prompts[number % len(prompts)]
        ask = client.complete if isinstance(prompt, str) else client.chat
        async with gate:
            answer = await ask(prompt, model=MODEL, steering=steering, max_tokens=MAX_TOKENS, temperature=1.0,
                               seed=FIRST_SEED + number)
        effects = answer.steering.effects or {}
        scale = next(iter(answer.steering.applied[0].strength["scale"].values()))
        return float(effects["choices"][0]["total"]["kl"]["mean"]), float(scale)

    found = await asyncio.gather(*(one(number) for number in range(COMPLETIONS)))
    kl = [value for value, _ in found]
    mean = sum(kl) / len(kl)
    error = (sum((value - mean) ** 2 for value in kl) / (len(kl) - 1) / len(kl)) ** 0.5
    return {"dose": dose, "strength": found[0][1], "kl": round(mean, 4), "kl_error": round(error, 4),
            "off": round(mean / abs(dose) - 1, 4)}


async def calibrated(client: AsyncClient, subject: Subject) -> dict[str, Any]:
    """Card, files and held-out doses of one artifact."""
    file = FOLDER / f"{subject.name}.safetensors"
    artifact = await client.import_artifact(file.read_bytes())
    prompts = subject.of(("train", "dev"))[:MAX_PROMPTS]
    found = await client.calibrate(artifact.ref, prompts, **subject.options())
    setting = found.settings[0]
    (PICTURES / f"{subject.name}.json").write_text(json.dumps(setting, indent=1) + "\n")
    (PICTURES / f"{subject.name}.png").write_bytes(await client.calibration_plot(artifact.ref, format="png"))
    (PICTURES / f"{subject.name}.svg").write_bytes(await client.calibration_plot(artifact.ref, format="svg"))
    file.write_bytes(await client.download_artifact(artifact.ref))
    held_out = subject.of(("test",))
    rows = []
    for sign, side in ((1, setting["up"]), (-1, setting.get("down", []))):
        for dose in (dose for dose in DOSES if side and side[0]["kl"] <= dose <= max(p["kl"] for p in side)):
            rows.append(await measured(client, artifact.ref, held_out, sign * dose))
            print(subject.name, rows[-1], flush=True)
    return {"layers": setting["layers"], "op": setting["op"], "fingerprint": setting["fingerprint"],
            "prompts": len(prompts), "held_out_prompts": len(held_out), "doses": rows}


def page(results: dict[str, Any]) -> str:
    fingerprint = next(iter(results.values()))["fingerprint"]
    worst = max(abs(row["off"]) for found in results.values() for row in found["doses"])
    lines = [
        "# Doses of the bundled artifacts", "",
        "Made by `python -m scripts.calibrate_bundled`; do not edit by hand. Curves and figures lie in "
        "[calibration/](calibration/).", "",
        f"Model {MODEL} (`{fingerprint[:12]}`). The curves come from prompts of the train and dev splits, the figures "
        f"here from {COMPLETIONS} completions of {MAX_TOKENS} tokens at temperature 1 on prompts of the test split. "
        "Asked: the dose, in nats per generated token. Measured: `total.kl.mean`, with its standard error.", "",
        f"Largest deviation: {worst:.0%}; the bar is {BOUND:.0%}" + (", met." if worst <= BOUND else ", **not met**."),
        "",
        "| artifact | asked | raw strength | measured | off by |", "|---|---|---|---|---|"]
    for name, found in results.items():
        lines += [f"| {name} | {row['dose']:+g} | {row['strength']:.3g} | {row['kl']:.3f} ± {row['kl_error']:.3f} | "
                  f"{row['off']:+.0%} |" for row in found["doses"]]
    for name, found in results.items():
        layers = ", ".join(map(str, found["layers"]))
        lines += ["", f"## {name}", "", f"{found['op']}, layers {layers}; {found['prompts']} prompts. Grey: 20 random "
                  "artifacts of equal norm (median and range), the placebo floor.", "",
                  f"![{name}: dose, behaviour, surprise and degeneration](calibration/{name}.png)"]
    return "\n".join(lines) + "\n"


async def main(names: list[str]) -> None:
    configure_logging("console")
    PICTURES.mkdir(exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and names else {}
    async with running_server(MODEL, slots=64, slot_wait_s=600, shadow_sample=0.0) as url, AsyncClient(url) as client:
        for subject in SUBJECTS:
            if not names or subject.name in names:
                results[subject.name] = await calibrated(client, subject)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                (DOCS / "doses.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
