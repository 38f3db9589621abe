"""The route class of all JSON endpoints: reads the body strictly and answers pydantic's complaints as typed errors."""

from collections.abc import Callable, Coroutine
from functools import partial
from inspect import iscoroutinefunction
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from server.api.strict_json import parse_json
from server.api.validation import invalid
from server.errors import UnsupportedMediaType
from server.http.inflate import compressed, inflated
from server.identity.principal import CURRENT
from server.identity.quotas import QUOTA
from server.identity.roles import ANY_KEY, METERED, NEEDED, OF_ALL_TENANTS, OPEN
from server.requests.submitting import GIVEN, Given
from server.threads import contained
from steering.language.errors import InvalidRequest, printable

# Longer bodies are read in a thread: the event loop waits for some milliseconds of a part of it at most, not for all.
AT_ONCE_BYTES = 2**15


class StrictRequest(Request):
    """A request whose body has been read already."""

    value: Any = None

    async def json(self) -> Any:
        return self.value


class StrictRoute(APIRoute):
    def __init__(self, path: str, endpoint: Callable[..., Any], **kwargs: Any) -> None:
        # A plain function runs in a thread of FastAPI's pool.
        super().__init__(path, endpoint if iscoroutinefunction(endpoint) else contained(endpoint), **kwargs)
        # A route that the table does not know cannot be made, so none is open by oversight.
        if self.name not in NEEDED:
            raise ValueError(f"server.identity.roles.NEEDED does not say which role {self.name} ({path}) needs")
        self.needed = NEEDED[self.name]

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What quotas count holds its place until the last byte of its answer is sent."""
        who = CURRENT.get()
        if self.name not in METERED or not who.policies or self.needed in (ANY_KEY, OPEN) or not who.may(self.needed):
            await super().handle(scope, receive, send)
            return
        state = scope["state"]
        async with scope["app"].state.server.quotas.holding(who, state["request_id"]) as asked:
            if asked is not None:
                # A refusal tells in its head what is left, too.
                state[QUOTA] = asked
                await asked.enter()
            await super().handle(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if self.needed not in (ANY_KEY, OPEN):
                CURRENT.get().check(self.needed, f"{request.method} {self.path_format}")
            if self.name in OF_ALL_TENANTS:
                CURRENT.get().check_house(f"{request.method} {self.path_format}")
            strict_request = StrictRequest(request.scope, request.receive)
            value: Any = None
            if self.body_field is not None:
                # Here, not in FastAPI's own reading, which would turn every error into one sentence.
                _check_content_type(request)
                packed = compressed(request.headers)
                body = await strict_request.body()
                if packed:
                    most, pools = _most_bytes(request), request.app.state.server.pools
                    body = await pools.read(lambda: inflated(body, most))
                GIVEN.set(Given(request.method, _path(request), request.url.query, body))
                if len(body) <= AT_ONCE_BYTES:
                    strict_request.value = value = parse_json(body)
                else:
                    value, strict_request.value = await request.app.state.server.pools.read(partial(self._read, body))
            try:
                return await handler(strict_request)
            except RequestValidationError as error:
                raise self._typed(error, value) from None

        return strict

    def _read(self, body: bytes) -> tuple[Any, Any]:
        """The value of a body, and what FastAPI is to take for it: the model that it was validated to, which FastAPI
        leaves as it is.

        Raises:
            InvalidRequest: it is not JSON, or not what the route takes.
        """
        value = parse_json(body)
        if self.body_field is None or self._embed_body_fields:
            return value, value
        checked, complaints = self.body_field.validate(value, {}, loc=("body",))
        if complaints:
            raise self._typed(RequestValidationError(complaints), value)
        return value, checked

    def _typed(self, error: RequestValidationError, value: Any) -> InvalidRequest:
        complaints = [{**c, "loc": c["loc"][1:]} for c in error.errors() if c["loc"][0] == "body"]
        if complaints and self.body_field is not None:
            return invalid(complaints, value, self.body_field.field_info.annotation)
        first = error.errors()[0]
        path = tuple(first["loc"][1:])
        if first["type"] == "extra_forbidden":
            return InvalidRequest(f"unknown query parameter {printable(str(path[-1]))!r}", param=path[-1:],
                                  fix="Leave it out.")
        return InvalidRequest(str(first["msg"]).removeprefix("Value error, "), param=path)


def _path(request: Request) -> str:
    """As it was sent, because a `%2F` is a part of a name."""
    raw: bytes | None = request.scope.get("raw_path")
    return request.url.path if raw is None else raw.decode("ascii")


def _most_bytes(request: Request) -> int:
    most: int = request.app.state.server.settings.max_body_bytes
    return most


def _check_content_type(request: Request) -> None:
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != "application/json" and not given.endswith("+json"):
        raise UnsupportedMediaType(f"the body is {given[:80] or 'of no stated type'}", param="Content-Type",
                                   fix="Send application/json.")
