"""Scopes against a slow oracle, written from the words of the language: token by token, what must be touched."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steering.language.errors import InvalidSpec
from steering.language.fields import MAX_INTERVENTIONS
from steering.language.scope import Scope
from steering.programs.touch import Touch, count_bits

ROLES = ["system", "user", "assistant", ""]
VOCABULARY = 6


def touched(scope: dict[str, Any], position: int, prompt: Sequence[int], roles: Sequence[str] | None,
            generated: Sequence[int]) -> bool:
    """Whether a scope, as the plain JSON a user wrote, touches the token at `position` of prompt + generated."""
    if position < len(prompt):
        part = scope.get("prompt", "all")
        role = None if roles is None else roles[position]
        return _part(part, position, len(prompt), prompt[position], role)
    index = position - len(prompt)
    # Nothing counts from the end of what is not yet generated.
    return _part(scope.get("generation", "all"), index, None, generated[index], None)


def _part(part: Any, index: int, length: int | None, token: int, role: str | None) -> bool:
    if part == "all":
        return True
    if part == "none":
        return False
    names_something = any(part.get(field) for field in ("positions", "windows", "token_ids", "roles"))
    included = _named(part, index, length, token, role) if names_something else True
    return included and not _named(part.get("exclude") or {}, index, length, token, role)


def _named(pick: dict[str, Any], index: int, length: int | None, token: int, role: str | None) -> bool:
    if token in pick.get("token_ids", []) or (role is not None and role in pick.get("roles", [])):
        return True
    for position in pick.get("positions", []):
        if index == position or (position < 0 and length is not None and index == length + position):
            return True
    for start, stop in pick.get("windows", []):
        first = 0 if start is None else start + length if start < 0 and length is not None else start
        behind = None if stop is None else stop + length if stop < 0 and length is not None else stop
        if index >= first and (behind is None or index < behind):
            return True
    return False


def _scopes(length: int, with_roles: bool) -> st.SearchStrategy[dict[str, Any]]:
    tokens = st.lists(st.integers(0, VOCABULARY), min_size=1, max_size=3)
    edge = st.none() | st.integers(-length - 3, length + 3)
    ahead = st.none() | st.integers(0, 15)
    prompt_pick: dict[str, Any] = {
        "windows": st.lists(st.tuples(edge, edge).map(list), min_size=1, max_size=3), "token_ids": tokens}
    if length:
        prompt_pick["positions"] = st.lists(st.integers(-length, length - 1), min_size=1, max_size=4)
    if with_roles:
        prompt_pick["roles"] = st.lists(st.sampled_from(ROLES[:3]), min_size=1, max_size=2)
    generation_pick: dict[str, Any] = {
        "positions": st.lists(st.integers(0, 15), min_size=1, max_size=4),
        "windows": st.lists(st.tuples(ahead, ahead).map(list), min_size=1, max_size=3), "token_ids": tokens}

    def selection(pick: dict[str, Any]) -> st.SearchStrategy[Any]:
        exclude = st.none() | st.fixed_dictionaries({}, optional=pick)
        return (st.sampled_from(["all", "none"]) | st.fixed_dictionaries({}, optional={**pick, "exclude": exclude})
                | st.fixed_dictionaries({}, optional={**pick, "exclude": exclude}))

    return st.fixed_dictionaries(
        {}, optional={"prompt": selection(prompt_pick), "generation": selection(generation_pick)},
    ).filter(lambda scope: not scope.get("prompt") == scope.get("generation") == "none")


@st.composite
def _requests(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[int], list[str] | None, list[int], list[int]]:
    prompt = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12))
    roles = draw(st.none() | st.lists(st.sampled_from(ROLES), min_size=len(prompt), max_size=len(prompt)))
    generated = draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=10))
    scopes = draw(st.lists(_scopes(len(prompt), roles is not None), min_size=1, max_size=5))
    repeat = draw(st.sampled_from([1, 1, 1, 6]))
    cuts = draw(st.lists(st.integers(0, len(prompt) + len(generated)), max_size=5))
    return (scopes * repeat + scopes)[:MAX_INTERVENTIONS], prompt, roles, generated, sorted(cuts)


def _bits(touch: Touch, tokens: list[int], cuts: list[int]) -> np.ndarray:
    edges = [0, *cuts, len(tokens)]
    ids = np.array(tokens, dtype=np.int64)
    return np.concatenate([touch.bits(np.arange(start, stop), ids[start:stop])
                           for start, stop in zip(edges, edges[1:], strict=False)])


@settings(max_examples=250, deadline=None)
@given(_requests(), st.integers(0, 4))
@example(([{"prompt": {"exclude": {"positions": [-1]}},
            "generation": {"token_ids": [2], "exclude": {"positions": [1]}}}] * MAX_INTERVENTIONS,
          [1, 2, 2], None, [2, 2, 1], [1, 4]), 0)
def test_bits_equal_the_oracle(request: Any, spare: int) -> None:
    """Whatever the split into chunks, and however many tokens more than were generated had been allowed."""
    scopes, prompt, roles, generated, cuts = request
    parsed = [Scope.model_validate(scope) for scope in scopes]
    tokens = prompt + generated
    touch = Touch.of(parsed, prompt, len(generated) + spare, roles)
    bits = _bits(touch, tokens, cuts)
    assert bits.dtype == np.uint32
    wanted = [[touched(scope, t, prompt, roles, generated) for scope in scopes] for t in range(len(tokens))]
    assert [[bool(int(bits[t]) >> j & 1) for j in range(len(scopes))] for t in range(len(tokens))] == wanted
    assert not np.any(bits >> np.uint32(len(scopes) - 1) >> np.uint32(1)), "a bit of no intervention is set"
    assert count_bits(bits, len(scopes)) == [sum(row[j] for row in wanted) for j in range(len(scopes))]
    # Asking again in any order, one at a time, must not change the map (recompute after preemption).
    for t in reversed(range(len(tokens))):
        assert touch.bits(np.array([t]), np.array([tokens[t]]))[0] == bits[t]
    # As it travels to another process, where no more than plain numbers can go.
    assert np.array_equal(Touch.from_plain(json.loads(json.dumps(touch.to_plain())), spare=1).bits_of(tokens), bits)
    # Of some of the interventions, and with the rules carried out beforehand.
    some = 0b10110
    assert np.array_equal(touch.only(some).bits_of(tokens), bits & np.uint32(some))
    for t, token in enumerate(generated):
        gets, loses = touch.rules.of(token)
        position = len(prompt) + t
        assert (touch.on[position] | gets) & ~(touch.off[position] | np.uint32(loses)) == bits[position]
    touch.settle(generated)
    assert np.array_equal((touch.on & ~touch.off)[:len(tokens)], bits)


def test_rules_do_not_reach_into_the_prompt() -> None:
    scope = Scope.model_validate({"prompt": "none", "generation": {"token_ids": [7]}})
    touch = Touch.of([scope], [7, 7], 3)
    bits = touch.bits(np.arange(5), np.array([7, 7, 7, 1, 7]))
    assert bits.tolist() == [0, 0, 1, 0, 1]


def test_exclude_wins_over_everything() -> None:
    picked = {"positions": [0, 1], "token_ids": [5]}
    scope = Scope.model_validate({"prompt": {**picked, "exclude": picked}, "generation": {**picked, "exclude": picked}})
    touch = Touch.of([scope], [5, 1, 5], 3)
    assert not touch.bits(np.arange(6), np.array([5, 1, 5, 5, 1, 5])).any()


def test_empty_exclude_takes_nothing_out() -> None:
    scope = Scope.model_validate({"prompt": {"exclude": {}}, "generation": {"exclude": {}}})
    bits = Touch.of([scope], [1, 2], 2).bits(np.arange(4), np.ones(4, int))
    assert bits.tolist() == [1] * 4


def test_all_32_bits() -> None:
    scopes = [Scope.model_validate({"prompt": {"positions": [j]}, "generation": {"token_ids": [j]}}) for j in range(32)]
    touch = Touch.of(scopes, [99] * 32, 32)
    bits = touch.bits(np.arange(64), np.array([99] * 32 + list(range(32))))
    assert bits.tolist() == [1 << j for j in range(32)] * 2
    assert count_bits(bits, 32) == [2] * 32


def test_windows_of_any_size() -> None:
    far = 2**24
    for window, wanted in (([-far, far], [1, 1, 1]), ([far, None], [0, 0, 0]), ([None, -far], [0, 0, 0]),
                           ([2, 1], [0, 0, 0]), ([-2, -1], [0, 1, 0])):
        scope = Scope.model_validate({"prompt": {"windows": [window]}, "generation": "none"})
        assert Touch.of([scope], [4, 4, 4], 1).on.tolist() == [*wanted, 0]


@pytest.mark.parametrize("pick", [{"roles": ["user"]}, {"exclude": {"roles": ["user"]}}])
def test_roles_without_roles(pick: dict[str, Any]) -> None:
    scopes = [Scope(), Scope.model_validate({"prompt": pick})]
    with pytest.raises(InvalidSpec) as caught:
        Touch.of(scopes, [1, 2], 2)
    where = "scope.prompt.exclude.roles" if "exclude" in pick else "scope.prompt.roles"
    assert caught.value.param == f"interventions[1].{where}"
    assert caught.value.fix


@pytest.mark.parametrize("position", [3, -4, 2**24, -(2**24)])
@pytest.mark.parametrize("excluded", [False, True])
def test_positions_outside_of_the_prompt(position: int, excluded: bool) -> None:
    pick = {"positions": [0, position]}
    scope = Scope.model_validate({"prompt": {"exclude": pick} if excluded else pick})
    with pytest.raises(InvalidSpec, match="3 tokens") as caught:
        Touch.of([scope], [1, 2, 3], 2)
    assert caught.value.param == f"interventions[0].scope.prompt.{'exclude.' if excluded else ''}positions"


def test_a_role_that_no_turn_has() -> None:
    """A conversation without a system turn is no error; the scope just finds nothing there."""
    scope = Scope.model_validate({"prompt": {"roles": ["system"]}, "generation": "none"})
    assert not Touch.of([scope], [1, 2], 1, roles=["user", "user"]).on.any()


def test_empty_prompt() -> None:
    scope = Scope.model_validate({"prompt": {"roles": ["user"], "windows": [[0, 3]], "token_ids": [1]}})
    assert Touch.of([scope], [], 2, roles=[]).on.tolist() == [1, 1]


def test_selection_of_generated_positions_stops_at_the_budget() -> None:
    """More positions than tokens is no error: nobody knows beforehand how long an answer gets."""
    scope = Scope.model_validate({"prompt": "none", "generation": {"positions": [0, 99], "windows": [[2, 50]]}})
    assert Touch.of([scope], [1], 4).on.tolist() == [0, 1, 0, 1, 1]
