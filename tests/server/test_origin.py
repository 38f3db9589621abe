"""A server without a key answers under its own names only, and no page of another site; with a key it is the key."""

import httpx
import pytest
from pydantic import SecretStr

from server.settings import Settings
from vectors.library import Library

FORM = {"file": ("x.safetensors", b"x")}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"allowed_hosts": ("Box.lan",)})


@pytest.mark.parametrize(("host", "status"), [
    ("localhost", 200), ("localhost:8000", 200), ("127.0.0.1:8000", 200), ("127.8.1.2", 200), ("[::1]:8000", 200),
    ("LOCALHOST", 200), ("app.localhost", 200), ("box.lan:80", 200),
    ("evil.example", 403), ("evil.example:8000", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil.example", 403),
    ("localhost@evil.example", 403), ("evil.example@localhost", 403), ("", 403), ("[::2]", 403), ("[::1", 403),
    ("localhost:port", 403), ("localhost/x", 403), ("10.0.0.1", 403)])
async def test_host(client: httpx.AsyncClient, host: str, status: int) -> None:
    for path in ("/v1/models", "/health", "/docs"):
        answer = await client.get(path, headers={"Host": host})
        assert (answer.status_code, status == 200 or answer.json()["error"]["code"]) == (
            status, status == 200 or "forbidden_host")


@pytest.mark.parametrize(("headers", "refused"), [
    ({"Origin": "https://evil.example"}, True), ({"Origin": "null"}, True), ({"Origin": ""}, True),
    ({"Origin": "http://localhost.evil.example"}, True), ({"Sec-Fetch-Site": "cross-site"}, True),
    ({"Origin": "http://localhost:3000"}, False), ({"Origin": "http://box.lan"}, False),
    ({"Sec-Fetch-Site": "same-origin"}, False), ({}, False)])
async def test_what_changes_something(client: httpx.AsyncClient, library: Library, headers: dict[str, str],
                                      refused: bool) -> None:
    upload = await client.post("/v1/artifacts/import", files=FORM, headers=headers)
    switch = await client.put("/v1/admin/kill-switch", json={"on": True}, headers=headers)
    if refused:
        for answer in (upload, switch):
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden_origin")
    assert (upload.status_code, switch.status_code) == ((403, 403) if refused else (400, 200))
    assert library.switches.kill_switch() is not refused


async def test_a_link_from_elsewhere_may_lead_here(client: httpx.AsyncClient) -> None:
    answer = await client.get("/docs", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"})
    assert answer.status_code == 200


class TestWithKey:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"api_key": SecretStr("k")})

    async def test_names_do_not_matter(self, client: httpx.AsyncClient) -> None:
        headers = {"Host": "proxy.example", "Origin": "https://app.example", "Authorization": "Bearer k"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        assert (await client.get("/v1/models", headers=headers | {"Authorization": "x"})).status_code == 401

    async def test_the_pages_take_it_as_a_password_too(self, client: httpx.AsyncClient) -> None:
        for path, status in (("/docs", 200), ("/openapi.json", 200), ("/v1/models", 401)):
            assert (await client.get(path, auth=("anyone", "k"))).status_code == status
            assert (await client.get(path, auth=("k", "other"))).status_code == 401
