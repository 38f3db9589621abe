"""The whole server on the bundled model: real engine, real library, real HTTP, the unmodified openai client."""

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
import torch
from openai import AsyncOpenAI
from playwright.sync_api import Browser, Page

from scripts.browser import chromium
from scripts.running import running_server
from tests.e2e.browser import built, page_of

torch.set_num_threads(1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server_url() -> AsyncIterator[str]:
    """A running server on a free port, with few slots so that specs must wait for one another."""
    async with running_server("lab-dense", slots=16, slot_wait_s=300, max_batch_tokens=256,
                              kv_cache_tokens=8192) as url:
        yield url


@pytest_asyncio.fixture(loop_scope="module")
async def client(server_url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server_url}/v1", api_key="unused", timeout=600, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert built(), "make console builds the page that these tests open"
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser: Browser, lab_url: str) -> Iterator[Page]:
    with page_of(browser, lab_url) as opened:
        yield opened
