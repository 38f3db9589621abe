"""`trimtab verify` on a bundled model with both engines, all tests that need a GPU, and a verdict on all of it.

    python -m scripts.gpu_check [--minutes 12]

Ends with 0 if everything passed, 1 if something failed, 2 if nothing could be checked.
"""

import argparse
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).parent.parent
FILES = ("tests/gpu/test_staging.py", "tests/gpu/test_replay.py", "tests/gpu/test_engines.py")
VERIFIED = (("transformers", "bfloat16"), ("vllm", "bfloat16"))
NOTHING_CHECKED = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12.0, help="after which what still runs counts as failed")
    wanted = parser.parse_args()
    if not torch.cuda.is_available():
        print("VERDICT: nothing checked, torch sees no GPU here.")
        return NOTHING_CHECKED
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    deadline = time.monotonic() + 60 * wanted.minutes
    outcomes = {f"verify, {engine} in {dtype}": verify(engine, dtype, deadline - time.monotonic())
                for engine, dtype in VERIFIED}
    outcomes |= {name: run(name, deadline - time.monotonic()) for name in FILES}
    wrong = [name for name, counts in outcomes.items() if not counts["passed"] or counts["failed"]]
    print()
    for name, counts in outcomes.items():
        print(f"{name:32} {counts['passed']:3} passed {counts['failed']:3} failed {counts['skipped']:3} skipped "
              f"{counts['seconds']:4} s")
    print(f"VERDICT: {'failed in ' + ', '.join(wrong) if wrong else 'all passed'}.")
    return 1 if wrong else 0


def verify(engine: str, dtype: str, seconds: float) -> Counter[str]:
    """Whether `trimtab verify lab-dense` passes."""
    began = time.monotonic()
    command = [sys.executable, "-c", "from server.cli import app; app()", "verify", "lab-dense", "--engine", engine,
               "--dtype", dtype]
    try:
        passed = subprocess.run(command, cwd=ROOT, timeout=max(1.0, seconds), check=False).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"verify with {engine}: not done in time")
        passed = False
    return Counter(passed=int(passed), failed=int(not passed), skipped=0, seconds=round(time.monotonic() - began))


def run(name: str, seconds: float) -> Counter[str]:
    """Outcomes of the tests of one file that need a GPU."""
    if seconds <= 0:
        return Counter(failed=1)
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider",
                   f"--junit-xml={report}", name]
        try:
            subprocess.run(command, cwd=ROOT, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            print(f"{name}: not done in time")
        counts = counted(report)
    counts["seconds"] = round(time.monotonic() - began)
    return counts


def counted(report: Path) -> Counter[str]:
    """Outcomes in a report of pytest. One that was never written is a failure."""
    if not report.exists():
        return Counter(failed=1)
    counts: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        counts["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    return counts


if __name__ == "__main__":
    sys.exit(main())
