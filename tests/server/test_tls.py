"""The server's own HTTPS, over real sockets: certificates made here, clients that check them."""

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fastapi import FastAPI

from server.errors import InvalidSettings
from server.http.connection import Connection
from server.http.listener import bind
from server.http.runner import Server, base_url
from server.http.tls import check_certificates
from server.settings import Settings, load_settings
from tests.server.conftest import chat

Key = ec.EllipticCurvePrivateKey


class Authority:
    """Signs certificates and writes them into files."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = self._signed(name, self._key, ca=True)
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, password: bytes | None = None) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate, secret = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        certificate.write_bytes(self._signed(name, key).public_bytes(serialization.Encoding.PEM))
        hidden: Any = serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(
            password)
        secret.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden))
        return certificate, secret

    def _signed(self, name: str, key: Key, *, ca: bool = False) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        subject, issuer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one)]) for one in (name, self.name))
        made = (x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
                .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
                .not_valid_after(now + datetime.timedelta(days=1))
                .add_extension(x509.BasicConstraints(ca, None), critical=True))
        if ca:
            made = made.add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), True)
        else:
            made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        return made.sign(self._key, hashes.SHA256())


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


@pytest.fixture
def settings(settings: Settings, authority: Authority) -> Settings:
    certificate, key = authority.issue("server", b"sesame")
    return load_settings(served_model_name=settings.model_name, data_dir=settings.data_dir, tls_certificate=certificate,
                         tls_key=key, tls_key_password="sesame", tls_client_ca=authority.file)


@pytest.fixture
async def server(app: FastAPI, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setattr("server.http.runner.CHECK_S", 0.05)
    told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    sockets = bind("127.0.0.1", 0)
    async with app.router.lifespan_context(app):
        server = Server(app, settings, settings.max_connections, told.set_result)
        serving = asyncio.create_task(server.serve(sockets))
        async with asyncio.timeout(60):
            url = await told
        assert url.startswith("https://127.0.0.1:")
        yield server
        server.stop()
        await serving


def trusting(authority: Authority, own: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.file))
    if own is not None:
        context.load_cert_chain(*own)
    return context


async def test_https_with_certificates_of_clients_and_new_ones_at_a_reload(
        port: int, authority: Authority, app: FastAPI, tmp_path: Path) -> None:
    url, ours = f"https://localhost:{port}", authority.issue("client")
    async with httpx.AsyncClient(base_url=url, verify=trusting(authority, ours), timeout=60) as client:
        assert (await client.post("/v1/chat/completions", json=chat())).status_code == 200
        async with client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as answer:
            assert [line async for line in answer.aiter_lines() if line][-1] == "data: [DONE]"
    # Without a certificate, with one of somebody else, and without TLS, nobody is answered.
    stranger = Authority(tmp_path, "theirs")
    for own in (None, stranger.issue("other")):
        async with httpx.AsyncClient(base_url=url, verify=trusting(authority, own), timeout=60) as client:
            with pytest.raises(httpx.TransportError):
                await client.get("/health")
    async with httpx.AsyncClient(timeout=60) as client:
        with pytest.raises(httpx.TransportError):
            await client.get(f"http://localhost:{port}/health")

    async def presented() -> int:
        _, writer = await asyncio.open_connection("localhost", port, ssl=trusting(authority, ours))
        found = x509.load_der_x509_certificate(writer.get_extra_info("ssl_object").getpeercert(True)).serial_number
        writer.close()
        # Whatever the other end says to that: a transport left to the collector is a warning in another test.
        with suppress(OSError):
            await writer.wait_closed()
        return found

    before = await presented()
    authority.issue("server", b"sesame")
    assert await presented() == before
    async with httpx.AsyncClient(base_url=url, verify=trusting(authority, ours), timeout=60) as client:
        assert (await client.post("/v1/admin/settings/reload")).json()["certificates"] is True
        renewed = await presented()
        assert renewed != before
        # A key that does not belong to the certificate is refused, and the pair before it stays.
        (tmp_path / "server.crt").write_bytes((tmp_path / "client.crt").read_bytes())
        refused = await client.post("/v1/admin/settings/reload")
        assert (refused.status_code, refused.json()["error"]["param"]) == (409, "tls_certificate")
        assert await presented() == renewed


async def test_a_connection_of_tls_that_has_ended_is_looked_at_without_harm(port: int, authority: Authority,
                                                                            server: Server) -> None:
    """The server looks at all of them every second, and one that is just ending has no socket any more."""
    _, writer = await asyncio.open_connection("localhost", port, ssl=trusting(authority, authority.issue("client")))
    async with asyncio.timeout(60):
        while not server.server_state.connections:
            await asyncio.sleep(0.005)
    [connection] = server.server_state.connections
    assert isinstance(connection, Connection)
    writer.transport.abort()
    async with asyncio.timeout(60):
        # As it ends its transport first loses its socket, then all that it could be asked.
        for _ in range(1000):
            connection.check(asyncio.get_running_loop().time())
            if connection not in server.server_state.connections:
                break
            await asyncio.sleep(0)
    with pytest.raises(AttributeError):
        connection.transport.get_extra_info("socket")
    connection.check(asyncio.get_running_loop().time())


def test_files_that_do_not_fit_are_named_before_the_model_loads(authority: Authority, settings: Settings,
                                                                tmp_path: Path) -> None:
    check_certificates(settings)
    wrong = {"tls_key": authority.file, "tls_certificate": tmp_path / "gone", "tls_client_ca": tmp_path / "gone",
             "tls_key_password": None}
    for name, value in wrong.items():
        with pytest.raises(InvalidSettings) as caught:
            check_certificates(settings.model_copy(update={name: value}))
        assert caught.value.param == ("tls_client_ca" if name == "tls_client_ca" else "tls_certificate")
    with pytest.raises(InvalidSettings, match="plain HTTP"):
        load_settings(tls_key=tmp_path / "server.key")
    assert base_url("::1", 1, secure=True) == "https://[::1]:1"
