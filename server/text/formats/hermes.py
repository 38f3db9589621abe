"""`<tool_call>` around a JSON object, as Hermes and Qwen write it."""

from collections.abc import Sequence
from typing import Any

from server.text.formats.base import CallReader, Tool, ToolFormat, listed, tagged
from server.text.formats.json_calls import JsonCallReader
from steering.programs.sections import Mark


class Hermes(ToolFormat):
    name = "hermes"
    marks = (Mark("tool_call", "<tool_call>", "</tool_call>"),)

    def fits(self, template: str) -> bool:
        # Some write XML inside of the same marks.
        return "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template

    def reader(self) -> CallReader:
        return JsonCallReader()

    def forced(self, tools: Sequence[Tool], *, many: bool) -> dict[str, Any]:
        return listed(_tags(tools), "\n", many=many)

    def free(self, held: Sequence[Tool], others: Sequence[str], *, many: bool) -> dict[str, Any] | None:
        return {"type": "triggered_tags", "triggers": ["<tool_call>"], "stop_after_first": not many,
                "tags": _tags([*held, *(Tool(name, {"type": "object"}) for name in others)])}


def _tags(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    return [tagged(f'<tool_call>\n{{"name": "{tool.name}", "arguments": ', tool.parameters, "}\n</tool_call>")
            for tool in tools]
