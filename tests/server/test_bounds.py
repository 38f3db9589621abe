"""What cannot fit is refused before it is tokenised, and nothing that fits is."""

import json
import random

import httpx
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from server.text.bounds import TokenBound
from server.text.vocabulary import Vocabulary
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from tests.server.templates import FAMILIES, family
from tests.server.tokenizers import byte_tokenizer

ALPHABETS = ["a", "ab cd", "the ", " " * 3, "\n \t", "▁x", "\u0065\u0301\u0302", "\U0001f600\u4e2d", "<|im_end|>",
             "</s>[INST]", "0123456789", "user assistant system "]


def texts() -> list[str]:
    draw = random.Random(0)
    found = [alphabet * 40 for alphabet in ALPHABETS]
    for _ in range(60):
        pieces = draw.choices(ALPHABETS, k=draw.randint(1, 4))
        found.append("".join(draw.choice(pieces)[:draw.randint(1, 9)] for _ in range(draw.randint(1, 200))))
    return found


@pytest.mark.parametrize("name", ["lab-dense", *FAMILIES])
def test_no_text_has_fewer_tokens_than_the_bound_says(name: str) -> None:
    tokenizer: PreTrainedTokenizerBase = (AutoTokenizer.from_pretrained(f"lab/models/{name}") if name == "lab-dense"
                                          else family(name))
    bound = TokenBound(tokenizer)
    assert bound.known
    for text in texts():
        assert bound.least(text) <= len(tokenizer(text, add_special_tokens=False)["input_ids"]), text
    # And it says something: a text without the longest tokens is not far from what is told of it.
    longest = max(len(token) for token in tokenizer.get_vocab())
    assert bound.least("q" * 10_000) >= 10_000 / longest


def test_tokens_that_swallow_white_space() -> None:
    tokenizer = family("chatml")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    core = tokenizer.backend_tokenizer.to_str().replace('"rstrip":false', '"rstrip":true')
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(core))
    text = "<|im_end|>" + " " * 5000
    assert TokenBound(tokenizer).least(text) <= len(tokenizer(text)["input_ids"]) < 10
    assert TokenBound(tokenizer).least("z" * 500) == 500


@pytest.mark.parametrize("kind", ["unknown words", "dropped space", "stripped", "unigram"])
def test_no_bound_where_a_token_may_stand_for_any_amount(kind: str) -> None:
    if kind == "unknown words":
        core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
    elif kind == "unigram":
        core = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0, byte_fallback=False))
    else:
        core = Tokenizer.from_str(byte_tokenizer(None).backend_tokenizer.to_str())
        if kind == "dropped space":
            core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), core.pre_tokenizer])
        else:
            core.normalizer = normalizers.Strip()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]" if kind == "unknown words" else None)
    bound = TokenBound(tokenizer)
    assert not bound.known and bound.least("b " * 10_000) == 0


@pytest.mark.parametrize("kind", ["bytes left out", "characters left out", "any run is one unknown"])
def test_what_is_in_no_token_costs_nothing(kind: str) -> None:
    """Vocabularies of real models lack bytes that their texts had not; the rest of a text is bounded all the same."""
    if kind == "bytes left out":
        described = json.loads(family("chatml").backend_tokenizer.to_str())
        for byte in (0, 7, 0xF4):
            del described["model"]["vocab"][bytes_to_unicode()[byte]]
        core, gone = Tokenizer.from_str(json.dumps(described)), "\x00\x07"
    else:
        fused = kind == "any run is one unknown"
        core = Tokenizer(models.BPE({"<unk>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], fuse_unk=fused,
                                    unk_token="<unk>" if fused else None))
        gone = "z\u00e9 "
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    bound = TokenBound(tokenizer)
    draw = random.Random(0)
    for text in (gone * 500, "ab" * 300, *("".join(draw.choices(f"ab{gone}", k=200)) for _ in range(20))):
        assert bound.least(text) <= len(tokenizer(text, add_special_tokens=False)["input_ids"]), text
    assert bound.least("ab" * 300) >= 600 / 9 and bound.least(gone * 500) == 0


@pytest.fixture
def untokenised(engine: ScriptedEngine, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any text of some length that reaches the tokenizer fails the request."""
    for method in ("encode", "encode_with_offsets"):
        before = getattr(vocabulary, method)

        def only_short(text: str, before: object = before, **fields: bool) -> object:
            assert len(text) < 10_000, "a text that cannot fit was tokenised"
            return before(text, **fields)  # type: ignore[operator]

        monkeypatch.setattr(vocabulary, method, only_short)


@pytest.mark.usefixtures("untokenised")
@pytest.mark.parametrize("route", ["chat", "roles", "completions", "lens"])
async def test_a_text_that_cannot_fit_is_not_tokenised(client: httpx.AsyncClient, route: str) -> None:
    long = "a" * 1_000_000
    roles = {"interventions": [{"op": "add", "inline": {"vector": [1.0] * 8}, "layers": [1],
                                "scope": {"prompt": {"roles": ["user"]}}}]}
    url, body, param = {
        "chat": ("/v1/chat/completions", chat(long), "messages"),
        "roles": ("/v1/chat/completions", chat(long, steering=roles), "messages"),
        "completions": ("/v1/completions", {"model": MODEL, "prompt": ["a", long]}, "prompt[1]"),
        "lens": ("/v1/lens", {"model": MODEL, "input": long}, "input")}[route]
    answer = await client.post(url, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
