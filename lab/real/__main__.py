"""`python -m lab.real [CLAIM...]`: make and test the claims about SmolLM2, all or those named, on servers of its own;
write `results/CLAIM.json`, the bundled artifacts, docs/real-model.md and its picture. Under 40 minutes on two idle
cores: two servers of one thread each share the claims.

Each claim is written when it is measured. A run of all claims that stopped goes on where it was, with the libraries
that it had (`build/real`); `--anew` begins again. Claims that are named while a run stands still belong to it.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock

from trimtab_client import Client

from lab.real import bundle, page
from lab.real.claims import CLAIMS, Claim
from lab.real.clock import Clock
from lab.real.measure import run
from lab.real.picture import drawn
from lab.real.progress import FOLDER, Progress
from lab.real.serving import serving

MODEL = "smollm2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help="Which; those that they build on come with them.")
    parser.add_argument("--servers", type=int, default=2, help="How many share the claims, of one thread each.")
    parser.add_argument("--anew", action="store_true", help="Forget what a run that stopped has done.")
    parser.add_argument("--page", action="store_true", help="Only write the page and the presets anew.")
    options = parser.parse_args()
    names = [claim.name for claim in CLAIMS]
    if unknown := set(options.claims) - set(names):
        sys.exit(f"no claim is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if not options.page:
        with ExitStack() as stack:
            if options.anew:
                Progress(FOLDER).forget()
            whole = not options.claims or FOLDER.exists()
            progress = Progress(FOLDER if whole else Path(stack.enter_context(tempfile.TemporaryDirectory())))
            measure(progress, wanted(options.claims or names), options.servers)
        if not progress.left(list(CLAIMS)):
            progress.forget()
    write()


def wanted(names: Sequence[str]) -> list[Claim]:
    """The claims of these names and those whose artifacts they use, in the order of the page."""
    used = {needed for claim in CLAIMS if claim.name in names for needed in claim.needs}
    return [claim for claim in CLAIMS if claim.name in {*names, *used}]


def measure(progress: Progress, claims: Sequence[Claim], servers: int) -> None:
    left = progress.left(list(claims))
    if len(left) < len(claims):
        print(f"A run that stopped goes on: {len(claims) - len(left)} of {len(claims)} claims are done.", flush=True)
    # A claim that uses another's artifact is measured behind it, on the same server.
    queue: SimpleQueue[list[Claim]] = SimpleQueue()
    for claim in left:
        if not any(needed.name in claim.needs for needed in left):
            queue.put([claim, *(other for other in left if claim.name in other.needs)])
    writing = Lock()
    with ThreadPoolExecutor(servers) as workers:
        for done in [workers.submit(work, progress, queue, writing, number) for number in range(servers)]:
            done.result()


def work(progress: Progress, queue: SimpleQueue[list[Claim]], writing: Lock, number: int) -> None:
    """Measure claims on a server until none is left."""
    with serving(progress.folder / str(number), MODEL, "--no-examples", "--dtype", "bfloat16", threads=1) as (
            process, url), Client(url, timeout=1800.0) as client:
        while True:
            try:
                claims = queue.get_nowait()
            except Empty:
                return
            for claim in claims:
                bundle.bring(client, claim.needs)
                result = run(client, claim, Clock(process.pid))
                with writing:
                    page.store(claim, result)
                    bundle.fetch(client, claim, result)
                    write()
                    progress.finish(claim)
                for one in page.findings(result):
                    print(f"{claim.name}: {one}", flush=True)


def write() -> None:
    results = [found for claim in CLAIMS if (found := page.stored(claim)) is not None]
    drawn(results).savefig(page.PATH.parent / page.PICTURE, dpi=90, metadata={"Software": None})
    bundle.finish()
    bundle.write_presets()
    page.PATH.write_text(page.document(), encoding="utf-8")


if __name__ == "__main__":
    main()
