"""docs/replications.md, from the results that are stored."""

from __future__ import annotations

import json
from pathlib import Path

from lab.replications.common import Row
from lab.replications.rows import ROWS

RESULTS = Path(__file__).parent / "results"
PATH = Path(__file__).parents[2] / "docs" / "replications.md"
HEAD = """# Replications: what the extraction methods find in the bundled models

Written by `make replications`; do not edit by hand. Each row runs a method of `vectors/extract` on committed data, as a
user would: layer and strength are chosen on dev, figures are of test, splits are by underlying item, and every control
has 20 random draws. A method that does not beat its control is reported as such. The models have 2 to 5 million
parameters, 6 layers and width 128: that a method works here says that it is built right, not how well it does on a
model a thousand times as large. `python -m lab.replications ROW` runs one row.
"""


def document() -> str:
    return "\n".join([HEAD, *(_section(row) for row in ROWS if (RESULTS / f"{row.name}.json").exists())])


def _section(row: Row) -> str:
    stored = json.loads((RESULTS / f"{row.name}.json").read_text(encoding="utf-8"))
    lines = [f"## {row.title}", "", f"**The claim.** {row.claim}", "",
             f"![{row.title}](../lab/replications/results/{row.name}.png)", "",
             f"On {row.model}. [All figures](../lab/replications/results/{row.name}.json).", "",
             "| measured | ours | control | verdict |", "|---|---|---|---|"]
    lines += [f"| {f.measured} | {f.ours} | {f.control} | {f.verdict} |" for f in row.findings(stored)]
    if row.notes:
        lines += ["", row.notes]
    return "\n".join([*lines, ""])
