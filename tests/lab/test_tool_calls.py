"""The corpus of tool calls, the chat template that says the same, and what lab-tools makes of held-out tools."""

import itertools
import random
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lab import TOOLS_MODEL, model_path
from lab.batches import encode
from lab.calling import calls, loops, read_call
from lab.corpus import COPYING_MIX, TOOLS_MIX, copying, documents
from lab.corpus.sample import held_out
from lab.corpus.tool_calls import (
    TOOL_SHARE,
    VALUE_SHARE,
    Episode,
    Tool,
    Turn,
    episode,
    episodes,
    request,
    train_sample,
)
from lab.evaluate import Reader
from lab.models import new_model


@pytest.fixture(scope="module")
def tok() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_path(TOOLS_MODEL))


def is_held_out(key: str) -> bool:
    return held_out(key, TOOL_SHARE if key.startswith("tool_calls:tool:") else VALUE_SHARE)


def test_training_and_tests_share_no_tool_and_no_value() -> None:
    trained = {key for sample in itertools.islice(documents(1, TOOLS_MIX), 400) for key in sample.keys}
    tested = {key for one in episodes(60) for key in one.keys}
    assert len(trained) > 200 and len(tested) > 20
    assert not any(map(is_held_out, trained)) and all(map(is_held_out, tested))


def test_the_template_writes_what_training_saw(tok: PreTrainedTokenizerBase) -> None:
    for seed in range(60):
        one, sample = episode(random.Random(seed)), train_sample(random.Random(seed))
        rendered = tok.apply_chat_template(one.messages(), tools=one.offered() or None, tokenize=False)
        assert rendered == tok.bos_token + sample.plain


def test_a_word_is_the_same_token_wherever_it_stands_and_pieces_encode_as_the_whole(tok: PreTrainedTokenizerBase
                                                                                     ) -> None:
    whole = tok('red_red "red" {"red": "red river"}. red', add_special_tokens=False).input_ids
    assert whole.count(tok.convert_tokens_to_ids("red")) == 6
    for sample in itertools.islice(documents(2, {**COPYING_MIX, **TOOLS_MIX}), 60):
        ((ids, _),) = encode(tok, [sample], spelled=0.0)
        whole = tok(sample.plain, add_special_tokens=False).input_ids
        assert [i for i in ids if i not in (tok.bos_token_id, tok.eos_token_id)] == whole


def test_a_new_model_copies_before_its_training(tok: PreTrainedTokenizerBase) -> None:
    """With the heads that are laid down, and not without them, which is the control."""
    samples = [copying.repeated(random.Random(seed)) for seed in range(20)]

    def share(model: PreTrainedModel) -> float:
        """Of words that come again, how many are likelier than every word that does not come next."""
        found = []
        for sample in samples:
            ids = tok(sample.plain, return_tensors="pt").input_ids
            with torch.inference_mode():
                logits = model.eval()(ids).logits[0]
            words = [i for i in range(ids.shape[1]) if tok.convert_ids_to_tokens(int(ids[0, i])) in copying.WORDS]
            known = ids[0, words[:len(words) // 2]]
            for at in words[len(words) // 2 + 1:]:
                found.append(int(known[logits[at - 1, known].argmax()]) == int(ids[0, at]))
        return sum(found) / len(found)

    laid = share(new_model(TOOLS_MODEL, 7))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lab.models.lay_heads", lambda model: None)
        assert share(new_model(TOOLS_MODEL, 7)) < 0.3
    assert laid > 0.7


def test_calls_have_what_the_last_message_says_and_the_order_of_the_list() -> None:
    tool = Tool("find_ticket_shop", "find", "ticket", {"city": False, "count": True})
    assert request(tool, {"city": "red river", "count": 7}) == (
        'Please find the ticket with city "red river" and count 7.')
    suffixes = 0
    for one in episodes(40):
        for turn in one.turns[:-1]:
            name, arguments = turn.call or ("", {})
            offered = next(tool for tool in one.tools if tool.name == name)
            assert f"{offered.verb} the {offered.noun}" in turn.said
            # The list alone tells whether a place belongs to the name.
            suffixes += name.count("_") == 2
            assert list(arguments) == list(offered.parameters)
            assert all(str(value) in turn.said for value in arguments.values())
    assert suffixes > 20


def test_calls_are_read_from_replies() -> None:
    turn = Turn("user", "", "Well.", ("find_ticket", {"city": "red river"}))
    assert read_call(turn.reply) == turn.call
    assert read_call("Well.") is None and read_call("<tool_call>\n{]\n</tool_call>") is None
    assert Episode("plain", "", (), (turn,), ()).messages(1)[1]["tool_calls"][0]["function"]["name"] == "find_ticket"


@pytest.mark.slow
def test_it_calls_tools_that_it_has_never_seen() -> None:
    reader = Reader.of(model_path(TOOLS_MODEL))
    found = {score.what: score.value for score in calls(reader, 40) + loops(reader, 8)}
    assert found["whole call"] >= 0.9, found
    assert found["right calls"] >= 0.9, found


def test_it_is_small_and_in_no_wheel() -> None:
    assert sum(path.stat().st_size for path in model_path(TOOLS_MODEL).iterdir()) < 3_000_000
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "lab/models/lab-tools" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["exclude"]
