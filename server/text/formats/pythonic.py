"""A list of calls in Python, `[weather(city="Paris"), clock()]`, as Llama 3.2, Llama 4 and Olmo 3 write it."""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.text.formats.base import Called, CallReader, Tool, ToolFormat, json_of, listed, sequence, text
from steering.programs.sections import Mark

# Python's parser needs much memory for long expressions.
MAX_CALL = 2**16
BETWEEN = " \t\r\n[],"
# JSON's words, which models write in Python, too.
WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}


class Pythonic(ToolFormat):
    name = "pythonic"
    marks = (Mark("tool_call", r"\[[ \t\r\n]*[A-Za-z_][A-Za-z0-9_.]{0,127}\(", None, opens=True),)

    def fits(self, template: str) -> bool:
        return "[func_name1(" in template or "<|python_start|>" in template or "<function_calls>" in template

    def reader(self) -> CallReader:
        return PythonCallReader()

    def forced(self, tools: Sequence[Tool], *, many: bool) -> dict[str, Any]:
        tags = [{"type": "tag", "begin": f"{tool.name}(", "content": _arguments(tool.parameters), "end": ")"}
                for tool in tools]
        return sequence(text("["), listed(tags, ", ", many=many), text("]"))


class PythonCallReader(CallReader):
    """Arguments become JSON, so a call is told when it is complete."""

    def __init__(self) -> None:
        self._text = ""
        self._depth = 0
        self._quote = ""
        self._escaped = False
        self._broken = False
        self._told = False

    def push(self, text: str) -> list[Called]:
        found: list[Called] = []
        for character in text:
            self._text += character
            if self._broken or not self._completes(character):
                continue
            call = _call(self._text.lstrip(BETWEEN))
            if call is None:
                self._broken = True
            else:
                found.append(call)
                self._text, self._told = "", True
        return found

    def end(self) -> tuple[list[Called], str]:
        return [], "" if self._told and not self._text.strip(BETWEEN) else self._text

    @property
    def within(self) -> bool:
        return bool(self._told and self._text.strip(BETWEEN))

    def _completes(self, character: str) -> bool:
        """Whether the outermost parenthesis closes."""
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == self._quote:
                self._quote = ""
            return False
        if character in "\"'":
            self._quote = character
        elif character == "(":
            self._depth += 1
        elif character == ")":
            self._depth -= 1
            return self._depth == 0
        return False


def _call(written: str) -> Called | None:
    """One call; None where it is none, or is more than names with plain values."""
    if len(written) > MAX_CALL:
        return None
    try:
        call = ast.parse(written, mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        name = ast.unparse(call.func)
        arguments = {keyword.arg: _value(keyword.value) for keyword in call.keywords if keyword.arg is not None}
        return Called(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Name(id=word) if word in WORDS:
            return WORDS[word]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {str(_value(key)): _value(value) for key, value in zip(keys, values, strict=True) if key is not None}
    return ast.literal_eval(node)


def _arguments(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`name=value` for what is required, and then for any of the rest, in their order."""
    properties: Mapping[str, Any] = parameters.get("properties") or {}
    shared = {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}
    required = [name for name in properties if name in (parameters.get("required") or ())]
    optional = [name for name in properties if name not in required]

    def pair(name: str, before: str) -> list[dict[str, Any]]:
        schema = properties[name]
        if isinstance(schema, dict):
            schema = {**shared, **schema}
        return [text(f"{before}{name}="), json_of(schema)]

    def maybe(names: Sequence[str]) -> list[dict[str, Any]]:
        return [{"type": "optional", "content": sequence(*pair(name, ", "))} for name in names]

    if required:
        parts = [part for n, name in enumerate(required) for part in pair(name, ", " if n else "")]
        return sequence(*parts, *maybe(optional))
    if not optional:
        return text("")
    # Nothing, or any of them as the first one.
    firsts = [sequence(*pair(name, ""), *maybe(optional[n + 1:])) for n, name in enumerate(optional)]
    return {"type": "optional", "content": firsts[0] if len(firsts) == 1 else {"type": "or", "elements": firsts}}
