"""Pages of the console on which nothing may go wrong, and what axe finds on them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page


@contextmanager
def page_of(browser: Browser, url: str, **context: Any) -> Iterator[Page]:
    """A page on the server, on which nothing may go wrong: no script error, no blocked script or style, no request to
    another server."""
    opened = browser.new_context(base_url=url, **({"viewport": {"width": 1280, "height": 900}} | context))
    opened.set_default_timeout(60_000)
    page = opened.new_page()
    wrong: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        # An answer of status 400 or above is for the page to show; the browser's own line about it is no fault.
        if message.type == "error" and "Failed to load resource" not in message.text:
            wrong.append(message.text)

    page.on("console", heard)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(f"asks {request.url}")
            if not request.url.startswith((url, "data:", "blob:")) else None)
    try:
        yield page
    finally:
        opened.close()
    assert wrong == [], wrong


def axe_finds(page: Page) -> list[str]:
    """What axe finds against WCAG 2.2 AA, one line each."""
    options = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}
    found = Axe().run(page, options=options).response["violations"]
    return [f"{one['id']}: {node['target']} {node['failureSummary']}" for one in found for node in one["nodes"]]


def built() -> bool:
    return (Path(__file__).parents[2] / "clients" / "web" / "dist" / "index.html").is_file()


def processor_times(trace: bytes) -> list[float]:
    """Of a trace, what each task of the page's main thread took of the processor, in milliseconds."""
    events = json.loads(trace)["traceEvents"]
    main = {(one["pid"], one["tid"]) for one in events
            if one["name"] == "thread_name" and one["args"]["name"] == "CrRendererMain"}
    return [one["tdur"] / 1000 for one in events
            if (one["pid"], one["tid"]) in main and one.get("ph") == "X" and "tdur" in one]
