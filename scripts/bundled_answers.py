"""`python -m scripts.bundled_answers [NAME...]`: measures what bundled artifacts whose recipes go by first tokens do to
whole answers, and puts it on their cards. It takes half a minute.
"""

import re
import sys
from collections.abc import Mapping
from typing import Any

from lab.paths import LAB_DIR
from lab.replications.answers import Asked, jobs, measured, shown, task, verdict, weekday
from lab.replications.common import subject
from scripts.bundled_recipes import FROM_RECIPES
from vectors.artifact import Limits
from vectors.formats import get_format

ASKED: Mapping[tuple[str, str], Asked] = {
    ("lab-dense", "plural"): task("plural", "plural"),
    ("lab-dense", "to-french"): task("noun_to_french", "French"),
    ("lab-dense", "in-context-heads"): shown(),
    ("lab-dense", "job-neurons"): jobs(),
    ("lab-dense", "weekdays"): weekday("Thursday"),
    ("lab-moe", "plural"): task("plural", "plural"),
}


def main(names: list[str]) -> None:
    own = get_format("safetensors")
    for (model, name), asked in ASKED.items():
        if names and name not in names:
            continue
        path = LAB_DIR / "artifacts" / model / f"{name}.safetensors"
        metadata, payload = own.read(path.read_bytes(), {}, Limits())
        found = measured(subject(model), metadata, payload, asked)
        card = {**(metadata.card or {}), "whole_answers": {**found, "verdict": verdict(found)}}
        path.write_bytes(own.write(metadata.model_copy(update={"card": card}), payload))
        print(f"{model}/{name}: {found['untouched']:.0%}, {found['steered']:.0%}: {card['whole_answers']['verdict']}",
              flush=True)


def document() -> str:
    """The table of all of them and their texts, for docs/outcomes.md."""
    lines = ["## Artifacts of recipes", "",
             "Greedy answers of six tokens to test prompts, right where they name the right word first; 20 random "
             "artifacts of equal size.", "",
             "| artifact | measured | untouched | steered | random: min, mean, max | verdict |",
             "|---|---|---|---|---|---|"]
    texts: list[str] = []
    for (model, name), card in cards().items():
        drawn = card["random"]
        lines.append(f"| {name} ({model}) | {card['measured']}, of {card['prompts']} | {card['untouched']:.0%} | "
                     f"{card['steered']:.0%} | {drawn['min']:.0%}, {drawn['mean']:.0%}, {drawn['max']:.0%} | "
                     f"{card['verdict']} |")
        texts += ["", f"### {name} of {model}", "", "| prompt | untouched | steered | random |", "|---|---|---|---|"]
        for one in card["samples"]:
            said = [f"{_cell(text)} ({outcome})" for text, outcome in zip(one["texts"], one["outcomes"], strict=True)]
            texts.append(f"| {_cell(one['prompt'])} | {' | '.join(said)} |")
    return "\n".join([*lines, *texts])


def cards() -> dict[tuple[str, str], dict[str, Any]]:
    """What was measured, of each artifact."""
    own = get_format("safetensors")
    found = {}
    for model, name in ASKED:
        metadata, _ = own.read((LAB_DIR / "artifacts" / model / f"{name}.safetensors").read_bytes(), {}, Limits())
        found[model, name] = (metadata.card or {})["whole_answers"]
    return found


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    assert {name for _, name in ASKED} <= {one.name for one in FROM_RECIPES}
    main(sys.argv[1:])
