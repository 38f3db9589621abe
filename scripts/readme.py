"""Fills the README's texts and table, and docs/outcomes.md, from the software itself:
`python -m scripts.readme`.
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from trimtab_client import AsyncClient

from lab.paths import model_path
from lab.real.claims import CLAIMS
from lab.real.page import stored
from scripts import bundled_answers
from scripts.bundled_library import FOLDER, MAX_TOKENS, MODEL
from scripts.docs import DOCS
from scripts.examples import EXAMPLES
from scripts.running import running_server
from server.cli.examples import fill_library
from server.observability.logs import configure_logging
from server.settings import Settings
from vectors.artifact import Limits
from vectors.formats import get_format

README = DOCS.parent / "README.md"
# What README opens with: the preset, the number of the test of the claim `cheerful`, and that of the text. Claims are
# measured in bfloat16; these texts are the same in float32, which `make serve` has on a CPU.
REAL = (("cheerful", 0, 9), ("cheerful", 0, 12), ("gloomy", 1, 10))
OPENING = "Review of a hotel. I stayed at it with my team on Monday."
SIDES = {"base": MODEL, "cheerful": f"{MODEL}:cheerful", "gloomy": f"{MODEL}:gloomy"}


def real() -> str:
    """Texts of docs/real-model.md's results, before and after."""
    rows = ["| prompt | untouched | steered | |", "|---|---|---|---|"]
    result = next(stored(claim) for claim in CLAIMS if claim.name == "cheerful")
    assert result is not None, "run make replications-real"
    for name, test, text in REAL:
        one = result["tests"][test]["texts"][text]
        rows.append(f"| {_cell(one['prompt'])} | {_cell(one['untouched'])} | {_cell(one['ours'])} | `{name}` |")
    return "\n".join(rows)


async def transcript() -> str:
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"model": str(model_path(MODEL)), "data_dir": Path(folder)}
        fill_library(Settings(**settings), MODEL)
        async with running_server(MODEL, data_dir=Path(folder)) as url, AsyncClient(url) as client:
            answers = {name: await client.complete(OPENING, model=model, max_tokens=MAX_TOKENS, temperature=0)
                       for name, model in SIDES.items()}
    rows = [f"| {name} | {' '.join(answer.text.split())} |" for name, answer in answers.items()]
    return "\n".join([f"The bundled model goes on from *{OPENING}* (greedy, {MAX_TOKENS} tokens):", "",
                      "| | |", "|---|---|", *rows])


def cards() -> dict[str, dict[str, Any]]:
    """The cards of the artifacts that were chosen by their effect."""
    found = {}
    for example in EXAMPLES:
        metadata, _ = get_format("safetensors").read((FOLDER / f"{example.name}.safetensors").read_bytes(), {},
                                                     Limits())
        found[example.name] = metadata.card or {}
    return found


def effects() -> str:
    rows = []
    for name, card in cards().items():
        test, random = card["test"], card["controls"]["random_vectors"]
        rows.append(_row(name, card["target"], test, random, test["prompts"]))
        if "opposite" in test:
            rows.append(_row(f"{name}, negative", test["opposite"]["grader"]["wanted"], test["opposite"], None,
                             test["prompts"]))
        if "spared" in test:
            rows.append(_row(f"{name}, on requests it should leave alone", card["target"], test["spared"], None,
                             test["spared"]["prompts"]))
    return "\n".join([
        "Share of whole answers that are as the artifact means them, by [graders](docs/graders.md), on prompts that "
        "neither training, extraction nor the choice of layer and strength has seen, sampled at temperature 1. A "
        "broken answer never counts. Made by `make library`; [texts of every row](docs/outcomes.md).", "",
        "| artifact | answers | unsteered | steered | broken, unsteered and steered | 20 random vectors of the same "
        "norm, median (max) | prompts |", "|---|---|---|---|---|---|---|", *rows])


def _row(name: str, target: str, shares: dict[str, Any], random: dict[str, Any] | None, prompts: int) -> str:
    control = "" if random is None else f"{random['median']:.0%} ({random['max']:.0%})"
    before = shares.get("unsteered_broken")
    broken = f"{shares['broken']:.0%}" if before is None else f"{before:.0%}, {shares['broken']:.0%}"
    return (f"| {name} | {target} | {shares['unsteered']:.0%} | {shares['steered']:.0%} | {broken} | {control} | "
            f"{prompts} |")


def outcomes() -> str:
    """docs/outcomes.md: texts behind each row of the table."""
    lines = ["# What the bundled artifacts of lab-dense and lab-moe make the model write", "",
             "Made by `python -m scripts.readme` from the artifacts' cards; do not edit by hand. Test prompts, "
             "temperature 1, the same seed in each column; the last column is the first of 20 random vectors of the "
             "same norm. In brackets is what the grader says. What recipes made stands at the end.", "",
             effects().replace("](docs/", "](")]
    for name, card in cards().items():
        where = ", ".join(map(str, card["layers"]))
        lines += ["", f"## {name}", "", f"{card['for']} Layer {where}, strength {card['strength']['value']:g}.", "",
                  "| prompt | untouched | steered | random |", "|---|---|---|---|"]
        for sample in card["samples"]:
            texts = [f"{_cell(sample[key])} ({outcome})" for key, outcome in
                     zip(("untouched", "steered", "random"), sample["outcomes"], strict=True)]
            lines.append(f"| {_cell(sample['prompt'])} | {' | '.join(texts)} |")
    return "\n".join([*lines, "", bundled_answers.document()]) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def replaced(text: str, name: str, content: str) -> str:
    head, rest = text.split(f"<!-- {name} -->")
    _, tail = rest.split(f"<!-- /{name} -->")
    return f"{head}<!-- {name} -->\n{content}\n<!-- /{name} -->{tail}"


if __name__ == "__main__":
    configure_logging("console")
    page = README.read_text(encoding="utf-8")
    page = replaced(page, "real", real())
    page = replaced(page, "transcript", asyncio.run(transcript()))
    README.write_text(replaced(page, "effects", effects()), encoding="utf-8")
    (DOCS / "outcomes.md").write_text(outcomes(), encoding="utf-8")
