"""`GET /v1/admin/settings`: the settings in force and the versions of what runs, without secrets."""

import re
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

from fastapi import APIRouter
from pydantic import BaseModel, Field, JsonValue, SecretStr

from server.api.route import StrictRoute
from server.requests.state import State

router = APIRouter(prefix="/v1/admin", tags=["admin"], route_class=StrictRoute)
PACKAGES = ("trimtab", "torch", "transformers", "vllm")
HIDDEN = "(hidden)"
# A URL of a database or a storage may carry a name with a password in front of the host, or keys behind a "?".
CREDENTIALS = re.compile(r"(?<=://)[^/@]*(?=@)|(?<=\?).*")


class SettingView(BaseModel):
    name: str
    value: JsonValue = Field(description="Passwords and keys are hidden.")
    default: bool = Field(description="Whether nobody set it to something else.")
    description: str


class SettingsView(BaseModel):
    settings: list[SettingView]
    versions: dict[str, str] = Field(description="Of Python and of the packages that a server of this kind runs on.")


@router.get("/settings")
def show_settings(state: State) -> SettingsView:
    """What this server was started with."""
    settings = state.settings
    # Arguments of another program, a token for a hub among them: only that program knows which of them are secret.
    plain: dict[str, JsonValue] = settings.model_dump(mode="json", exclude={"vllm_args"})
    found = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        found.append(SettingView(name=name, value=_shown(value, plain.get(name)), description=field.description or "",
                                 default=value == field.get_default(call_default_factory=True)))
    return SettingsView(settings=found, versions={"python": python_version(), **_installed()})


def _shown(value: object, plain: JsonValue) -> JsonValue:
    """plain: the value as JSON; None where only its names may be told."""
    if isinstance(value, SecretStr):
        return HIDDEN
    if isinstance(value, dict) and plain is None:
        return dict.fromkeys(value, HIDDEN)
    return CREDENTIALS.sub(HIDDEN, plain) if isinstance(plain, str) and "://" in plain else plain


def _installed() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
