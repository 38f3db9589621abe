"""What `trimtab verify` found, its verdict, and both as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from server.verify.effect import Effect
from server.verify.exactness import Exact
from server.verify.overhead import Arm

# Share of the stock engine's tokens per second that must be left where nothing is steered. Below it, something other
# than noise is wrong; what is usual stands in docs/benchmarks.md.
LEAST_IDLE = 0.7


@dataclass(frozen=True)
class Report:
    """where: model, engine, device, dtype and versions. overhead: None where it was not to be measured."""

    where: Mapping[str, Any]
    exactness: Sequence[Exact]
    overhead: Mapping[str, Arm] | None
    effect: Effect
    seconds: float

    @property
    def verdicts(self) -> dict[str, bool]:
        """Of each part, whether it holds. The best round counts for the overhead: a busy machine is no fault of it."""
        verdicts = {"exactness": bool(self.exactness) and all(one.exact for one in self.exactness),
                    "controls": self._controlled(),
                    "effect": self.effect.right}
        if self.overhead is not None:
            verdicts["overhead"] = self.overhead["idle"].highest >= LEAST_IDLE
        return verdicts

    def _controlled(self) -> bool:
        """In float32 every error must have been found. Half precision may round a small one away at some places, so
        there each op and each site must have one case in which both errors were found."""
        if self.where["dtype"] == "float32":
            return all(one.controlled for one in self.exactness)
        found = [one for one in self.exactness if one.controlled]
        return all({getattr(one, name) for one in self.exactness} == {getattr(one, name) for one in found}
                   for name in ("op", "site"))

    @property
    def passed(self) -> bool:
        return all(self.verdicts.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed, "verdicts": self.verdicts, "where": dict(self.where),
            "exactness": [asdict(one) | {"exact": one.exact, "controlled": one.controlled} for one in self.exactness],
            "overhead": None if self.overhead is None else {name: asdict(arm) for name, arm in self.overhead.items()},
            "effect": asdict(self.effect) | {"above": self.effect.above, "right": self.effect.right},
            "seconds": round(self.seconds, 1)}
