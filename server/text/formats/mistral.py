"""`[TOOL_CALLS]` and a list of JSON objects, as Mistral writes it."""

import secrets
import string
from collections.abc import Sequence
from typing import Any

from server.text.formats.base import CallReader, Tool, ToolFormat, listed, sequence, tagged, text
from server.text.formats.json_calls import JsonCallReader
from steering.programs.sections import Mark

MARK = "[TOOL_CALLS]"
ID_LETTERS = string.ascii_letters + string.digits


class Mistral(ToolFormat):
    name = "mistral"
    marks = (Mark("tool_call", MARK, None),)

    def fits(self, template: str) -> bool:
        # Newer ones write the name in front of the arguments, with a mark between them.
        return MARK in template and "[ARGS]" not in template

    def reader(self) -> CallReader:
        return JsonCallReader()

    def forced(self, tools: Sequence[Tool], *, many: bool) -> dict[str, Any]:
        return sequence(text(f"{MARK}["), _calls(tools, many=many), text("]"))

    def free(self, held: Sequence[Tool], others: Sequence[str], *, many: bool) -> dict[str, Any] | None:
        calls = _calls([*held, *(Tool(name, {"type": "object"}) for name in others)], many=many)
        # Behind its calls nothing is written.
        return {"type": "triggered_tags", "triggers": [MARK], "stop_after_first": True,
                "tags": [{"type": "tag", "begin": f"{MARK}[", "content": calls, "end": "]"}]}

    def new_id(self) -> str:
        """Its template refuses other ids than of nine letters and digits."""
        return "".join(secrets.choice(ID_LETTERS) for _ in range(9))


def _calls(tools: Sequence[Tool], *, many: bool) -> dict[str, Any]:
    return listed([tagged(f'{{"name": "{tool.name}", "arguments": ', tool.parameters, "}") for tool in tools], ", ",
                  many=many)
