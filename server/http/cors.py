"""Web pages of other sites, where the operator lets some of them ask (setting `cors_origins`).

A browser asks first whether it may (OPTIONS), without the key, so that is answered in front of everything else.
"""

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from server.settings import Settings

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
TOLD = ("X-Request-ID", "X-Trimtab-Request", "X-Trimtab-Applied", "Retry-After")


def add_cors(app: FastAPI, settings: Settings) -> None:
    """To be called after every other middleware was added, as it has to be the outermost."""
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=METHODS,
                           allow_headers=("*",), expose_headers=TOLD)
