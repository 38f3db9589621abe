"""`python -m benchmarks.hour`: what a new user does in the first hour, on SmolLM2, with demands on what comes out.

It serves the model, makes a vector for a tone and one for a language from 40 pairs each, applies them by name, sets a
dose, evaluates them beside random vectors of equal length, and publishes a preset. The pairs and prompts are other ones
than those that the settings of trials were chosen on. It prints the texts, writes the figures as JSON (`--json`), and
ends with 1 where a demand is not met. 24 minutes of one core.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from trimtab_client import Client

from benchmarks.hour.demands import Figures, of_language, unmet
from benchmarks.hour.pairs import FRENCH_PROMPTS, NEUTRAL_PROMPTS, TONE_PROMPTS, asked, french, tone
from lab.real.clock import Clock
from lab.real.serving import serving

INSTRUCTION = "Answer in French."
# Names of their own, so that no bundled example's are versioned.
TONE, LANGUAGE = "hour-cheerful", "hour-french"
# Texts that an evaluation keeps of an arm.
MOST_SAMPLES = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="Where the figures go.")
    parser.add_argument("--model", default="smollm2", help="The demands are about smollm2.")
    parser.add_argument("--draws", type=int, default=20, help="Random vectors beside the tone.")
    parser.add_argument("--prompts", type=int, help="Of each kind of prompts, how many are used; by default all.")
    parser.add_argument("--effort", default="normal", help="Of the trial of the tone.")
    parser.add_argument("--tokens", type=int, default=24, help="Written to each of them.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), options.model) as (process, url), \
            Client(url, timeout=1800.0) as client:
        clock = Clock(process.pid)
        figures = hour(client, clock, options)
    figures.seconds = clock.seconds
    if options.json is not None:
        options.json.write_text(json.dumps(figures.as_dict(), indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({**figures.as_dict(), "texts": len(figures.texts)}, indent=1))
    missed = unmet(figures)
    for reason in missed:
        print("NOT MET:", reason)
    return 1 if missed else 0


def hour(client: Client, clock: Clock, options: argparse.Namespace) -> Figures:
    # The effort `quick` tries too few texts to tell the best layers from the next ones.
    made = client.extract(tone(), name=TONE, trial={"effort": options.effort})
    clock.lap("tone: extraction")
    tell(TONE, client.get_artifact(made.artifact).card)
    made = client.extract(french(), name=LANGUAGE, trial={"grader": {"kind": "language", "language": "fr"},
                                                          "instruction": INSTRUCTION})
    clock.lap("french: extraction")
    tell(LANGUAGE, client.get_artifact(made.artifact).card)

    unchanged = []
    for name, prompt in ((TONE, TONE_PROMPTS[0]), (LANGUAGE, FRENCH_PROMPTS[0])):
        plain = client.chat(prompt, max_tokens=32, temperature=0.0).text
        steered = client.chat(prompt, steering=applying(name), max_tokens=32, temperature=0.0).text
        print(f"{prompt}\n  untouched: {plain!r}\n  {name}: {steered!r}")
        if steered == plain:
            unchanged.append(name)

    client.calibrate(TONE, asked(NEUTRAL_PROMPTS),
                     points=3, draws=1, max_tokens=12, reach=(0.2, 1.0))
    dosed = client.chat(TONE_PROMPTS[0], steering=applying(TONE, strength={"kl": 0.5}), max_tokens=32,
                        temperature=0.0)
    print(f"  {TONE}, 0.5 nats a token: {dosed.text!r}")
    clock.lap("tone: a dose")

    prompts = asked(TONE_PROMPTS[:options.prompts])
    kept = {"max_tokens": options.tokens, "samples": MOST_SAMPLES}
    report = client.evaluate(prompts, [{"kind": "sentiment"}], spec=applying(TONE),
                             draws=options.draws, **kept)
    clock.lap(f"tone: evaluation beside {options.draws} random vectors")
    untouched, result = report["untouched"], report["results"][0]
    best = max(result["random"], key=success, default=None)
    arms = {"untouched": untouched, "steered": result["steered"], **({} if best is None else {"best random": best})}
    # Of random vectors no text may be kept.
    texts = samples("tone", TONE_PROMPTS, {name: arm for name, arm in arms.items() if arm["samples"]})

    prompts = asked(FRENCH_PROMPTS[:options.prompts])
    spec = applying(LANGUAGE)
    language = [{"kind": "language", "language": "fr"}]
    steered = client.evaluate(prompts, language, spec=spec, draws=0, **kept)
    told = [[{"role": "user", "content": f"{turns[0]['content']} {INSTRUCTION}"}] for turns in prompts]
    instructed = client.evaluate(told, language, spec=spec, draws=0, **kept)
    clock.lap("french: evaluation beside the instruction")
    texts += samples("french", FRENCH_PROMPTS, {"untouched": steered["untouched"],
                                                "instructed": instructed["untouched"],
                                                "steered": steered["results"][0]["steered"]})

    client.create_preset("hour-sunny", applying(TONE), "A cheerful tone.")
    model = client.models()[0]
    sunny = client.chat(TONE_PROMPTS[0], model=f"{model}:hour-sunny", max_tokens=32, temperature=0.0)
    named = client.chat(TONE_PROMPTS[0], steering=applying(TONE), max_tokens=32, temperature=0.0)
    if sunny.text != named.text:
        unchanged.append("hour-sunny")
    clock.lap("a preset")
    return Figures(
        untouched=success(untouched), steered=success(result["steered"]),
        random=[success(arm) for arm in result["random"]],
        broken_untouched=broken(untouched), broken_steered=broken(result["steered"]),
        french=of_language(texts_of(steered["results"][0]["steered"]), "fr"),
        instructed=of_language(texts_of(instructed["untouched"]), "fr"),
        french_by_surprise=success(steered["results"][0]["steered"]), texts=texts, unchanged=unchanged)


def applying(name: str, **fields: Any) -> dict[str, Any]:
    return {"interventions": [{"artifact": name, **fields}]}


def success(arm: dict[str, Any]) -> float:
    return float(arm["graded"][0]["success"]["share"])


def broken(arm: dict[str, Any]) -> float:
    return float(arm["graded"][0]["broken"]["share"])


def texts_of(arm: dict[str, Any]) -> list[str]:
    return [sample["text"] for sample in arm["samples"]]


def samples(about: str, prompts: tuple[str, ...], arms: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every text that was kept of these arms, to be read."""
    found = []
    for n, prompt in enumerate(prompts[:min(len(arm["samples"]) for arm in arms.values())]):
        said = {name: {"text": arm["samples"][n]["text"], "outcome": arm["samples"][n]["outcomes"][0]}
                for name, arm in arms.items()}
        found.append({"about": about, "prompt": prompt, **said})
        print(f"{prompt}\n" + "\n".join(f"  {name} ({one['outcome']}): {one['text']!r}" for name, one in said.items()))
    return found


def tell(name: str, card: dict[str, Any] | None) -> None:
    trial = dict((card or {}).get("trial", {}))
    print(f"{name}: {json.dumps({key: value for key, value in trial.items() if key != 'effects'}, ensure_ascii=False)}")
    print(f"{name}: draft: {(card or {}).get('draft')}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
