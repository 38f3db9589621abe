"""The bearer key."""

import hmac

from fastapi import Request
from pydantic import SecretStr

from server.errors import Unauthorized


def check_key(request: Request, api_key: SecretStr | None) -> None:
    """Raises Unauthorized unless the request carries `api_key`, or none is set."""
    if api_key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    expected = api_key.get_secret_value()
    # Starlette reads the bytes of headers as Latin-1; compared are the bytes.
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), expected.encode()):
        raise Unauthorized("the API key is missing or wrong", param="Authorization",
                           fix="Send the header Authorization: Bearer KEY.")
