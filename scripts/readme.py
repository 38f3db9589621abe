"""Fills the README's transcript and table from the software itself: `python -m scripts.readme`."""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from trimtab_client import AsyncClient

from lab.paths import model_path
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
OPENING = "Review of a hotel. I stayed at it with my team on Monday."
SIDES = {"base": MODEL, "cheerful": f"{MODEL}:cheerful", "gloomy": f"{MODEL}:gloomy"}


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


def effects() -> str:
    """The bundled artifacts' cards."""
    rows = []
    for example in EXAMPLES:
        data = (FOLDER / f"{example.name}.safetensors").read_bytes()
        metadata, _ = get_format("safetensors").read(data, {}, Limits())
        card: dict[str, Any] = metadata.card or {}
        test = card["test"]
        rows.append(_row(example.name, card["target"], test, card["controls"]["random_vectors"], test["prompts"]))
        if "opposite" in test:
            rows.append(_row(f"{example.name}, negative", test["opposite"]["target"], test["opposite"], None,
                             test["prompts"]))
        if "spared" in test:
            rows.append(_row(f"{example.name}, on {example.spared} requests", card["target"], test["spared"], None,
                             test["spared"]["prompts"]))
    return "\n".join([
        "Share of answers that are as the artifact means them, on prompts that neither training, extraction nor the "
        "choice of layer and strength has seen, sampled at temperature 1. Made by `make library`; "
        "[a closer look at the first row](docs/sentiment.md).", "",
        "| artifact | answers | unsteered | steered | 20 random vectors of the same norm, median (max) | prompts |",
        "|---|---|---|---|---|---|", *rows])


def _row(name: str, target: str, shares: dict[str, Any], random: dict[str, Any] | None, prompts: int) -> str:
    control = "" if random is None else f"{random['median']:.0%} ({random['max']:.0%})"
    return f"| {name} | {target} | {shares['unsteered']:.0%} | {shares['steered']:.0%} | {control} | {prompts} |"


def replaced(text: str, name: str, content: str) -> str:
    head, rest = text.split(f"<!-- {name} -->")
    _, tail = rest.split(f"<!-- /{name} -->")
    return f"{head}<!-- {name} -->\n{content}\n<!-- /{name} -->{tail}"


if __name__ == "__main__":
    configure_logging("console")
    page = README.read_text(encoding="utf-8")
    page = replaced(page, "transcript", asyncio.run(transcript()))
    README.write_text(replaced(page, "effects", effects()), encoding="utf-8")
