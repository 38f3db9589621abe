"""What `trimtab verify` asks of an engine: every op at every site it acts at, right, and wrong in two ways."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from server.verify.forms import FORMS, Change, Local
from server.verify.hooks import Edit, Touched
from steering.language.errors import UnsupportedModel
from steering.models.facts import ModelFacts

# A wrong strength is this share of the right one.
WRONG = 0.4


@dataclass(frozen=True)
class Case:
    """A spec, the same as edits, and as edits with a strength or a token scope that is wrong. op, site: None for cases
    of several."""

    name: str
    op: str | None = None
    site: str | None = None
    interventions: Sequence[Mapping[str, Any]] = ()
    right: Sequence[Edit] = ()
    wrong_strength: Sequence[Edit] = ()
    wrong_scope: Sequence[Edit] = ()


@dataclass(frozen=True)
class Scoped:
    """A token scope as a spec has it, as flags, and one that is not the same."""

    spec: Mapping[str, Any] | None
    right: Touched
    wrong: Touched


def _all(prompt: int, total: int) -> list[bool]:
    return [True] * total


def _prompt(prompt: int, total: int) -> list[bool]:
    return [t < prompt for t in range(total)]


def _first(number: int) -> Touched:
    return lambda prompt, total: [t < number for t in range(total)]


def _late(before: int) -> Touched:
    """The generated tokens and some before them."""
    return lambda prompt, total: [t >= prompt - before for t in range(total)]


def _window(start: int, stop: int) -> Touched:
    return lambda prompt, total: [start <= t < stop or t >= prompt for t in range(total)]


# The wrong ones leave out what is generated, so that they show at every site and layer.
SCOPES = (
    Scoped(None, _all, _prompt),
    Scoped({"prompt": "none", "generation": "all"}, _late(0), _prompt),
    Scoped({"prompt": {"positions": [-1]}, "generation": "all"}, _late(1), _prompt),
    Scoped({"prompt": {"windows": [[1, 4]]}, "generation": "all"}, _window(1, 4), _first(4)),
)
# The wrong ones are wrong by one token.
NEAR_SCOPES = (
    Scoped({"prompt": "none", "generation": "all"}, _late(0), _late(1)),
    Scoped({"prompt": {"positions": [-1]}, "generation": "all"}, _late(1), _late(2)),
    Scoped({"prompt": {"windows": [[1, 4]]}, "generation": "all"}, _window(1, 4), _window(1, 5)),
    Scoped({"prompt": "all", "generation": "none"}, _prompt, lambda p, n: [t < p - 1 for t in range(n)]),
)


def make_cases(facts: ModelFacts, offered: Mapping[str, Mapping[str, Any]],
               seen: Callable[[str, int], Tensor]) -> list[Case]:
    """An untouched request, every form of every op and every site of it, near scopes, and a stack of all ops.

    Args:
        offered: what the engine says it can do: site -> {"layers": [...], "ops": [...]}.
        seen: activations at a site of a layer.

    Raises:
        UnsupportedModel: the engine offers an op that has no formula here.
    """
    cases = [Case("untouched")]
    for op in sorted({op for about in offered.values() for op in about["ops"]}):
        if op not in FORMS:
            raise UnsupportedModel(f"verify has no formula for the op {op}", param="model")
        sites = [site for site, about in offered.items() if op in about["ops"] and about["layers"]]
        forms = list(FORMS[op].items())
        for i in range(max(len(sites), len(forms)) if sites else 0):
            site, number = sites[i % len(sites)], len(cases)
            layers = offered[site]["layers"]
            layer = layers[number * 7 % len(layers)]
            form, make = forms[i % len(forms)]
            change = make(Local(facts, site, layer, seen(site, layer), number))
            cases.append(_case(f"{op} ({form}) at {site}[{layer}]", op, site, layer, change,
                               SCOPES[number % len(SCOPES)]))
    return [*cases, *_scopes(facts, offered, seen), *_stack(cases)]


def _scopes(facts: ModelFacts, offered: Mapping[str, Mapping[str, Any]], seen: Callable[[str, int], Tensor]
            ) -> list[Case]:
    """One vector at the middle of the stream, under scopes whose controls are wrong by one token."""
    if "resid_post" not in offered:
        return []
    layers = offered["resid_post"]["layers"]
    layer = layers[(len(layers) - 1) // 2]
    return [_case(f"add (plain) at resid_post[{layer}], scope {i + 1} off by a token", "add", "resid_post", layer,
                  FORMS["add"]["plain"](Local(facts, "resid_post", layer, seen("resid_post", layer), 1000 + i)), scope)
            for i, scope in enumerate(NEAR_SCOPES)]


def _case(name: str, op: str, site: str, layer: int, change: Change, scope: Scoped) -> Case:
    # An op whose change knows all or nothing takes no strength in its spec.
    strength = {} if change.strength == 1.0 else {"strength": change.strength}
    spec = {"op": op, "site": site, "layers": [layer], **change.spec, **strength,
            **({} if scope.spec is None else {"scope": scope.spec})}
    right = Edit(site, layer, change.formula(change.strength), scope.right)
    weak = replace(right, function=change.formula(WRONG * change.strength))
    return Case(name, op, site, (spec,), (right,), (weak,), (replace(right, touched=scope.wrong),))


def _stack(cases: Sequence[Case]) -> list[Case]:
    """The first case of each op in one program."""
    first: dict[str, Case] = {}
    for case in cases[1:]:
        first.setdefault(case.name.split()[0], case)
    parts = list(first.values())
    return [Case("all of these ops in one program", None, None, [part.interventions[0] for part in parts],
                 *([edit for part in parts for edit in getattr(part, name)]
                   for name in ("right", "wrong_strength", "wrong_scope")))] if parts else []
