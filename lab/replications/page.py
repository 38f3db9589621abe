"""docs/replications.md, from the results that are stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lab.paths import LAB_DIR
from lab.replications.common import Finding, Row
from lab.replications.rows import ROWS
from vectors.artifact import Limits
from vectors.formats import get_format

RESULTS = Path(__file__).parent / "results"
PATH = Path(__file__).parents[2] / "docs" / "replications.md"
HEAD = """# Replications: what the extraction methods find in the bundled models

Written by `make replications`; do not edit by hand. Each row runs a method of `vectors/extract` on committed data, as a
user would: layer and strength are chosen on dev, figures are of test, splits are by underlying item, and every control
has 20 random draws. A method that does not beat its control is reported as such. The models have 2 to 5 million
parameters, 6 layers and width 128: that a method works here says that it is built right, not how well it does on a
model a thousand times as large. Each section says what was judged: whole answers by [graders](graders.md), texts that
are read, or the next token alone, of which no claim about texts is made. `python -m lab.replications ROW` runs one row.
"""


def document() -> str:
    return "\n".join([HEAD, *(_section(row) for row in ROWS if (RESULTS / f"{row.name}.json").exists())])


def _section(row: Row) -> str:
    stored = json.loads((RESULTS / f"{row.name}.json").read_text(encoding="utf-8"))
    lines = [f"## {row.title}", "", f"**The claim.** {row.claim}", "",
             f"![{row.title}](../lab/replications/results/{row.name}.png)", "",
             f"On {row.model}. [All figures](../lab/replications/results/{row.name}.json).", "",
             "| measured | ours | control | verdict |", "|---|---|---|---|"]
    found = [*row.findings(stored), *(_whole(name, card) for name, card in whole_answers(row.model).items()
                                      if name in row.bundled)]
    lines += [f"| {f.measured} | {f.ours} | {f.control} | {f.verdict} |" for f in found]
    lines += ["", f"**What was judged.** {row.judged}"]
    if row.notes:
        lines += ["", row.notes]
    return "\n".join([*lines, ""])


@cache
def whole_answers(model: str) -> dict[str, dict[str, Any]]:
    """What whole answers under bundled artifacts of a model are, by name, as `scripts.bundled_answers` measured it."""
    own = get_format("safetensors")
    found = {}
    for path in sorted((LAB_DIR / "artifacts" / model).glob("*.safetensors")):
        metadata, _ = own.read(path.read_bytes(), {}, Limits())
        if "whole_answers" in (metadata.card or {}):
            found[path.stem] = (metadata.card or {})["whole_answers"]
    return found


def _whole(name: str, card: Mapping[str, Any]) -> Finding:
    drawn = card["random"]
    return Finding(f"whole answers with the bundled `{name}`: {card['measured']}, of {card['prompts']}",
                   f"{card['steered']:.2f} (untouched {card['untouched']:.2f})",
                   f"random artifacts of equal size mean {drawn['mean']:.2f}, range {drawn['min']:.2f} to "
                   f"{drawn['max']:.2f} ({drawn['draws']} draws)", card["verdict"])
