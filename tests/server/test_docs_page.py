"""`/docs` names every route, and needs nothing but itself."""

import re
from html.parser import HTMLParser

import httpx
from fastapi import FastAPI
from fastapi.routing import APIRoute

from server.api.admin.docs import _page


class Parts(HTMLParser):
    """What a page would load or run, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {name}={value}" for name, value in attrs
                       if tag in ("script", "link", "img", "iframe", "object") or name in ("src", "srcset", "style")
                       or name.startswith("on")]
        if tag == "script":
            self.loads.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


async def test_it_names_every_route_and_loads_nothing(client: httpx.AsyncClient, app: FastAPI) -> None:
    answer = await client.get("/docs")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = Parts()
    page.feed(answer.text)
    assert page.loads == [] and "url(" not in answer.text and "@import" not in answer.text
    words = " ".join(page.text.split())
    routes = [route for route in app.routes if isinstance(route, APIRoute) and route.include_in_schema]
    assert len(routes) > 40
    for route in routes:
        for method in route.methods:
            assert f"{method} {route.path_format}" in words, route.path
    assert "temperature?: number" in words and "steering?: Steering" in words


def test_what_stands_in_a_description_is_text() -> None:
    page = _page('{"info": {"title": "<script>x</script>"}, "paths": {"/a": {"get": {"operationId": "a\\"b", '
                 '"description": "<img src=x onerror=y>"}}}}')
    assert not re.search("<script|<img", page) and "&lt;img" in page
