"""Keys in memory, so that to check one costs microseconds and no database; the library holds them for all servers.

A key is `tt-ID-SECRET`. The secret has 256 random bits, so a plain SHA-256 of it is enough to store. A change that
another server makes is known here within `POLL_S`; one made here acts before it is answered.
"""

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeVar, cast

import anyio
import structlog
from pydantic import ValidationError

from server.errors import Unauthorized
from server.identity.policy import Held, Policy
from server.identity.principal import OWNER, Principal
from server.identity.roles import Role
from server.identity.tokens import Provider, Tokens, looks_like_token
from server.observability.instruments import Gauge, Registry
from server.threads import in_thread
from vectors.library.access import AccessKeys, StoredKey
from vectors.library.policies import Policies, StoredPolicy
from vectors.storage_errors import LibraryUnavailable

log = structlog.get_logger("trimtab.keys")
Result = TypeVar("Result")
POLL_S = 0.5
# How often it is written down when keys were last used.
USED_EVERY_S = 60.0
PREFIX = "tt"


class Keys:
    """`find` may be called from anywhere; the rest belongs to the event loop.

    Args:
        owner: the key of the settings, which may do everything; None where there is none.
    """

    def __init__(self, stored: AccessKeys, owner: bytes | None, registry: Registry, *,
                 policies: Policies | None = None, tokens: Tokens | None = None,
                 now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._stored, self._owner, self._now, self._policies = stored, owner, now, policies
        self._tokens = tokens
        self._held: dict[tuple[str, str], Held] = {}
        self._read: dict[str, Policy] = {}
        self._by_id: dict[str, StoredKey] = {}
        self._holders: dict[str, Principal] = {}
        self._used: dict[str, datetime] = {}
        self._written = now()
        self._wake, self._reading = asyncio.Event(), asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self.failure: str | None = None
        Gauge("trimtab_keys_out_of_step", "1 while keys cannot be read from the library, and those known before count.",
              registry=registry).set_function(lambda: float(self.failure is not None))

    @property
    def asked_for(self) -> bool:
        """Whether requests need a key."""
        return self._owner is not None or bool(self._by_id) or self._tokens is not None

    def own(self, owner: bytes) -> None:
        """Take another key for that of the settings; the one before counts no more."""
        self._owner = owner

    def follow(self, provider: Provider) -> None:
        """Take tokens as this says, on a server that takes some."""
        if self._tokens is not None:
            self._tokens.follow(provider)

    @property
    def keep(self) -> Role | None:
        """The role of which one key has to be left, because nothing else could change keys then."""
        return None if self._owner is not None else "admin"

    async def start(self) -> None:
        """Read the keys, then follow them. Raises LibraryUnavailable."""
        await self.refresh()
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            await self._exchange(last=True)

    def wake(self) -> None:
        """Look now for what other servers changed."""
        self._wake.set()

    def find(self, given: bytes | None, scheme: str = "Bearer") -> Principal:
        """Who has the key. `scheme`: how HTTP is to ask for another one.

        Raises:
            Unauthorized: nobody has it, or it is blocked or expired.
        """
        if not self.asked_for:
            return OWNER
        if given is not None and self._owner is not None and hmac.compare_digest(given, self._owner):
            return OWNER
        if given is not None and self._tokens is not None and looks_like_token(given):
            return self.held(self._tokens.find(given, scheme))
        key = self._known(given or b"")
        if key is None:
            raise Unauthorized("the API key is missing or wrong", param="Authorization", scheme=scheme,
                               fix="Send the header Authorization: Bearer KEY.")
        now = self._now()
        if key.blocked:
            raise Unauthorized(f"the API key {key.name!r} is blocked", param="Authorization", scheme=scheme,
                               fix="Ask an administrator of the server.")
        if key.expires_at is not None and key.expires_at <= now:
            raise Unauthorized(f"the API key {key.name!r} expired at {key.expires_at.isoformat()}",
                               param="Authorization", scheme=scheme,
                               fix="Ask an administrator of the server for another one.")
        self._used[key.id] = now
        return self._holders[key.id]

    async def prepare(self, given: bytes | None) -> None:
        """Before `find`: wait until what is needed for it is here, for a bounded time."""
        if given is not None and self._tokens is not None and looks_like_token(given):
            await self._tokens.prepare(given)

    def held(self, who: Principal) -> Principal:
        """With the policies that hold for it now."""
        if who.key_id is None or not self._held:
            return who
        found = (self._held.get((who.tenant, "")), self._held.get((who.tenant, who.key_id)))
        return replace(who, policies=tuple(one for one in found if one is not None))

    def weight(self, tenant: str, key_id: str = "") -> float:
        """Its share of the engine under load, beside those of others."""
        found = self._held.get((tenant, key_id))
        return 1.0 if found is None else found.quota.weight

    def all(self) -> list[StoredKey]:
        """The keys that are known, in the order in which they were made."""
        return list(self._by_id.values())

    async def refresh(self) -> None:
        """Raises LibraryUnavailable."""
        # One at a time, so that what was read first never takes the place of what was read after it.
        async with self._reading:
            keys, policies = await in_thread(lambda: (
                self._stored.all(), [] if self._policies is None else self._policies.all()))
            # Both at once, so that no key is ever known without the policies that hold for it.
            read = {one.document: self._read.get(one.document) or policy_of(one) for one in policies}
            self._by_id, self._read = {key.id: key for key in keys}, read
            self._held = {(one.tenant, one.key_id): Held(
                one.label, read[one.document], f"{one.tenant}/{one.key_id}") for one in policies}
            self._holders = {key.id: self.held(Principal(
                key.name, key.tenant, frozenset(cast(tuple[Role, ...], key.roles)), key.id)) for key in keys}

    async def changed(self, work: Callable[[], Result]) -> Result:
        """Do `work` on the library, and have it act here before this returns."""
        result = await in_thread(work)
        await self.refresh()
        return result

    def used_at(self, key: StoredKey) -> datetime | None:
        """When it was last used, on this server also since the library was told."""
        return self._used.get(key.id, key.used_at)

    def _known(self, given: bytes) -> StoredKey | None:
        prefix, _, rest = given.partition(b"-")
        key_id, _, secret = rest.partition(b"-")
        key = self._by_id.get(key_id.decode("latin-1")) if prefix == PREFIX.encode() else None
        if key is None:
            return None
        digest = hashlib.sha256(secret).hexdigest()
        if hmac.compare_digest(digest, key.digest):
            return key
        overlaps = key.former_until is not None and key.former_until > self._now()
        return key if overlaps and hmac.compare_digest(digest, key.former_digest or "") else None

    async def _follow(self) -> None:
        while True:
            with anyio.move_on_after(POLL_S):
                await self._wake.wait()
            self._wake.clear()
            await self._exchange()

    async def _exchange(self, *, last: bool = False) -> None:
        """Learn what other servers changed, and from time to time write down which keys were used."""
        try:
            if self._used and (last or (self._now() - self._written).total_seconds() >= USED_EVERY_S):
                used, self._used = self._used, {}
                try:
                    await in_thread(lambda: self._stored.used(used))
                except BaseException:
                    self._used = {**used, **self._used}
                    raise
                self._written = self._now()
            if not last:
                await self.refresh()
            self.failure = None
        except Exception as error:  # any error of a database: the keys that are known go on to count
            if self.failure is None:
                log.warning("keys_out_of_step", error=str(error)[:300])
            self.failure = f"{type(error).__name__}: {error}"[:300]


def policy_of(stored: StoredPolicy) -> Policy:
    """Raises LibraryUnavailable: a newer version of the server wrote it. Requests are not let past what cannot be read.
    """
    try:
        return Policy.model_validate_json(stored.document)
    except ValidationError as error:
        raise LibraryUnavailable(f"the policy of {stored.label} cannot be read", fix="Set it anew, or use the version "
                                 "that wrote it.") from error


def new_secret() -> tuple[str, str]:
    """A secret, and what is stored of it."""
    secret = secrets.token_urlsafe(32)
    return secret, hashlib.sha256(secret.encode()).hexdigest()


def spelled(key_id: str, secret: str) -> str:
    """The key as a client sends it."""
    return f"{PREFIX}-{key_id}-{secret}"


