"""What the command line prints of an artifact, and the commands of a conversation."""

from datetime import UTC, datetime
from typing import Any

import pytest
from trimtab_client import Artifact, Method

from server.cli import chat
from server.cli.artifacts import described, marks, shown_layers
from server.cli.chat import UNSTEERED, Side, at_layers
from server.cli.extract import find_method
from server.cli.given import layers_of
from steering.language.errors import InvalidRequest


@pytest.mark.parametrize(("layers", "stored", "shown"), [
    ([5], [0, 1, 2, 3, 4, 5], "layer 5 (of 6 made)"),
    ([5], [5], "layer 5"),
    ([3, 4], [0, 1, 2, 3, 4, 5], "layers 3,4 (of 6 made)"),
    ([3, 4], [3, 4], "layers 3,4"),
    (None, [2], "layer 2"),
    (None, [0, 1, 2], "all 3 layers"),
])
def test_layers_are_told_with_what_was_made(layers: Any, stored: list[int], shown: str) -> None:
    assert shown_layers(layers, stored) == shown


def artifact(**fields: Any) -> Artifact:
    return Artifact.model_validate({
        "name": "calm", "ref": "calm@2", "version": 2, "kind": "vector", "op": "add", "site": "resid_post",
        "layers": [5], "strength": {"value": 1.5, "unit": "raw"}, "digest": "ab" * 32, "nbytes": 1234,
        "stored_layers": [4, 5], "aliases": ["production"], "created_at": datetime(2026, 1, 2, 3, 4, tzinfo=UTC)}
        | fields)


def test_show_says_what_it_is_and_how_to_use_it() -> None:
    card = {"trial": {"band": {"low": 0.8, "high": 2.5}}, "warnings": ["draft: nothing beat the random vectors"],
            "test": {"auc": 0.42, "controls": {"deep": 1}}, "draft": "nothing beat the random vectors"}
    lines = dict(described(artifact(card=card, description="Calmer.", provenance={"method": "mean_difference"})))
    assert lines["artifact"] == "calm@2  @production" and lines["acts on"] == "layer 5 (of 2 made)"
    assert lines["strength"] == "1.5 raw" and lines["band"].startswith("0.8 to 2.5")
    assert lines["on test"] == "auc 0.42" and "nothing beat" in lines["warning"]
    assert lines["use"] == '{"steering": {"artifact": "calm@2"}}'
    assert "band" not in dict(described(artifact()))


def test_a_listing_marks_drafts_and_warnings() -> None:
    assert "draft" in marks({"draft": "why", "warnings": ["w"]})
    assert "warning" in marks({"warnings": ["AUC of 0.42 only"]}) and not marks({})


@pytest.mark.parametrize(("text", "layers"), [(None, None), ("3", [3]), ("3,5", [3, 5]), ("3-6", [3, 4, 5, 6]),
                                              ("-1", [-1]), ("1,3-4", [1, 3, 4])])
def test_layers_as_they_are_written(text: str | None, layers: list[int] | None) -> None:
    assert layers_of(text) == layers


def test_layers_go_to_every_intervention_or_are_refused() -> None:
    steering = {"interventions": [{"artifact": "a"}, {"artifact": "b", "strength": 2.0}]}
    assert at_layers(steering, "3,4") == {"interventions": [{"artifact": "a", "layers": [3, 4]},
                                                            {"artifact": "b", "strength": 2.0, "layers": [3, 4]}]}
    assert at_layers(steering, None) is steering
    for wrong in ("x", "3-", "3;4", ""):
        with pytest.raises(InvalidRequest):
            at_layers(steering, wrong)
    with pytest.raises(InvalidRequest):
        at_layers({"preset": "p"}, "3")


def test_a_method_that_does_not_exist_brings_the_nearest() -> None:
    methods = [Method(name=name, summary="", data="pairs", request={}) for name in ("mean_difference", "manifold")]
    assert find_method(methods, "mean-difference").name == "mean_difference"
    with pytest.raises(InvalidRequest) as refused:
        find_method(methods, "mean-diference")
    assert refused.value.fix == "Did you mean mean_difference?"


Asked = list[tuple[str, list[tuple[str, Any, int]]]]


def talk(monkeypatch: pytest.MonkeyPatch, lines: list[str], **fields: Any) -> Asked:
    """What was asked: each text, and of each side its title, steering and messages before."""
    asked: Asked = []

    async def ask(said: str, sides: list[Side], *rest: Any) -> None:
        asked.append((said, [(side.title, side.steering, len(side.messages)) for side in sides]))
        for side in sides:
            side.messages += [{"role": "user", "content": said}, {"role": "assistant", "content": "so"}]

    given = iter(lines)

    def line(prompt: str) -> str:
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(chat, "_ask", ask)
    monkeypatch.setattr(chat.out, "input", line)
    chat.chat(**{"prompt": None, "steer": None, "preset": None, "spec": None, "layers": None, "text": False,
                 "system": None, "base": True, "max_tokens": 8, "temperature": 0.0, "seed": 0, "key": None,
                 "url": "http://127.0.0.1:1"} | fields)
    return asked


def test_a_conversation_is_steered_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calm = {"interventions": [{"artifact": "calm", "strength": 2.0}]}
    asked = talk(monkeypatch, ["hi", "/steer calm=2", "on", "/steer off", "off", "/help", "/new", "again", "/exit",
                               "no"])
    assert asked == [("hi", [("base", UNSTEERED, 0)]),
                     ("on", [("base", UNSTEERED, 2), ("steered", calm, 2)]),
                     ("off", [("base", UNSTEERED, 4)]),
                     ("again", [("base", UNSTEERED, 0)])]


def test_a_wrong_command_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = talk(monkeypatch, ["/sing", "/steer", "/steer a=b=c", "still here"], system="Be brief.")
    assert asked == [("still here", [("base", UNSTEERED, 1)])]


def test_layers_of_a_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = talk(monkeypatch, ["hi"], steer=["calm"], layers="3", base=False)
    assert asked == [("hi", [("steered", {"interventions": [{"artifact": "calm", "layers": [3]}]}, 0)])]
