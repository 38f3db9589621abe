"""Not run: `make types` checks that both clients have the types they promise, from one description of each method."""

from collections.abc import AsyncIterator, Iterator
from typing import assert_type

from trimtab_client import Artifact, AsyncClient, Client, Completion, Delta, Extracted, Method, Page


def blocking(client: Client) -> None:
    assert_type(client.chat("Hello", steering="cheerful", max_tokens=5), Completion)
    assert_type(client.stream_chat("Hello"), Iterator[Delta])
    assert_type(client.list_artifacts(), Page[Artifact])
    assert_type(client.extract([], name="a"), Extracted)
    assert_type(client.extraction_methods(), list[Method])
    client.get_artifact(3)  # type: ignore[arg-type]


async def awaited(client: AsyncClient) -> None:
    assert_type(await client.chat("Hello", steering="cheerful", max_tokens=5), Completion)
    assert_type(client.stream_chat("Hello"), AsyncIterator[Delta])
    assert_type(await client.list_artifacts(), Page[Artifact])
    assert_type(await client.extract([], name="a"), Extracted)
    await client.get_artifact(3)  # type: ignore[arg-type]
