"""What the engine tells its workers to attach, and the hash that keeps stale compiled graphs away.

vLLM keys its compiled artifacts by environment, configuration and version, before tracing: a graph compiled without
our hooks, or with others, would be loaded again and silently do nothing. The manifest travels in `additional_config`,
which is part of that key, and holds a hash of the sources that are traced.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from steering.acting import containment
from steering.acting.containment import LimitAction, StepLimit
from steering.language.vocabulary import Op, Site

GraphOps = Literal["vectors", "all"]
"""What a place in the graph can do: part 1 without norms, or all of a stage."""
VECTOR_OPS: tuple[Op, ...] = ("add", "affine", "patch", "mask", "neuron_mask", "head_mask")
STAGE_OPS: dict[GraphOps, tuple[Op, ...]] = {
    "vectors": VECTOR_OPS, "all": (*VECTOR_OPS, "ablate", "clamp", "rotate", "sign_flip", "manifold")}
"""Ops that come down to stages. Whether a program does is seen when it is placed: options, ranks and depths count."""
TRACED = (*(Path(__file__).parent / "worker" / name for name in ("attach.py", "fuse.py", "ops.py", "stage.py")),
          Path(containment.__file__))


@dataclass(frozen=True)
class Manifest:
    """sites: hooked. graph_sites: those of them whose simple programs live in the compiled graph, graph_ops: which.

    slots: programs resident at a time. rows: vectors of one width that the graph's pool holds. depth, rank: stages at
    one place, directions of one stage. kept_bytes: of completions that may be measured later. largest_step,
    step_action: the limit on steps. sources: hash of traced files.
    """

    sites: tuple[Site, ...]
    graph_sites: tuple[Site, ...]
    graph_ops: GraphOps
    slots: int
    rows: int
    depth: int
    rank: int
    kept_bytes: int
    largest_step: float
    step_action: LimitAction
    sources: str

    @property
    def limit(self) -> StepLimit:
        return StepLimit(self.largest_step, self.step_action)

    @classmethod
    def build(cls, **given: Any) -> "Manifest":
        return cls(sources=source_hash(), **given)

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> "Manifest":
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
                                  for name, value in given.items()}
        return cls(**values)


def source_hash() -> str:
    state = hashlib.sha256()
    for path in TRACED:
        state.update(path.read_bytes())
    return state.hexdigest()[:16]
