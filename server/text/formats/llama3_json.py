"""An answer that is a JSON object and nothing else, as Llama 3 writes it, perhaps behind `<|python_tag|>`."""

from collections.abc import Sequence
from typing import Any

from server.text.formats.base import CallReader, Tool, ToolFormat, listed, tagged
from server.text.formats.json_calls import JsonCallReader
from steering.programs.sections import Mark


class Llama3Json(ToolFormat):
    name = "llama3_json"
    marks = (Mark("tool_call", r'\{[ \t\r\n]*"(?:name|type|function|parameters|arguments)"', None, opens=True),
             Mark("tool_call", "<|python_tag|>", None))

    def fits(self, template: str) -> bool:
        return '"parameters"' in template and ("<|python_tag|>" in template or "<|start_header_id|>" in template)

    def reader(self) -> CallReader:
        return JsonCallReader()

    def forced(self, tools: Sequence[Tool], *, many: bool) -> dict[str, Any]:
        return listed([tagged(f'{{"name": "{tool.name}", "parameters": ', tool.parameters, "}") for tool in tools],
                      "; ", many=many)
