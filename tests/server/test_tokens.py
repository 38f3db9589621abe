"""Tokens of an OpenID provider: whose they are, and everything that makes one refused. A provider of its own runs."""

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from pydantic import SecretStr

from server.app import create_app, tokens_of
from server.errors import InvalidSettings
from server.identity import tokens as module
from server.observability.instruments import Registry
from server.settings import Settings, load_settings
from server.text.vocabulary import Vocabulary
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from tests.server.test_keys import OWNER, bearer, code, make
from tests.server.test_steering import store
from tests.sqlite import library_url
from vectors.library import Library

AUDIENCE = "trimtab"


@cache
def rsa_key(name: str) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@cache
def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def public(key: Any, kid: str, **more: Any) -> dict[str, Any]:
    kind = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    return {**kind.to_jwk(key.public_key(), as_dict=True), "kid": kid, **more}


class Provider:
    """What it says may be changed; `fetched` counts how often it was asked for its keys."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = [public(rsa_key("a"), "a", alg="RS256", use="sig"), public(ec_key(), "e")]
        self.fetched, self.down = 0, False
        self.open = threading.Event()
        self.open.set()
        self.padding = ""
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # noqa: N802 - named by the library
                provider.open.wait(60)
                if provider.down:
                    self.send_error(503)
                    return
                if self.path == module.DISCOVERY:
                    told: Any = {"issuer": provider.issuer, "jwks_uri": f"{provider.issuer}/keys"}
                else:
                    provider.fetched += 1
                    told = {"keys": provider.keys, "padding": provider.padding}
                content = json.dumps(told).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.issuer = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.open.set()
        self._server.shutdown()
        self._server.server_close()

    def token(self, key: Any = None, kid: str | None = "a", algorithm: str = "RS256", **claims: Any) -> str:
        now = int(time.time())
        told = {"iss": self.issuer, "aud": AUDIENCE, "sub": "ada", "iat": now, "exp": now + 600, "tenant": "team",
                "roles": ["infer", "library_read", "astronaut"]} | claims
        return jwt.encode({name: value for name, value in told.items() if value is not None},
                          rsa_key("a") if key is None else key, algorithm=algorithm,
                          headers={} if kid is None else {"kid": kid})


@pytest.fixture
def provider() -> Iterator[Provider]:
    found = Provider()
    yield found
    found.close()


@asynccontextmanager
async def serving(provider: Provider, folder: Path, vocabulary: Vocabulary, **given: Any
                  ) -> AsyncIterator[httpx.AsyncClient]:
    settings = Settings(served_model_name=MODEL, data_dir=folder / "data", api_key=SecretStr("owner-s-key"),
                        oidc_issuer=provider.issuer, oidc_audience=AUDIENCE, **given)
    library = Library.open(library_url(folder), str(folder / "blobs"))
    app = create_app(settings, ScriptedEngine(vocabulary), library, vocabulary)
    async with app.router.lifespan_context(app), httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app, raise_app_exceptions=False), base_url="http://localhost",
            timeout=60) as client:
        yield client


@pytest.fixture
async def client(provider: Provider, tmp_path: Path, vocabulary: Vocabulary) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(provider, tmp_path, vocabulary) as found:
        yield found


def bears(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def test_a_token_has_the_tenant_and_the_roles_of_its_claims(client: httpx.AsyncClient, provider: Provider
                                                                  ) -> None:
    for token in (provider.token(), provider.token(ec_key(), "e", "ES256"),
                  provider.token(roles="infer library_read other"), provider.token(aud=["x", AUDIENCE])):
        told = (await client.get("/v1/key", headers=bears(token))).json()
        assert (told["name"], told["tenant"], told["roles"]) == ("ada", "team", ["infer", "library_read"])
        assert (await client.post("/v1/chat/completions", headers=bears(token), json=chat())).status_code == 200
        assert code(await client.get("/v1/jobs", headers=bears(token))) == (403, "not_permitted")
    none = await client.get("/v1/key", headers=bears(provider.token(roles=None)))
    assert none.json()["roles"] == []
    # Keys go on to count beside tokens.
    assert (await client.get("/v1/models", headers=OWNER)).status_code == 200
    made = await make(client, "infer")
    assert (await client.get("/v1/models", headers=bearer(made))).status_code == 200


async def test_provider_and_claims_are_read_again(provider: Provider, tmp_path: Path, vocabulary: Vocabulary) -> None:
    other = Provider()
    given: dict[str, Any] = {"oidc_issuer": provider.issuer, "oidc_audience": AUDIENCE, "oidc_roles": {"ml": ["infer"]}}

    def read() -> Settings:
        return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", api_key=SecretStr("owner-s-key"), **given)

    library = Library.open(library_url(tmp_path), str(tmp_path / "blobs"))
    app = create_app(read(), ScriptedEngine(vocabulary), library, vocabulary, again=read)
    try:
        async with app.router.lifespan_context(app), httpx.AsyncClient(
                transport=httpx.ASGITransport(app=app), base_url="http://localhost", timeout=60) as client:
            async def roles(of: Provider) -> Any:
                return (await client.get("/v1/key", headers=bears(of.token(roles="ml")))).json().get("roles")

            async def reloaded(**changes: Any) -> Any:
                given.update(changes)
                return (await client.post("/v1/admin/settings/reload", headers=OWNER)).json()

            assert await roles(provider) == ["infer"]
            assert (await reloaded(oidc_roles={"ml": ["metrics"]}))["changed"] == {"oidc_roles": {"ml": ["metrics"]}}
            assert await roles(provider) == ["metrics"]
            refused = await reloaded(oidc_roles={"ml": ["astronaut"]}, oidc_issuer=other.issuer)
            assert (refused["error"]["code"], refused["error"]["param"]) == ("settings_refused", "oidc_roles")
            assert await roles(provider) == ["metrics"] and await roles(other) is None
            assert set((await reloaded(oidc_roles={}))["changed"]) == {"oidc_roles", "oidc_issuer"}
            assert await roles(other) == [] and await roles(provider) is None
            told = await reloaded(oidc_issuer=None, oidc_audience=None)
            assert told["changed"] == {} and set(told["needs_restart"]) == {"oidc_issuer", "oidc_audience"}
            assert await roles(other) == []
    finally:
        other.close()


def confused(provider: Provider, secret: bytes, algorithm: str = "HS256", kid: str = "a") -> str:
    """A token that is signed with what everybody may know, as if it were a secret."""
    def part(value: Any) -> bytes:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")

    claims = json.loads(base64.urlsafe_b64decode(provider.token().split(".")[1] + "=="))
    content = part({"alg": algorithm, "typ": "JWT", "kid": kid}) + b"." + part(claims)
    signature = b"" if algorithm == "none" else hmac.new(secret, content, hashlib.sha256).digest()
    return (content + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


async def test_what_is_refused(client: httpx.AsyncClient, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    # The keys are fetched again for each token that names an unknown one, so what is in the set is looked at.
    monkeypatch.setattr(module, "SOONEST_S", 0.0)
    pem = rsa_key("a").public_key().public_bytes(serialization.Encoding.PEM,
                                                 serialization.PublicFormat.SubjectPublicKeyInfo)
    now = int(time.time())
    secret = b"an old secret that somebody left in the set of keys"
    provider.keys.append({"kty": "oct", "kid": "o", "alg": "HS256", "k": base64.urlsafe_b64encode(secret).decode()})
    provider.keys.append(public(rsa_key("b"), "sealing", use="enc"))
    wrong = {
        "expired": provider.token(exp=now - 120, iat=now - 600), "not yet": provider.token(nbf=now + 600),
        "another audience": provider.token(aud="other"), "no audience": provider.token(aud=None),
        "another issuer": provider.token(iss="https://elsewhere.example"), "no issuer": provider.token(iss=None),
        "no end": provider.token(exp=None), "no subject": provider.token(sub=None),
        "unknown key": provider.token(rsa_key("b"), "b"), "no key": provider.token(kid=None),
        "signed by another": provider.token(rsa_key("b"), "a"),
        "another algorithm of the same key": provider.token(algorithm="PS256"),
        "no signature": confused(provider, b"", "none"), "NONE": confused(provider, b"", "None"),
        "public key as a secret": confused(provider, pem),
        "shared secret in the set": confused(provider, secret, kid="o"),
        "a key that is not for signatures": provider.token(rsa_key("b"), "sealing"),
        "no tenant": provider.token(tenant=None), "tenant of no form": provider.token(tenant="a/b"),
        "tenant that is for all": provider.token(tenant="shared"), "tenant as a number": provider.token(tenant=1),
        "too long": provider.token(more="x" * 8000), "cut": provider.token()[:-5], "no token": "ey.a.b",
        "changed": provider.token()[:40] + ("A" if provider.token()[40] != "A" else "B") + provider.token()[41:]}
    for what, token in wrong.items():
        answer = await client.get("/v1/models", headers=bears(token))
        assert answer.status_code == 401 and code(answer) == (401, "invalid_api_key"), (what, answer.text)
    # The control: the set was fetched with these keys in it. And what it says where that helps.
    assert provider.fetched > 1
    assert (await client.get("/v1/models", headers=bears(provider.token()))).status_code == 200
    for what, told in (("expired", "it has expired"), ("another audience", "it is for another audience"),
                       ("unknown key", "its key is not known"), ("no tenant", "its claim tenant names no tenant")):
        assert told in (await client.get("/v1/models", headers=bears(wrong[what]))).text


async def test_a_token_is_refused_once_its_time_is_over(client: httpx.AsyncClient, provider: Provider,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was checked before."""
    monkeypatch.setattr(module, "LEEWAY_S", 0.0)
    token = provider.token(exp=int(time.time()) + 2)
    assert (await client.get("/v1/models", headers=bears(token))).status_code == 200
    async with asyncio.timeout(60):
        while (await client.get("/v1/models", headers=bears(token))).status_code == 200:
            await asyncio.sleep(0.05)
    assert time.time() >= json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))["exp"]


async def test_keys_are_rotated(provider: Provider, tmp_path: Path, vocabulary: Vocabulary,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SOONEST_S", 0.0)
    async with serving(provider, tmp_path, vocabulary) as client:
        old, new = provider.token(), provider.token(rsa_key("b"), "b")
        assert (await client.get("/v1/models", headers=bears(old))).status_code == 200
        assert provider.fetched == 1
        provider.keys = [public(rsa_key("b"), "b")]
        # The new key is fetched for the token that names it, and what the old one has signed counts no more.
        assert (await client.get("/v1/models", headers=bears(new))).status_code == 200
        assert provider.fetched == 2
        assert code(await client.get("/v1/models", headers=bears(old))) == (401, "invalid_api_key")


async def test_tokens_with_unknown_keys_do_not_make_this_server_ask_without_end(
        client: httpx.AsyncClient, provider: Provider) -> None:
    answers = await asyncio.gather(*(client.get("/v1/models", headers=bears(provider.token(kid=f"k{n}")))
                                     for n in range(30)))
    assert {one.status_code for one in answers} == {401}
    # Once at the start; the next one is not before some seconds have passed.
    assert provider.fetched <= 2


async def test_known_keys_go_on_to_count_while_the_provider_is_away(
        provider: Provider, tmp_path: Path, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SOONEST_S", 0.0)
    provider.down = True
    async with serving(provider, tmp_path, vocabulary) as client:
        # It starts without them.
        assert code(await client.get("/v1/models", headers=bears(provider.token()))) == (401, "invalid_api_key")
        provider.down = False
        assert (await client.get("/v1/models", headers=bears(provider.token()))).status_code == 200
        provider.down = True
        assert code(await client.get("/v1/models", headers=bears(provider.token(rsa_key("b"), "b")))) == (
            401, "invalid_api_key")
        assert (await client.get("/v1/models", headers=bears(provider.token(sub="eve")))).status_code == 200
        assert "trimtab_oidc_fetch_failures_total 3.0" in (await client.get("/metrics", headers=OWNER)).text
        # What is too long to be a set of keys is not taken for one.
        provider.down, provider.padding, provider.keys = False, "x" * module.MOST_BYTES, []
        assert code(await client.get("/v1/models", headers=bears(provider.token(kid="c")))) == (401, "invalid_api_key")
        assert (await client.get("/v1/models", headers=bears(provider.token()))).status_code == 200


async def test_others_are_answered_while_keys_are_fetched(
        provider: Provider, tmp_path: Path, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SOONEST_S", 0.0)
    async with serving(provider, tmp_path, vocabulary) as client:
        provider.open.clear()
        waiting = asyncio.create_task(client.get("/v1/models", headers=bears(provider.token(rsa_key("b"), "b"))))
        for headers in (OWNER, bears(provider.token())):
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
        assert not waiting.done()
        provider.keys.append(public(rsa_key("b"), "b"))
        provider.open.set()
        assert (await waiting).status_code == 200


async def test_a_provider_that_hangs_holds_nobody_for_long(
        provider: Provider, tmp_path: Path, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.2)
    provider.open.clear()
    async with asyncio.timeout(60), serving(provider, tmp_path, vocabulary) as client:
        assert code(await client.get("/v1/models", headers=bears(provider.token()))) == (401, "invalid_api_key")


async def test_policies_quotas_and_names_are_those_of_the_tenant(client: httpx.AsyncClient, provider: Provider) -> None:
    await client.put("/v1/admin/policies/team", headers=OWNER, json={
        "artifacts": ["team/*"], "quota": {"requests_per_minute": 1000}})
    token = bears(provider.token(roles=["infer", "library_write", "library_read"]))
    body = {"metadata": {"name": "team/calm", "kind": "vector", "op": "add", "site": "resid_post"},
            "tensors": {"2": {"vector": [1.0] * 8}}}
    assert (await client.post("/v1/artifacts", headers=token, json=body)).status_code == 201
    answer = await client.post("/v1/chat/completions", headers=token, json=chat(steering={"artifact": "team/calm"}))
    assert answer.status_code == 200 and answer.headers["x-ratelimit-remaining-requests"] == "999"
    assert code(await client.post("/v1/chat/completions", headers=token, json=chat(steering={"artifact": "calm"}))) == (
        403, "policy_violation")
    other = bears(provider.token(tenant="other", roles=["library_read"]))
    assert (await client.get("/v1/artifacts/team/calm", headers=other)).status_code == 404
    audit = (await client.get("/v1/audit?action=artifact.create", headers=OWNER)).json()["data"]
    assert [(one["key_name"], one["tenant"]) for one in audit] == [("ada", "team")]


async def test_claims_may_be_named_and_mean_other_words(provider: Provider, tmp_path: Path, vocabulary: Vocabulary
                                                        ) -> None:
    async with serving(provider, tmp_path, vocabulary, oidc_roles_claim="realm_access.roles", oidc_tenant="guests",
                       oidc_tenant_claim="https://example.com/org", oidc_jwks_url=f"{provider.issuer}/keys",
                       oidc_roles={"ml-users": ("infer", "metrics"), "admin": ()}) as client:
        for claims, tenant in (({}, "guests"), ({"https://example.com/org": "acme"}, "acme")):
            token = provider.token(realm_access={"roles": ["ml-users", "admin", "operate", 1]}, **claims)
            told = (await client.get("/v1/key", headers=bears(token))).json()
            assert (told["tenant"], told["roles"]) == (tenant, ["infer", "metrics"])


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    for wrong in ({"oidc_issuer": "https://a.example"}, {"oidc_audience": "x"}):
        with pytest.raises(InvalidSettings):
            load_settings(data_dir=tmp_path, **wrong)
    for wrong in ({"oidc_issuer": "http://a.example"}, {"oidc_issuer": "a"},
                  {"oidc_issuer": "https://a.example", "oidc_jwks_url": "http://a.example/keys"},
                  {"oidc_issuer": "https://a.example", "oidc_jwks_url": "file:///keys"},
                  {"oidc_issuer": "https://a.example", "oidc_roles": {"x": ("astronaut",)}}):
        with pytest.raises(InvalidSettings):
            tokens_of(load_settings(data_dir=tmp_path, oidc_audience="x", **wrong), Registry())
    assert tokens_of(load_settings(data_dir=tmp_path), Registry()) is None


async def test_a_server_with_a_provider_and_no_key_asks_for_tokens(
        provider: Provider, tmp_path: Path, vocabulary: Vocabulary, library: Library) -> None:
    store(library, "calm")
    settings = Settings(served_model_name=MODEL, data_dir=tmp_path / "d", oidc_issuer=provider.issuer,
                        oidc_audience=AUDIENCE)
    app = create_app(settings, ScriptedEngine(vocabulary), library, vocabulary)
    async with app.router.lifespan_context(app), httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
        assert (await client.get("/v1/models")).status_code == 401
        admin = bears(provider.token(roles=["admin"]))
        assert (await client.get("/v1/artifacts", headers=admin)).status_code == 200
        assert (await client.get("/v1/admin/keys", headers=admin)).status_code == 200
