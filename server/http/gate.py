"""What is asked of a request before a byte of its body is read: size of its headers, where it comes from, the key."""

import base64
import binascii
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from server.errors import ForbiddenHost, ForbiddenOrigin, HeadersTooLarge
from server.identity.keys import Keys
from server.identity.principal import OWNER, PRINCIPAL, Principal
from server.settings import Settings, is_loopback

# Whoever watches the server needs no key: these tell nothing but whether it runs.
READY = frozenset({"/health/ready", "/ping"})
HEALTH = READY | {"/health", "/health/live"}
# The console's own files hold nothing of the server; what the page then asks for needs the key.
CONSOLE, CONSOLE_FILES = frozenset({"/", "/mark.svg"}), "/assets/"
# Read by people in browsers, which can ask for a password but not for a bearer token.
PAGES = frozenset({"/docs", "/openapi.json"})
# Who asks for what is answered without a key, on a server that has keys.
NOBODY = Principal("", "", frozenset())
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Gate:
    """Checks that need the head of a request only. A server without a key is open to whoever can reach it, and web
    pages in a browser on this machine can: there `Host` and `Origin` must be its own."""

    def __init__(self, settings: Settings, keys: Keys) -> None:
        self._keys = keys
        self._max_header_bytes = settings.max_header_bytes
        self._origins = frozenset(settings.cors_origins)
        self._hosts = frozenset(name.lower() for name in (settings.host, *settings.allowed_hosts))

    async def prepare(self, scope: Scope) -> None:
        """Before `check`: the keys of an OpenID provider may have to be fetched."""
        if PRINCIPAL not in scope and not _open(scope["path"]):
            await self._keys.prepare(_bearer(Headers(scope=scope)))

    def check(self, scope: Scope) -> Principal:
        """Who asks.

        Raises:
            HeadersTooLarge, ForbiddenHost, ForbiddenOrigin, Unauthorized.
        """
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"]) + sum(
            len(name) + len(value) for name, value in scope["headers"])
        if size > self._max_header_bytes:
            raise HeadersTooLarge(f"the address and the headers take {size} bytes, this server allows "
                                  f"{self._max_header_bytes}", param="headers", fix="Send less of them.")
        if PRINCIPAL in scope:
            asked_for: Principal = scope[PRINCIPAL]
            return self._keys.held(asked_for)
        headers = Headers(scope=scope)
        if not self._keys.asked_for:
            self._check_host(headers)
            self._check_origin(headers, scope["method"])
            return OWNER
        return NOBODY if _open(scope["path"]) else self._holder(headers, scope["path"])

    def _holder(self, headers: Headers, path: str) -> Principal:
        given = _bearer(headers)
        if path not in PAGES:
            return self._keys.find(given)
        return self._keys.find(given or _password(headers), scheme="Basic")

    def _check_host(self, headers: Headers) -> None:
        # Without Host it is HTTP/1.0, which no browser speaks.
        host = headers.get("host")
        if host is not None and not self._own(host):
            raise ForbiddenHost(f"this server does not answer for the host {host[:100]!r}", param="Host",
                                fix="Name it in TRIMTAB_ALLOWED_HOSTS, or set an API key.")

    def _check_origin(self, headers: Headers, method: str) -> None:
        origin = headers.get("origin")
        if origin in self._origins:
            return
        foreign = origin is not None and not self._own(urlsplit(origin).netloc)
        # A browser that leaves Origin out still says that another site asks.
        if foreign or (method not in SAFE_METHODS and headers.get("sec-fetch-site") == "cross-site"):
            raise ForbiddenOrigin("the request comes from a page of another site, and this server has no API "
                                  "key", param="Origin", fix="Name the page's host in TRIMTAB_ALLOWED_HOSTS or its "
                                  "origin in TRIMTAB_CORS_ORIGINS, or set an API key.")

    def _own(self, authority: str) -> bool:
        name = _host_of(authority)
        return name is not None and (is_loopback(name) or name.endswith(".localhost") or name in self._hosts)


def _open(path: str) -> bool:
    """Whether the path is answered without the key."""
    return path in HEALTH or path in CONSOLE or path.startswith(CONSOLE_FILES)


def _host_of(authority: str) -> str | None:
    """`name`, `name:port`, `[v6]:port` -> the name in lower case, None where it is none of these."""
    try:
        parts = urlsplit(f"//{authority}")
        host, _ = parts.hostname, parts.port
        if host and ":" in host:
            ipaddress.IPv6Address(host)
    except ValueError:
        return None
    return host if host and parts.username is None and not parts.path else None


def _bearer(headers: Headers) -> bytes | None:
    """Of the header that OpenAI's clients send, or of Anthropic's."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = headers.get("x-api-key", "")
    # Starlette reads the bytes of headers as Latin-1; compared are the bytes.
    return given.strip().encode("latin-1") or None


def _password(headers: Headers) -> bytes | None:
    """Of HTTP's Basic scheme, whatever the user name."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return None
