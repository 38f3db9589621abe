"""Which arm of a roll-out a request belongs to: a pure hash, so that every server says the same and nothing is kept."""

import hashlib
from dataclasses import dataclass
from typing import Literal

ArmName = Literal["stable", "candidate"]
_MOST = 2**64


@dataclass(frozen=True)
class Arm:
    """A request's arm. target: the alias. ref: the version that acts. beside: the version of the other arm."""

    rollout: str
    target: str
    arm: ArmName
    ref: str
    beside: str


@dataclass(frozen=True)
class Asking:
    """Who asks, as far as arms go by it. unit: what sticks to its arm, a user of a tenant say. key_id: None for the key
    of the settings."""

    unit: str
    key_id: str | None = None


def place_of(rollout: str, unit: str) -> float:
    """A number in [0, 1) that a unit has in a roll-out. It is in the candidate's arm where the number is below the
    share, so a unit that is in it stays in it while the share grows."""
    digest = hashlib.sha256(f"{rollout}\n{unit}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / _MOST
