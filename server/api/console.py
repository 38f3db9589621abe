"""The console: a page at `/`, built from clients/web, that uses the API as every other client does.

The files are public, as they hold nothing of the server. A Content-Security-Policy bounds what the page may do:
scripts, styles and connections of this server alone, nothing inline.
"""

from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse, Response

from server.api.route import StrictRoute

ROOT = Path(__file__).parents[1]
# A wheel and an image hold them in server/; a checkout has them where Vite puts them.
PLACES = (ROOT / "web", ROOT.parent / "clients" / "web" / "dist")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
# Names of assets hold a hash of what is in them.
FOREVER = {"Cache-Control": "public, max-age=31536000, immutable"}
ASK_AGAIN = {"Cache-Control": "no-cache"}
NOT_BUILT = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>Trimtab</title></head>
<body>
<h1>Trimtab</h1>
<p>The server runs, and its API answers. The console, which would be here, has not been built.</p>
<p>In a checkout <code>make console</code> builds it, and <code>make serve</code> does that by itself. Load this page
again when it is done.</p>
</body>
</html>
"""

router = APIRouter(include_in_schema=False, route_class=StrictRoute)


def console_dir() -> Path | None:
    """The folder with the built files, None where there is none."""
    return next((place for place in PLACES if (place / "index.html").is_file()), None)


@router.get("/")
def page() -> Response:
    """The console, or how to build it."""
    folder = console_dir()
    if folder is None:
        return HTMLResponse(NOT_BUILT, headers=HEADERS | ASK_AGAIN)
    return FileResponse(folder / "index.html", headers=HEADERS | ASK_AGAIN)


@router.get("/mark.svg")
def mark() -> Response:
    return _file("mark.svg", ASK_AGAIN)


@router.get("/assets/{name}")
def asset(name: str) -> Response:
    return _file(f"assets/{name}", FOREVER)


def _file(name: str, headers: dict[str, str]) -> Response:
    folder = console_dir()
    # A name is one segment of the path; the check is for separators that the router does not know.
    found = folder and (folder / name).resolve()
    if not folder or not found or not found.is_file() or not found.is_relative_to(folder.resolve()):
        raise HTTPException(404)
    return FileResponse(found, headers=HEADERS | headers)
