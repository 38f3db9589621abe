"""Texts in which some special tokens are meant and others are only written, as user text may hold any.

A second tokenizer is made of the served one in which the control tokens have other, secret names; ids, rules and all
else are the same. What is meant is written by its secret name, so the tokenizer takes it for the token; what a user
wrote is text to it like any other, cut as such text is. Both happen in one call, so text beside a token is read as the
served tokenizer reads it (spaces that a token takes along, marks of the first word).
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

# Half surrogates are in no text that can be encoded, so these are never mistaken for a part of one.
BREAK = "\udc80"
"""Inside of a special token that is only written: it keeps the token from being found."""
END = "\udc81"
"""On both sides of a number: here ends the content of the message of that number."""
END_MARK = re.compile(f"{END}(\\d+){END}")
_MARKS = f"{BREAK}|{END}\\d+{END}"
ANY_MARK = re.compile(_MARKS)


@dataclass(frozen=True)
class Encoded:
    """Ids; per id the characters `[start, stop)` it stands for, where that is known; and the places asked for, in the
    same characters."""

    ids: list[int]
    offsets: list[tuple[int, int]] | None
    places: list[int]


def swapped(text: str, pattern: "re.Pattern[str]", names: Mapping[str, str], places: Sequence[int]
            ) -> tuple[str, list[int], int]:
    """A text with what matches replaced by its name, or left out where it has none; where `places` come to lie (each
    beside a match or away from all, rising); and how many names there are."""
    pieces: list[str] = []
    moved: list[int] = []
    at = shift = count = 0
    rest = list(places)[::-1]
    for match in pattern.finditer(text):
        while rest and rest[-1] < match.end():
            moved.append(rest.pop() + shift)
        name = names.get(match[0], "")
        count += bool(name)
        pieces += [text[at:match.start()], name]
        at = match.end()
        shift += len(name) - len(match[0])
    return "".join([*pieces, text[at:]]), [*moved, *(place + shift for place in rest[::-1])], count


def unmarked(text: str, places: Sequence[int] = ()) -> tuple[str, list[int]]:
    """A text without its marks, and where `places` come to lie."""
    plain, moved, _ = swapped(text, ANY_MARK, {}, places)
    return plain, moved


class Control:
    """The control tokens of a tokenizer, found in texts: those that `tokens` name, by id."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> None:
        vocab = tokenizer.get_vocab()
        named = sorted({token for token in tokens if _is_mark(token) and token in vocab},
                       key=lambda token: (-len(token), token))
        self.ids: Mapping[str, int] = {token: vocab[token] for token in named}
        self._known = frozenset(self.ids.values())
        # The longest of those that begin at the same place, as the tokenizer has it.
        self._pattern = re.compile("|".join(map(re.escape, named)) or r"(?!)")
        # Parts of a token that a text beside could complete.
        self._begins = frozenset(token[:k] for token in named for k in range(1, len(token)))
        self._ends = frozenset(token[k:] for token in named for k in range(1, len(token)))
        self._within = frozenset(token[i:k] for token in named for i in range(len(token))
                                 for k in range(i + 1, len(token) + 1))
        self._longest = max(map(len, named), default=0)
        self._shadow = _shadow(tokenizer, self.ids)

    @property
    def separable(self) -> bool:
        """Whether what is written can be told from what is meant."""
        return self._shadow is not None

    def find(self, text: str) -> str | None:
        """The first control token in a text."""
        match = self._pattern.search(text)
        return None if match is None else match[0]

    def count(self, ids: Sequence[int]) -> int:
        return sum(map(self._known.__contains__, ids))

    def meant(self, text: str) -> int:
        """Control tokens in a text that `written` has gone through."""
        return sum(1 for _ in self._pattern.finditer(text))

    def written(self, content: str) -> str:
        """A content with breaks inside of every control token, and where one might be made with what it stands next
        to. Ends of the text that a template trims are left alone."""
        core = content.strip()
        if not core:
            return content
        broken = self._pattern.sub(lambda match: f"{match[0][0]}{BREAK}{match[0][1:]}", core)
        tail = max((k for k in range(1, min(len(core), self._longest) + 1) if core[-k:] in self._begins), default=0)
        if tail:
            broken = f"{broken[:len(broken) - tail + 1]}{BREAK}{broken[len(broken) - tail + 1:]}"
        if core in self._within or any(core[:k] in self._ends for k in range(1, self._longest + 1)):
            broken = f"{BREAK}{broken}"
        start = len(content) - len(content.lstrip())
        return f"{content[:start]}{broken}{content[start + len(core):]}"

    def encode(self, text: str, places: Sequence[int] = ()) -> Encoded | None:
        """A rendered text with marks: its control tokens are meant, where a break is inside one it is only written.

        places: indices into `text`, rising; each lies beside a control token or mark and never inside of one.
        Returns None where the tokenizer still finds other control tokens than those that are meant.
        """
        if self._shadow is None:
            return None
        names = self._shadow.names
        replaced, moved, meant = swapped(text, re.compile(f"{self._pattern.pattern}|{_MARKS}"), names, places)
        found = self._shadow.tokenizer.encode_batch([replaced], add_special_tokens=False)[0]
        ids = list(found.ids)
        return Encoded(ids, list(found.offsets), moved) if self.count(ids) == meant else None


@dataclass(frozen=True)
class _Shadow:
    """names: control token to secret name."""

    tokenizer: Tokenizer
    names: Mapping[str, str]


def _shadow(tokenizer: PreTrainedTokenizerBase, ids: Mapping[str, int]) -> _Shadow | None:
    """The second tokenizer; None where the first one is not of the kind that can be rewritten, or the second would not
    have its ids."""
    if not tokenizer.is_fast or not ids:
        return None
    nonce = secrets.token_hex(8)
    names = {token: f"\U0010fffd{nonce}.{n}\U0010fffd" for n, token in enumerate(ids)}
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    for added in described["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    _rename(described["model"], names)
    _whole_offsets(described)
    # A pair of tokens is never asked for, and special tokens are never added here.
    described["post_processor"] = None
    described["truncation"] = described["padding"] = None
    try:
        shadow = Tokenizer.from_str(json.dumps(described))
    except Exception:  # the library raises nothing more special; without a second tokenizer such text is refused
        return None
    wanted = {names.get(token, token): index for token, index in tokenizer.get_added_vocab().items()}
    wanted |= {names[token]: index for token, index in ids.items()}
    if any(shadow.token_to_id(token) != index for token, index in wanted.items()):
        return None
    return _Shadow(shadow, names)


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): index for token, index in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(token, token), *rest] for token, *rest in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]


def _whole_offsets(node: Any) -> None:
    """Offsets count the space that a token holds."""
    if isinstance(node, dict):
        if "trim_offsets" in node:
            node["trim_offsets"] = False
        for value in (node.get("pre_tokenizer"), *node.get("pretokenizers", ())):
            _whole_offsets(value)


def _is_mark(token: str) -> bool:
    """Whether a token is written as nothing else is; one that is a plain word or white space belongs to any text."""
    return len(token) > 1 and not token.isspace() and not token.replace(" ", "").isalnum()
