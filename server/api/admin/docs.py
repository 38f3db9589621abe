"""`/openapi.json`: the API for programs; `/docs`: as one page that needs no script, no other file and no network."""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment

from server.requests.state import State

router = APIRouter()
METHODS = ("get", "post", "put", "patch", "delete")
# Whatever text stands in a description, the page runs nothing and loads nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}: the HTTP API</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
summary { cursor: pointer; padding: .3rem 0 }
code, pre { font: 14px/1.4 ui-monospace, monospace }
pre { overflow: auto; padding: .8rem; border: 1px solid #8886; border-radius: .3rem }
.method { display: inline-block; min-width: 4.5rem; font-weight: 600 }
table { border-collapse: collapse } td, th { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0 }
</style>
</head>
<body>
<h1>{{ title }}: the HTTP API</h1>
<p>{{ description }} The same for programs: <a href="openapi.json">openapi.json</a>.</p>
{% for tag, operations in groups %}
<h2>{{ tag }}</h2>
{% for operation in operations %}
<details id="{{ operation.id }}"><summary><code><span class="method">{{ operation.method }}</span>
{{ operation.path }}</code></summary>
{% if operation.summary %}<p>{{ operation.summary }}</p>{% endif %}
{% if operation.parameters %}<table><tr><th>Parameter</th><th>In</th><th>Type</th><th>Meaning</th></tr>
{% for p in operation.parameters %}<tr><td><code>{{ p.name }}</code>{{ "" if p.required else " (optional)" }}</td>
<td>{{ p.place }}</td><td><code>{{ p.type }}</code></td><td>{{ p.description }}</td></tr>{% endfor %}</table>{% endif %}
{% for media, shape in operation.bodies %}<p>Body, <code>{{ media }}</code>:</p><pre>{{ shape }}</pre>{% endfor %}
{% for status, text, shape in operation.answers %}<p>{{ status }}: {{ text }}</p>
{% if shape %}<pre>{{ shape }}</pre>{% endif %}{% endfor %}
</details>
{% endfor %}
{% endfor %}
<h2>Objects</h2>
{% for name, shape in objects %}<details id="{{ name }}"><summary><code>{{ name }}</code></summary>
<pre>{{ shape }}</pre></details>
{% endfor %}
</body>
</html>
"""


# The description takes a second to make, once: in a thread.
@router.get("/docs", include_in_schema=False)
async def show_docs(request: Request, state: State) -> HTMLResponse:
    page = await state.pools.watch(lambda: _page(_document(request.app)))
    return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})


@router.get("/openapi.json", include_in_schema=False)
async def show_openapi(request: Request, state: State) -> Response:
    return Response(await state.pools.watch(lambda: _document(request.app)), media_type="application/json")


@lru_cache(maxsize=1)
def _document(app: FastAPI) -> str:
    return json.dumps(app.openapi())


@lru_cache(maxsize=1)
def _page(document: str) -> str:
    """The page of an OpenAPI document. The same for the life of a server."""
    api = json.loads(document)
    groups: dict[str, list[dict[str, Any]]] = {}
    for operation in _operations(api):
        groups.setdefault(operation["tag"], []).append(operation)
    objects = [(name, _shape(schema)) for name, schema in sorted(api.get("components", {}).get("schemas", {}).items())]
    return Environment(autoescape=True, trim_blocks=True).from_string(PAGE).render(
        title=api["info"]["title"], description=api["info"].get("description", ""), groups=groups.items(),
        objects=objects)


def _operations(api: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for path, methods in api["paths"].items():
        for method in METHODS:
            found = methods.get(method)
            if found is not None:
                yield {
                    "id": found["operationId"], "tag": (found.get("tags") or ["other"])[0], "method": method.upper(),
                    "path": path, "summary": found.get("description") or found.get("summary", ""),
                    "parameters": [{"name": p["name"], "place": p["in"], "required": p.get("required", False),
                                    "type": _type(p.get("schema", {})), "description": p.get("description", "")}
                                   for p in found.get("parameters", [])],
                    "bodies": [(media, _shape(content.get("schema", {})))
                               for media, content in found.get("requestBody", {}).get("content", {}).items()],
                    "answers": [(status, answer.get("description", ""), _answer(answer))
                                for status, answer in found.get("responses", {}).items()]}


def _answer(answer: Mapping[str, Any]) -> str:
    return "\n".join(_shape(content["schema"]) for content in answer.get("content", {}).values()
                     if content.get("schema"))


def _shape(schema: Mapping[str, Any]) -> str:
    """A schema as one line per field: its name, type and meaning."""
    if "properties" not in schema:
        return _type(schema)
    needed = schema.get("required", [])
    return "\n".join(f"{name}{'' if name in needed else '?'}: {_type(part)}{_meaning(part)}"
                     for name, part in schema["properties"].items())


def _meaning(schema: Mapping[str, Any]) -> str:
    default = f" Default {json.dumps(schema['default'])}." if schema.get("default") not in (None, "", [], {}) else ""
    text = f"{schema.get('description', '')}{default}".strip()
    return f"   # {text}" if text else ""


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " | ".join(dict.fromkeys(_type(part) for part in schema[key]))
    if "const" in schema or "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"[{_type(schema.get('items', {}))}]"
    if isinstance(schema.get("additionalProperties"), Mapping):
        return f"{{name: {_type(schema['additionalProperties'])}}}"
    return str(schema.get("type", "any"))
