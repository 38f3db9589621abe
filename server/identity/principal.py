"""Who sends a request."""

from contextvars import ContextVar
from dataclasses import dataclass, field

from server.errors import NotPermitted
from server.identity.policy import Held
from server.identity.roles import ROLES, Role
from steering.language.errors import Path


@dataclass(frozen=True)
class Principal:
    """key_id: None for the key of the settings, and for everybody on a server that asks for no key. policies: all of
    which hold; none for the owner."""

    name: str
    tenant: str
    roles: frozenset[Role]
    key_id: str | None = None
    policies: tuple[Held, ...] = field(default=(), compare=False)

    def may(self, role: Role) -> bool:
        return role in self.roles or "admin" in self.roles

    def check(self, role: Role, what: str, param: str | Path | None = None) -> None:
        """Raises NotPermitted: `what` needs a role that this one does not have."""
        if not self.may(role):
            raise NotPermitted(f"{what} needs the role {role}, which this key does not have", param=param,
                               fix="Use a key with that role; an administrator can add it: "
                               f"trimtab keys change ID --role {role} with the roles it has.")


OWNER = Principal("owner", "default", frozenset(ROLES))
# In the ASGI scope of a request that the server sends itself, for somebody: no client can put anything there.
PRINCIPAL = "trimtab.principal"
# The server's own work, a trial of a spec for example, is the owner's.
CURRENT: ContextVar[Principal] = ContextVar("principal", default=OWNER)
