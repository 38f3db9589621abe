"""Settings that are read again while the server runs, on SIGHUP or when an administrator asks for it.

The file with settings and the files with secrets are read again; options and the environment of a process stay. All of
it is checked before anything is taken over. A request that runs keeps the settings it began with.
"""

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog
from fastapi import FastAPI
from pydantic import JsonValue, SecretStr

from server.errors import InvalidSettings, SettingsRefused
from server.identity.recording import recorded
from server.identity.tokens import Provider
from server.requests.state import ServerState
from server.settings import Settings
from server.threads import in_thread

log = structlog.get_logger("trimtab.settings")
# Taken over when the settings are read again while the server runs. What is not here, a model or a port, needs a start.
RELOADED = frozenset("""
    api_key max_choices max_prompts max_output_tokens max_inline_bytes max_program_numbers max_grammar_bytes
    require_steering request_timeout_s keep_alive_s kill_switch_running judge_urls vllm_adapter_dir queue_requests
    queue_tokens shadow_sample shadow_budget outcome_sample audit_steering_sample audit_texts audit_redact
    oidc_issuer oidc_audience oidc_jwks_url oidc_tenant_claim oidc_tenant oidc_roles_claim oidc_roles
    quota_store_url quota_store_timeout_s
""".split())
HIDDEN = "(hidden)"
# A URL of a database or a storage may carry a name with a password in front of the host, or keys behind a "?".
CREDENTIALS = re.compile(r"(?<=://)[^/@]*(?=@)|(?<=\?).*")


@dataclass(frozen=True)
class Reloaded:
    """
    Attributes:
        changed: names of settings, and what holds from now on; secrets are hidden.
        needs_restart: names of settings that were given another value, which only a start of the server takes over.
        certificates: whether the files of TLS were read again.
    """

    changed: Mapping[str, JsonValue]
    needs_restart: tuple[str, ...]
    certificates: bool


class Reloading:
    """Belongs to the event loop.

    Args:
        app: its `state.server` is replaced by one with the new settings.
        again: reads the settings as the start of the server did; may raise InvalidSettings.
    """

    def __init__(self, app: FastAPI, again: Callable[[], Settings]) -> None:
        self._app, self._again = app, again
        self._lock = asyncio.Lock()
        # What was asked for, with what holds of it where that differs from what is asked for by now.
        self._asked: Settings | None = None
        # Reads the files of TLS again; set by the server that has opened its sockets.
        self.certificates: Callable[[], None] | None = None

    async def remember(self) -> None:
        """What was asked for at the start. What the start found out by itself, where the model lies say, differs."""
        self._asked = await in_thread(self._again)

    async def reload(self) -> Reloaded:
        """
        Raises:
            SettingsRefused: what is asked for now is not valid; nothing was taken over.
        """
        async with self._lock:
            if self._asked is None:
                raise SettingsRefused("the server has not started yet", fix="Try again when it is ready.")
            try:
                wanted = await in_thread(self._again)
            except InvalidSettings as error:
                raise SettingsRefused(error.message, param=error.param, fix=error.fix) from error
            differing = [name for name in Settings.model_fields if getattr(wanted, name) != getattr(self._asked, name)]
            taken = {name: getattr(wanted, name) for name in differing if _may_change(name, wanted, self._asked)}
            state: ServerState = self._app.state.server
            settings = state.settings.model_copy(update=taken)
            before = {name: shown(getattr(state.settings, name), state.settings, name) for name in taken}
            after = {name: shown(getattr(settings, name), settings, name) for name in taken}
            left = tuple(name for name in differing if name not in taken)
            async with recorded(state.library.audit, "settings.reload", "settings", before=before,
                                after={**after, "needs_restart": list(left)}):
                provider = provider_of(settings)
                try:
                    if provider is not None:
                        provider.check()
                    if self.certificates is not None:
                        await in_thread(self.certificates)
                except InvalidSettings as error:
                    raise SettingsRefused(error.message, param=error.param, fix=error.fix) from error
                if provider is not None and provider != provider_of(state.settings):
                    state.keys.follow(provider)
                self._follow(state, settings)
            self._asked = self._asked.model_copy(update=taken)
        log.info("settings_reloaded", changed=after, needs_restart=left)
        return Reloaded(after, left, self.certificates is not None)

    def _follow(self, state: ServerState, settings: Settings) -> None:
        """Nothing here fails, so all of it holds or none."""
        if settings.api_key is not None:
            state.keys.own(settings.api_key.get_secret_value().encode())
        state.shadow.follow(settings.shadow_sample, settings.shadow_budget)
        state.live_grading.follow(settings.outcome_sample, settings.shadow_sample)
        if settings.quota_store_url is not None:
            state.quotas.counters.follow(settings.quota_store_url.get_secret_value(), settings.quota_store_timeout_s)
        state.queue.follow(settings.queue_requests, settings.queue_tokens)
        state.steering_audit.follow(settings)
        state.planner.follow(settings)
        # The fields of a state are read by each request at its beginning, and as one object.
        self._app.state.server = state.with_settings(settings)


def provider_of(settings: Settings) -> Provider | None:
    """The OpenID provider whose tokens count, if there is one."""
    if settings.oidc_issuer is None or settings.oidc_audience is None:
        return None
    return Provider(settings.oidc_issuer, settings.oidc_audience, settings.oidc_jwks_url, settings.oidc_tenant_claim,
                    settings.oidc_roles_claim, settings.oidc_tenant, settings.oidc_roles)


def _may_change(name: str, wanted: Settings, asked: Settings) -> bool:
    """A server with a key, a provider of tokens or a Redis for its quotas becomes one without, or the reverse, only by
    a start."""
    of = {"api_key": "api_key", "quota_store_url": "quota_store_url"}.get(
        name, "oidc_issuer" if name.startswith("oidc_") else None)
    if of is not None and (getattr(wanted, of) is None or getattr(asked, of) is None):
        return False
    return name in RELOADED


def shown(value: object, settings: Settings, name: str) -> JsonValue:
    """The value of a setting as JSON, without what is secret."""
    if isinstance(value, SecretStr):
        return HIDDEN
    if name == "vllm_args":
        # Arguments of another program, a token for a hub among them: only that program knows which are secret.
        return dict.fromkeys(settings.vllm_args, HIDDEN)
    plain: JsonValue = settings.model_dump(mode="json", include={name})[name]
    return CREDENTIALS.sub(HIDDEN, plain) if isinstance(plain, str) and "://" in plain else plain
