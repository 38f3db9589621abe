"""The one place where policies are checked: on the planned steps, behind the look-up and in front of the engine.

Names are compared before anything is looked up, so that a refusal tells nothing of what exists. Ops, sites and
strengths are read from the compiled program, because only there is known what acts.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from server.errors import PolicyViolation
from server.identity.policy import Held, matches
from server.requests.plan import Planned, own_numbers
from steering.language.errors import Path
from steering.language.spec import Steering
from steering.ops import get_operation
from steering.programs.gate import gates_of
from steering.programs.program import Compiled, Program
from vectors.library.presets import Preset
from vectors.library.tables import Collection

# What the operator asks for, of which no rule is.
OWN = ("default", "policy")
# Lowering a strength does not lower its nats in proportion, so that takes some tries.
MOST_TRIES = 16
# What rounding may add to a sum that was clipped to a ceiling.
SLACK = 1e-4


def check_asked(held: Sequence[Held], steering: Steering) -> None:
    """What a request asks for beside its steps. Raises PolicyViolation."""
    for one in held:
        if steering.contrast is not None and steering.contrast.beta:
            for rule in ("most_rel", "most_nats"):
                if getattr(one.policy, rule) is not None:
                    raise one.violated(rule, "how strong a contrast is cannot be told", ("steering", "contrast"))
        if not one.policy.reports and steering.report != "none":
            raise one.violated("reports", "no report may be asked for", ("steering", "report"))
        if steering.monitor:
            check_captures([one], ("steering", "monitor"))
        for i, watch in enumerate(steering.monitor):
            _check_artifact(one, watch.artifact, ("steering", "monitor", i))
        limits = [] if steering.guard is None else steering.guard.monitor
        if limits:
            check_captures([one], ("steering", "guard", "monitor"))
        for i, limit in enumerate(limits):
            _check_artifact(one, limit.artifact, ("steering", "guard", "monitor", i))


def check_captures(held: Sequence[Held], param: Path) -> None:
    for one in held:
        if not one.policy.captures:
            raise one.violated("captures", "no activations may be read", param)


def check_lens(held: Sequence[Held], lens: str) -> None:
    """lens: "logit", or the artifact that is read through. Raises PolicyViolation."""
    check_captures(held, ("lens",))
    for one in held:
        if lens != "logit":
            _check_artifact(one, lens, ("lens",))


def check_artifact_read(held: Sequence[Held], ref: str) -> None:
    """An artifact that activations are read through. Raises PolicyViolation."""
    check_captures(held, ("artifact",))
    for one in held:
        _check_artifact(one, ref, ("artifact",))


def check_job(held: Sequence[Held], name: str | None = None, *, op: str | None = None, site: str | None = None,
              reads: bool = False, adds_mandatory: bool = False, param: Path = ("name",)) -> None:
    """A job that writes texts: an evaluation, or one that makes or tries an artifact. Ceilings are not for it, because
    to find out what a strength does is what it is for.

    Args:
        name: of the artifact, with what it is for. reads: whether the job reads activations. adds_mandatory: whether
            it lets mandatory specs act. param: the field of the name.

    Raises:
        PolicyViolation.
    """
    for one in held:
        if one.policy.mandatory is not None and not adds_mandatory:
            raise one.violated("mandatory", "a job writes texts without the mandatory spec", (), fix="Use a key whose "
                               "requests have none.")
        if reads:
            check_captures([one], param)
        if name is not None:
            _check_artifact(one, name, param)
        for rule, wanted, allowed in (("ops", op, one.policy.ops), ("sites", site, one.policy.sites)):
            if wanted is not None and allowed is not None and wanted not in allowed:
                raise one.violated(rule, f"{wanted} is not among them", (rule[:-1],))


def check_preset(held: Sequence[Held], ref: str, param: Path) -> None:
    """Before and after it is resolved. Raises PolicyViolation."""
    for one in held:
        patterns = one.policy.presets
        name, _, version = ref.partition("@")
        if patterns is not None and not matches(name, patterns, version if version.isdigit() else None):
            raise one.violated("presets", f"the preset {ref[:100]!r} is not among them", param)


def allows_model(held: Sequence[Held], name: str) -> bool:
    with suppress(PolicyViolation):
        for one in held:
            one.check_model(name)
        return True
    return False


def allows_preset(held: Sequence[Held], preset: Preset) -> bool:
    """Whether its name and what it names pass; what acts is known when it is asked for."""
    given = [Planned(item, origin="model", preset=preset.ref) for item in preset.spec.interventions]
    with suppress(PolicyViolation):
        check_preset(held, preset.ref, ("model",))
        check_names(held, given)
        return True
    return False


def allows_version(held: Sequence[Held], collection: Collection, ref: str) -> bool:
    """Whether no policy is against a version of a preset or an artifact."""
    with suppress(PolicyViolation):
        if collection == "preset":
            check_preset(held, ref, ())
        else:
            for one in held:
                _check_artifact(one, ref, ())
        return True
    return False


def check_names(held: Sequence[Held], given: Sequence[Planned]) -> None:
    """Steps that are not looked up yet. Raises PolicyViolation."""
    asked = [item for item in given if item.origin not in OWN]
    for one in held:
        most = one.policy.most_interventions
        if most is not None and len(asked) > most:
            raise one.violated("most_interventions", f"{len(asked)} interventions, {most} are allowed",
                               asked[most].path)
        for item in asked:
            intervention = item.intervention
            if item.preset is None and not one.policy.raw_vectors:
                for field in own_numbers(intervention):
                    raise one.violated("raw_vectors", "the request gives numbers of its own", (*item.path, *field))
            if intervention.captured is not None:
                check_captures([one], (*item.path, "options", "source"))
            if intervention.artifact is not None:
                _check_artifact(one, intervention.artifact, _place(item, "artifact"))
            for gate in gates_of(intervention.gate):
                _check_artifact(one, gate.probe, _place(item, "gate"))


def _place(item: Planned, field: str) -> Path:
    """Where the request says what the rule is about. Of a preset, it only says which."""
    return item.path if item.preset is not None else (*item.path, field)


def _check_artifact(one: Held, ref: str, param: Path) -> None:
    patterns = one.policy.artifacts
    name, _, version = ref.partition("@")
    if patterns is not None and not matches(name, patterns, version if version.isdigit() else None):
        raise one.violated("artifacts", f"the artifact {ref[:100]!r} is not among them", param)


@dataclass(frozen=True)
class _Over:
    """Steps that are over a ceiling together, and what is to become of their strength."""

    rule: str
    told: str
    steps: tuple[int, ...]
    factor: float


def enforce(held: Sequence[Held], planned: tuple[Planned, ...], program: Program,
            compile: Callable[[tuple[Planned, ...]], Program]) -> tuple[tuple[Planned, ...], Program]:
    """Steps and program as the policies let them act: refused, or with lower strengths.

    Raises:
        PolicyViolation.
    """
    for one in held:
        _check_acting(one, planned, program)
        tries = 0
        while (over := _over(one, planned, program)) is not None:
            if one.policy.over == "refuse" or tries == MOST_TRIES:
                raise one.violated(over.rule, over.told, planned[over.steps[0]].path)
            note = f"the policy of {one.of} lowered it by its rule {over.rule}"
            planned = tuple(replace(item, factor=item.factor * over.factor, lowered=note) if j in over.steps else item
                            for j, item in enumerate(planned))
            program = compile(planned)
            tries += 1
    return planned, program


def _check_acting(one: Held, planned: Sequence[Planned], program: Program) -> None:
    policy = one.policy
    bounded = policy.most_rel is not None or policy.most_nats is not None
    for item, compiled in _asked(planned, program):
        ref = None if item.source is None else item.source.ref
        for resolved, field in [(ref, "artifact"), *((probe.ref, "gate") for probe in item.probes)]:
            if resolved is not None:
                _check_artifact(one, resolved, _place(item, field))
        if policy.ops is not None and compiled.op not in policy.ops:
            raise one.violated("ops", f"the op {compiled.op} is not among them", _place(item, "op"))
        for site in compiled.applied.sites:
            if policy.sites is not None and site not in policy.sites:
                raise one.violated("sites", f"the site {site} is not among them", _place(item, "site"))
        if bounded and not get_operation(compiled.op).adds_direction:
            if policy.ops is None:
                raise one.violated("most_rel" if policy.most_rel is not None else "most_nats",
                                   f"how strong the op {compiled.op} is cannot be told, and ops does not name it",
                                   _place(item, "op"))
            if item.source is None or item.captured is not None:
                raise one.violated("most_rel" if policy.most_rel is not None else "most_nats",
                                   "how strong numbers of the request's own are cannot be told", item.path)


def _over(one: Held, planned: Sequence[Planned], program: Program) -> _Over | None:
    """The first ceiling that is passed."""
    policy = one.policy
    if policy.most_rel is None and policy.most_nats is None:
        return None
    moved: dict[int, float] = defaultdict(float)
    nats, by_nats, by_rel = 0.0, [], []
    for j, (item, compiled) in enumerate(zip(planned, program.compiled, strict=True)):
        if item.origin in OWN or not compiled.rows:
            continue
        if not get_operation(compiled.op).adds_direction:
            share = max(abs(scale) for scale in compiled.applied.strength["scale"].values())
            if share > 1 + SLACK:
                return _Over("most_rel" if policy.most_rel is not None else "most_nats",
                             f"{compiled.op} is to act {share:.3g} times over", (j,), 1 / share)
            continue
        measured = compiled.applied.card_kl
        if policy.most_nats is not None and measured is not None:
            nats += abs(measured)
            by_nats.append(j)
            continue
        rule = "most_nats" if policy.most_rel is None else "most_rel"
        for layer, share in _shares(item, compiled).items():
            if policy.most_rel is None or share is None:
                why = "it is not calibrated" if policy.most_rel is None else f"no norm is recorded for layer {layer}"
                raise one.violated(rule, f"how strong this is cannot be told, because {why}", item.path,
                                   "Use an artifact made by extraction, or calibrate it.")
            moved[layer] += share
        by_rel.append(j)
    most = max(moved.values(), default=0.0)
    if policy.most_rel is not None and most > policy.most_rel * (1 + SLACK):
        return _Over("most_rel", f"a token is moved by {most:.3g} of the norm, {policy.most_rel:g} is allowed",
                     tuple(by_rel), policy.most_rel / most)
    if policy.most_nats is not None and nats > policy.most_nats * (1 + SLACK):
        return _Over("most_nats", f"{nats:.3g} nats per token, {policy.most_nats:g} are allowed", tuple(by_nats),
                     min(0.95, (policy.most_nats / nats) ** 0.5))
    return None


def _asked(planned: Sequence[Planned], program: Program) -> list[tuple[Planned, Compiled]]:
    return [(item, compiled) for item, compiled in zip(planned, program.compiled, strict=True)
            if item.origin not in OWN]


def _shares(item: Planned, compiled: Compiled) -> Mapping[int, float | None]:
    """Per layer, how far a step moves a token at all its sites there, as a share of the mean norm; None where that
    cannot be told."""
    found: dict[int, float | None] = {}
    norms = {} if item.source is None else item.source.residual_norm
    for (_, layer), row in compiled.rows.items():
        delta = row.tensors.get("delta")
        if delta is None:
            found[layer] = None
            continue
        length = float(delta.norm())
        # With norm_match the vector is a share of each token's own norm.
        share = length if "norm_match" in row.kernel else length / norms[layer] if norms.get(layer) else None
        before = found.get(layer, 0.0)
        found[layer] = None if share is None or before is None else before + share
    return found
