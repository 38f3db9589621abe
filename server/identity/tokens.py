"""Tokens of an OpenID provider (JWT): who has one, in which tenant, with which roles.

The provider's keys are fetched beside the requests, kept, and fetched again from time to time and when a token names
one that is not known. While the provider cannot be reached, the keys that are known go on to count. Only signatures by
a key pair are taken, each by the algorithm of its key, so that nothing that is public can sign a token.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args
from urllib.parse import urlsplit

import httpx
import jwt
import structlog
from cachetools import TTLCache
from jwt.exceptions import PyJWTError

from server.errors import InvalidSettings, Unauthorized
from server.identity.principal import Principal
from server.identity.roles import Role
from server.observability.instruments import Counter, Gauge, Registry
from vectors.library.spaces import is_tenant

log = structlog.get_logger("trimtab.tokens")
ROLES: frozenset[str] = frozenset(get_args(Role))
# By the algorithm that the key is for; a key that names none has the first one of its kind.
ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"})
# Seconds between two fetches as a rule, and at least, however many tokens with unknown keys come.
EVERY_S, SOONEST_S = 300.0, 5.0
TIMEOUT_S = 5.0
MOST_BYTES, MOST_KEYS, MOST_TOKEN = 2**20, 100, 8 * 2**10
# Clocks of the provider and of this server may differ by so much.
LEEWAY_S = 30.0
# Checked tokens, which are not checked again for a while.
MOST_CHECKED, CHECKED_S = 4096, 60.0
DISCOVERY = "/.well-known/openid-configuration"


@dataclass(frozen=True)
class Provider:
    """What is taken from which OpenID provider.

    Attributes:
        jwks_url: of its keys; None for where it says that they are.
        tenant_claim, roles_claim: which claims say the tenant and the roles; `a.b` is b inside of a.
        tenant: of tokens without that claim; None: they are refused.
        roles: what the values of the claim mean here; empty where they are the names of roles.
    """

    issuer: str
    audience: str
    jwks_url: str | None = None
    tenant_claim: str = "tenant"
    roles_claim: str = "roles"
    tenant: str | None = None
    roles: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def check(self) -> None:
        """Raises InvalidSettings."""
        for name, url in (("oidc_jwks_url", self.jwks_url), ("oidc_issuer", self.issuer)):
            if url is not None and not (name == "oidc_issuer" and self.jwks_url) and not fetchable(url):
                raise InvalidSettings(f"{url[:100]!r} is no https address, from which keys could be fetched",
                                      param=name)
        unknown = sorted({role for roles in self.roles.values() for role in roles} - ROLES)
        if unknown:
            raise InvalidSettings(f"there is no role {unknown[0][:60]!r}", param="oidc_roles",
                                  fix=f"Use some of {', '.join(sorted(ROLES))}.")


@dataclass(frozen=True)
class Checked:
    who: Principal
    expires: float


class Tokens:
    """`find` may be called from anywhere; the rest belongs to the event loop."""

    def __init__(self, provider: Provider, registry: Registry, *, now: Callable[[], float] = time.time,
                 clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            now: seconds since 1970. clock: never goes back.

        Raises:
            InvalidSettings.
        """
        provider.check()
        self._provider = provider
        self._now, self._clock = now, clock
        self._keys: dict[str, jwt.PyJWK] = {}
        self._tried_at, self._fetched_at = float("-inf"), float("-inf")
        self._checked: TTLCache[bytes, Checked] = TTLCache(MOST_CHECKED, CHECKED_S)
        self._fetching: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._failures = Counter("trimtab_oidc_fetch_failures", "Times that the keys of the OpenID provider could not "
                                 "be fetched; those that are known go on to count.", registry=registry)
        Gauge("trimtab_oidc_keys", "Keys of the OpenID provider that are known.", registry=registry).set_function(
            lambda: float(len(self._keys)))

    async def start(self) -> None:
        """Fetch the keys. The server starts also without them, because they may come later."""
        await self._fetch()
        self._following = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        tasks = [task for task in (self._following, self._fetching) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def follow(self, provider: Provider) -> None:
        """Take tokens as this says from now on; it was checked. The keys of another provider are fetched at once, and
        tokens that come meanwhile wait for them."""
        before, self._provider = self._provider, provider
        self._checked.clear()
        if (before.issuer, before.jwks_url) != (provider.issuer, provider.jwks_url):
            self._keys = {}
            if self._fetching is not None:
                self._fetching.cancel()
            self._fetching = asyncio.create_task(self._fetch())

    async def prepare(self, given: bytes) -> None:
        """Fetch the keys where a token names one that is not known, though not more often than every few seconds."""
        try:
            kid = jwt.get_unverified_header(given).get("kid")
        except PyJWTError:
            return
        if kid in self._keys:
            return
        # One fetch for all that wait, which nobody's leaving ends.
        fetching = self._fetching is not None and not self._fetching.done()
        if not fetching and self._clock() - self._tried_at >= SOONEST_S:
            self._fetching = asyncio.create_task(self._fetch())
        if self._fetching is not None:
            await asyncio.shield(self._fetching)

    def find(self, given: bytes, scheme: str = "Bearer") -> Principal:
        """Who has the token.

        Raises:
            Unauthorized: it is not the provider's, not for this server, or its time is over.
        """
        digest = hashlib.sha256(given).digest()
        known = self._checked.get(digest)
        if known is not None and known.expires > self._now():
            return known.who
        try:
            checked = self._check(given)
        except PyJWTError as error:
            raise Unauthorized(f"the token is refused: {_told(error)}", param="Authorization", scheme=scheme,
                               fix="Have the OpenID provider issue another one.") from None
        self._checked[digest] = checked
        return checked.who

    def _check(self, given: bytes) -> Checked:
        if len(given) > MOST_TOKEN:
            raise jwt.InvalidTokenError("it is too long")
        header = jwt.get_unverified_header(given)
        key = self._keys.get(str(header.get("kid", "")))
        if key is None:
            raise jwt.InvalidKeyError("its key is not known")
        claims = jwt.decode(
            given, key, algorithms=[key.algorithm_name], audience=self._provider.audience,
            issuer=self._provider.issuer, leeway=LEEWAY_S, options={"require": ["exp", "iat", "sub", "aud", "iss"]})
        return Checked(self._who(claims), float(claims["exp"]) + LEEWAY_S)

    def _who(self, claims: Mapping[str, Any]) -> Principal:
        provider = self._provider
        tenant = _claim(claims, provider.tenant_claim)
        if tenant is None:
            tenant = provider.tenant
        if not isinstance(tenant, str) or not is_tenant(tenant):
            raise jwt.InvalidTokenError(f"its claim {provider.tenant_claim} names no tenant")
        told = _claim(claims, provider.roles_claim)
        values = told.split() if isinstance(told, str) else told if isinstance(told, list) else []
        meant = provider.roles
        roles = {role for value in values if isinstance(value, str)
                 for role in (meant.get(value, ()) if meant else (value,)) if role in ROLES}
        subject = str(claims["sub"])
        name = "".join(c if c.isprintable() else "?" for c in subject)[:64]
        key_id = f"jwt-{hashlib.sha256(f'{provider.issuer} {subject}'.encode()).hexdigest()[:16]}"
        return Principal(name, tenant, frozenset(roles), key_id)  # type: ignore[arg-type]

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            await self._fetch()

    async def _fetch(self) -> None:
        self._tried_at = self._clock()
        provider = self._provider
        try:
            async with asyncio.timeout(2 * TIMEOUT_S), httpx.AsyncClient(timeout=TIMEOUT_S) as client:
                url = provider.jwks_url
                if url is None:
                    found = await _document(client, provider.issuer.rstrip("/") + DISCOVERY)
                    url = str(found["jwks_uri"])
                    if found.get("issuer") != provider.issuer:
                        raise ValueError("the provider calls itself by another name")
                    if not fetchable(url):
                        raise ValueError("keys are fetched by https only")
                keys = keys_of(await _document(client, url))
        except (httpx.HTTPError, OSError, ValueError, KeyError, TypeError, TimeoutError) as error:
            self._failures.inc()
            log.warning("oidc_keys_not_fetched", error=f"{type(error).__name__}: {error}"[:300])
            return
        if provider is not self._provider:
            # Another one is asked by now.
            return
        if {kid: key.key_id for kid, key in keys.items()} != {kid: key.key_id for kid, key in self._keys.items()}:
            log.info("oidc_keys", keys=sorted(keys))
        # What a key that is gone has signed counts no more.
        self._keys = keys
        self._checked.clear()


def keys_of(document: Mapping[str, Any]) -> dict[str, jwt.PyJWK]:
    """The keys of a JWKS that may sign tokens, by their ids."""
    found: dict[str, jwt.PyJWK] = {}
    for one in document["keys"][:MOST_KEYS]:
        if not isinstance(one, dict) or one.get("use", "sig") != "sig" or not isinstance(one.get("kid"), str):
            continue
        try:
            key = jwt.PyJWK(one)
        except PyJWTError as error:
            log.warning("oidc_key_passed_over", kid=one["kid"][:100], error=str(error)[:200])
            continue
        if key.algorithm_name in ALGORITHMS and one.get("kty") != "oct":
            found[one["kid"]] = key
    return found


def looks_like_token(given: bytes) -> bool:
    """A JWT is three parts, the first of which is JSON in base64."""
    return given.startswith(b"ey") and given.count(b".") == 2


async def _document(client: httpx.AsyncClient, url: str) -> dict[str, Any]:
    """A JSON object of bounded size."""
    async with client.stream("GET", url, headers={"Accept": "application/json"}) as answer:
        answer.raise_for_status()
        content = b""
        async for part in answer.aiter_bytes():
            content += part
            if len(content) > MOST_BYTES:
                raise ValueError("the answer is too long")
    found = json.loads(content)
    if not isinstance(found, dict):
        raise ValueError("the answer is no JSON object")
    return found


def fetchable(url: str) -> bool:
    """Whether what is fetched from there is what its owner sent."""
    parsed = urlsplit(url)
    return bool(parsed.hostname) and (parsed.scheme == "https" or (
        parsed.scheme == "http" and parsed.hostname in ("127.0.0.1", "localhost", "::1")))


def _claim(claims: Mapping[str, Any], name: str) -> Any:
    """A claim, or one inside of others: `realm_access.roles`."""
    if name in claims:
        return claims[name]
    found: Any = claims
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _told(error: PyJWTError) -> str:
    reasons: tuple[tuple[type[PyJWTError], str], ...] = (
        (jwt.ExpiredSignatureError, "it has expired"), (jwt.ImmatureSignatureError, "it is not valid yet"),
        (jwt.InvalidAudienceError, "it is for another audience"), (jwt.InvalidIssuerError, "it is of another issuer"),
        (jwt.InvalidAlgorithmError, "its algorithm is not that of its key"),
        (jwt.InvalidSignatureError, "its signature is wrong"), (jwt.MissingRequiredClaimError, str(error)))
    own = type(error) in (jwt.InvalidTokenError, jwt.InvalidKeyError)
    return next((reason for kind, reason in reasons if isinstance(error, kind)),
                str(error)[:200] if own else "it cannot be read")
