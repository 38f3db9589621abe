"""Run the replications, all or those named, and write `lab/replications/results/ROW.json`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lab.replications.common import extract, subject
from lab.replications.rows import ROWS
from vectors.extract.errors import FitFailed

RESULTS = Path(__file__).parent / "results"


def main(names: list[str]) -> None:
    unknown = set(names) - {row.name for row in ROWS}
    if unknown:
        sys.exit(f"no replication is called {', '.join(sorted(unknown))}; there are {', '.join(r.name for r in ROWS)}")
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    for row in ROWS:
        if names and row.name not in names:
            continue
        start = time.monotonic()
        reports: dict[str, Any] = {}
        for case, fields in row.cases(subject(row.model)):
            try:
                found = extract(row, case, fields)
            except FitFailed as error:
                # That a method finds nothing is a result, too.
                reports[case] = {"failed": str(error)}
                print(f"{case:28} failed: {error}", flush=True)
                continue
            reports[case] = dict(found.report)
            for what, figure in row.headline(dict(found.report)):
                print(f"{case:28} {what}: {json.dumps(figure)}", flush=True)
        document = {"claim": row.claim, "recipe": row.recipe, "model": row.model,
                    "fingerprint": subject(row.model).facts.fingerprint, "cases": reports}
        (RESULTS / f"{row.name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"{row.name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
