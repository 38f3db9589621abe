"""`python -m lab.real [CLAIM...]`: make and test the claims about SmolLM2, all or those named, on a server of its own;
write `results/CLAIM.json`, the bundled artifacts, docs/real-model.md and its picture. Under 40 minutes on two
idle cores.
"""

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from trimtab_client import Client

from lab.real import bundle, page
from lab.real.claims import CLAIMS
from lab.real.measure import run
from lab.real.picture import drawn
from lab.real.serving import serving

MODEL = "smollm2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help="Which; those that they build on come with them.")
    parser.add_argument("--url", help="A server on smollm2 that runs already, whose library has none of these names.")
    parser.add_argument("--page", action="store_true", help="Only write the page and the presets anew.")
    options = parser.parse_args()
    names = [claim.name for claim in CLAIMS]
    if unknown := set(options.claims) - set(names):
        sys.exit(f"no claim is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if not options.page:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            url = options.url or stack.enter_context(serving(folder, MODEL, "--no-examples", "--dtype", "bfloat16"))[1]
            measure(stack.enter_context(Client(url, timeout=1800.0)), options.claims or names)
    results = [found for claim in CLAIMS if (found := page.stored(claim)) is not None]
    drawn(results).savefig(page.PATH.parent / page.PICTURE, dpi=90, metadata={"Software": None})
    bundle.finish()
    bundle.write_presets()
    page.PATH.write_text(page.document(), encoding="utf-8")


def measure(client: Client, names: list[str]) -> None:
    page.RESULTS.mkdir(exist_ok=True)
    for claim in CLAIMS:
        if claim.name in names:
            result = run(client, claim)
            (page.RESULTS / f"{claim.name}.json").write_text(
                json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            bundle.fetch(client, claim, result)
            for one in page.findings(result):
                print(f"{claim.name}: {one}", flush=True)
            print(f"{claim.name}: {result['seconds']}", flush=True)


if __name__ == "__main__":
    main()
