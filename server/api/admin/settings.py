"""`/v1/admin/settings`: the settings in force and the versions of what runs, without secrets; reading them again."""

from importlib.metadata import PackageNotFoundError, version
from platform import python_version

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, JsonValue

from server.api.route import StrictRoute
from server.requests.reload import RELOADED, Reloading, shown
from server.requests.state import State

router = APIRouter(prefix="/v1/admin", tags=["admin"], route_class=StrictRoute)
PACKAGES = ("trimtab", "torch", "transformers", "vllm")


class SettingView(BaseModel):
    name: str
    value: JsonValue = Field(description="Passwords and keys are hidden.")
    default: bool = Field(description="Whether nobody set it to something else.")
    reloaded: bool = Field(description="Whether another value is taken over while the server runs.")
    description: str


class SettingsView(BaseModel):
    settings: list[SettingView]
    versions: dict[str, str] = Field(description="Of Python and of the packages that a server of this kind runs on.")


class ReloadedView(BaseModel):
    changed: dict[str, JsonValue] = Field(description="Settings that changed, and what holds from now on.")
    needs_restart: list[str] = Field(description="Settings that were given another value, which holds only after a "
                                     "start of the server.")
    certificates: bool = Field(description="Whether the files of TLS were read again.")


@router.get("/settings")
def show_settings(state: State) -> SettingsView:
    """What holds on this server."""
    settings = state.settings
    found = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        found.append(SettingView(name=name, value=shown(value, settings, name), description=field.description or "",
                                 reloaded=name in RELOADED,
                                 default=value == field.get_default(call_default_factory=True)))
    return SettingsView(settings=found, versions={"python": python_version(), **_installed()})


@router.post("/settings/reload")
async def reload_settings(request: Request) -> ReloadedView:
    """Read the file with settings and the files with secrets again, and take over what can be. SIGHUP does the same.
    What is not valid is refused, and then nothing changes."""
    reloading: Reloading = request.app.state.reloading
    done = await reloading.reload()
    return ReloadedView(changed=dict(done.changed), needs_restart=list(done.needs_restart),
                        certificates=done.certificates)


def _installed() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
