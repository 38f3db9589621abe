"""Grammars that the text of a completion is held to, in the forms that both engines take.

xgrammar makes automata of them. It takes seconds to import and, for large grammars, seconds to work: everything here
that uses it is to be called in a thread.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from server.engines.schemas import check_schema
from steering.language.errors import InvalidRequest

# JSON is written without white space: a model may write it for ever. vLLM is told the same (`disable_any_whitespace`).
COMPACT: dict[str, Any] = {"any_whitespace": False, "separators": (",", ":")}
# Within marks, where models write JSON as they have learnt to, there is a little of it.
SPACES = 2
_WHERE_IN_XGRAMMAR = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+: ")
_ESCAPES = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"}


@dataclass(frozen=True)
class Grammar:
    """
    Attributes:
        kind: "json": a JSON schema. "regex": a pattern that the whole text matches. "ebnf", "lark": a grammar. "tag": a
            structural tag, as xgrammar calls text with marks.
        text: the schema, pattern, grammar or tag; JSON where it is one.
        param: the field of the request that it comes from.
    """

    kind: Literal["json", "regex", "ebnf", "lark", "tag"]
    text: str
    param: str

    def refused(self, reason: str) -> InvalidRequest:
        what = "schema" if self.kind == "json" else "grammar"
        return InvalidRequest(f"answers cannot be held to this {what}: {reason}", param=self.param,
                              fix=f"Leave that out of the {what}, and check the answer for it.")


def of_schema(schema: Mapping[str, Any], param: str) -> Grammar:
    return Grammar("json", json.dumps(schema), param)


def of_choices(choices: Iterable[str], param: str) -> Grammar:
    """One of these texts."""
    return Grammar("ebnf", "root ::= " + " | ".join(f'"{_escaped(choice)}"' for choice in choices), param)


def of_rules(text: str, param: str) -> Grammar:
    """A grammar in EBNF, which defines its rules with `::=`, or else in the form of Lark."""
    plain = (re.sub(r"(#|//).*$", "", line) for line in text.split("\n"))
    return Grammar("ebnf" if any("::=" in line for line in plain) else "lark", text, param)


def as_tag(grammar: Grammar) -> dict[str, Any]:
    """The same text as a part of a structural tag."""
    match grammar.kind:
        case "json":
            return {"type": "json_schema", "json_schema": json.loads(grammar.text), "max_whitespace_cnt": SPACES}
        case "regex":
            return {"type": "regex", "pattern": grammar.text}
        case "ebnf":
            return {"type": "grammar", "grammar": grammar.text}
        case "tag":
            found: dict[str, Any] = json.loads(grammar.text)["format"]
            return found
    raise grammar.refused("a Lark grammar does not go with a model that thinks first; write it in EBNF")


def of_tag(form: Mapping[str, Any], param: str) -> Grammar:
    return Grammar("tag", json.dumps({"type": "structural_tag", "format": form}), param)


def check(grammar: Grammar) -> None:
    """
    Raises:
        InvalidRequest: naming the field of the request and what of it cannot be held to.
    """
    parsed(grammar)


def parsed(grammar: Grammar) -> Any:
    """The grammar as xgrammar's. Raises InvalidRequest as `check`."""
    from xgrammar import Grammar as Parsed

    try:
        if grammar.kind == "json":
            check_schema(json.loads(grammar.text))
        if "\0" in grammar.text:
            raise ValueError("it holds a NUL character")
        make: dict[str, Any] = {
            "json": partial(Parsed.from_json_schema, **COMPACT), "regex": Parsed.from_regex, "ebnf": Parsed.from_ebnf,
            "lark": Parsed.from_lark, "tag": Parsed.from_structural_tag}
        return make[grammar.kind](grammar.text)
    except (RuntimeError, ValueError, TypeError, RecursionError) as error:
        said = _WHERE_IN_XGRAMMAR.sub("", str(error).strip()).splitlines() or [type(error).__name__]
        raise grammar.refused(said[0][:300]) from error


def _escaped(choice: str) -> str:
    return "".join(_ESCAPES.get(c, c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 0x10000
                                else f"\\U{ord(c):08x}") for c in choice)
