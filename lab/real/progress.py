"""What a run of all claims has done so far: `build/real` holds the library of its server and which claims it finished,
so that a run that stopped goes on.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from lab.real.claims import Claim

FOLDER = Path(__file__).parents[2] / "build" / "real"


@dataclass(frozen=True)
class Progress:
    """done: claims by name, with the digest of what they were when they were measured."""

    folder: Path

    @property
    def done(self) -> dict[str, str]:
        path = self.folder / "done.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def left(self, claims: list[Claim]) -> list[Claim]:
        """A claim that has changed since then is not done."""
        done = self.done
        return [claim for claim in claims if done.get(claim.name) != digest(claim)]

    def finish(self, claim: Claim) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "done.json").write_text(json.dumps({**self.done, claim.name: digest(claim)}, indent=1) + "\n")

    def forget(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def digest(claim: Claim) -> str:
    """Of everything that is measured; not of what is said about it."""
    said = {key: value for key, value in asdict(claim).items() if key not in ("title", "claim", "read", "report")}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=list).encode()).hexdigest()
