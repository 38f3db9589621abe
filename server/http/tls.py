"""HTTPS of the server itself, by uvicorn's options, and its certificates read again while it runs."""

import ssl
from typing import Any

from server.errors import InvalidSettings
from server.settings import Settings


def certificates(settings: Settings) -> dict[str, Any]:
    """Options of uvicorn; none for plain HTTP."""
    if settings.tls_certificate is None:
        return {}
    return {"ssl_certfile": settings.tls_certificate, "ssl_keyfile": settings.tls_key,
            "ssl_keyfile_password": _password(settings), "ssl_ca_certs": settings.tls_client_ca,
            "ssl_cert_reqs": ssl.CERT_REQUIRED if settings.tls_client_ca else ssl.CERT_NONE}


def check_certificates(settings: Settings, used: ssl.SSLContext | None = None) -> None:
    """Read the files and see that they belong together.

    Args:
        used: connections that are made with it from now on have what was read.

    Raises:
        InvalidSettings: naming the file; `used` is as before.
    """
    if settings.tls_certificate is None:
        return
    # A context that refuses a key has its certificate already, so another one tries first.
    for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), used):
        if context is None:
            continue
        try:
            context.load_cert_chain(settings.tls_certificate, settings.tls_key, lambda: _password(settings) or "")
        except (OSError, ValueError) as error:
            raise InvalidSettings(f"certificate and key cannot be read from {settings.tls_certificate} and "
                                  f"{settings.tls_key or 'the same file'}: {error}", param="tls_certificate",
                                  fix="Give a certificate in PEM and the key that belongs to it.") from error
        if settings.tls_client_ca is not None:
            try:
                context.load_verify_locations(settings.tls_client_ca)
            except (OSError, ValueError) as error:
                raise InvalidSettings(f"no authorities can be read from {settings.tls_client_ca}: {error}",
                                      param="tls_client_ca", fix="Give their certificates in PEM.") from error


def _password(settings: Settings) -> str | None:
    return None if settings.tls_key_password is None else settings.tls_key_password.get_secret_value()
