"""Run the replications, all or those named; write `results/ROW.json`, `results/ROW.png` and docs/replications.md."""

import json
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from lab.replications import page
from lab.replications.common import Finding, Row, run_row
from lab.replications.rows import ROWS


def main(names: list[str]) -> None:
    unknown = set(names) - {row.name for row in ROWS}
    if unknown:
        sys.exit(f"no replication is called {', '.join(sorted(unknown))}; there are {', '.join(r.name for r in ROWS)}")
    torch.set_num_threads(1)
    page.RESULTS.mkdir(exist_ok=True)
    for row in ROWS:
        if not names or row.name in names:
            start = time.monotonic()
            document = run_row(row)
            path = page.RESULTS / f"{row.name}.json"
            path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            picture(row, path)
            for finding in row.findings(document):
                print(line(finding), flush=True)
            print(f"{row.name}: {time.monotonic() - start:.0f} s", flush=True)
    page.PATH.write_text(page.document(), encoding="utf-8")


def picture(row: Row, path: Path) -> None:
    """Drawn from the file, so that what is seen is what is stored."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    row.draw(json.loads(path.read_text(encoding="utf-8")), figure)
    figure.savefig(path.with_suffix(".png"), dpi=90, metadata={"Software": None})


def line(finding: Finding) -> str:
    return f"{finding.measured} | {finding.ours} | {finding.control} | {finding.verdict}"


if __name__ == "__main__":
    main(sys.argv[1:])
