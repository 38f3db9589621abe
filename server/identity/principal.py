"""Who sends a request."""

from contextvars import ContextVar
from dataclasses import dataclass, field

from server.errors import NotPermitted
from server.identity.policy import Held
from server.identity.roles import ROLES, Role
from steering.language.errors import Path
from vectors.library.spaces import EVERYTHING, HOUSE, Reader


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

    @property
    def reader(self) -> Reader:
        """What of others it may know: administrators of everything, because they make the keys of every tenant."""
        return EVERYTHING if "admin" in self.roles else Reader(self.tenant)

    def check_house(self, what: str) -> None:
        """Raises NotPermitted: `what` tells of all tenants, and this is a key of one."""
        if self.tenant != HOUSE and "admin" not in self.roles:
            raise NotPermitted(f"{what} tells of all tenants, so it is for keys of the tenant {HOUSE} and for "
                               "administrators", fix="Use a key of that tenant.")

    def check(self, role: Role, what: str, param: str | Path | None = None) -> None:
        """Raises NotPermitted: `what` needs a role that this one does not have."""
        if not self.may(role):
            raise NotPermitted(f"{what} needs the role {role}, which this key does not have", param=param,
                               fix="Use a key with that role; an administrator can add it: "
                               f"trimtab keys change ID --role {role} with the roles it has.")


OWNER = Principal("owner", HOUSE, frozenset(ROLES))
# In the ASGI scope of a request that the server sends itself, for somebody: no client can put anything there.
PRINCIPAL = "trimtab.principal"
# The server's own work, a trial of a spec for example, is the owner's.
CURRENT: ContextVar[Principal] = ContextVar("principal", default=OWNER)
