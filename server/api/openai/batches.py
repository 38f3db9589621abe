"""`/v1/batches`: the requests of a file, answered behind what else is asked, as OpenAI has them."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query
from openai.types import Batch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from server.api.openai.files import page_of
from server.api.route import StrictRoute
from server.identity.principal import CURRENT
from server.identity.recording import recorded
from server.requests.fields import Lenient, only
from server.requests.state import State
from server.threads import in_thread

router = APIRouter(prefix="/v1/batches", tags=["batches"], route_class=StrictRoute)
BatchId = Annotated[str, Path(max_length=64)]
Key = Annotated[str, StringConstraints(max_length=64)]
Value = Annotated[str, StringConstraints(max_length=512)]


class NewBatch(Lenient):
    input_file_id: Annotated[str, StringConstraints(max_length=64)] = Field(description="Of an uploaded file.")
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]
    completion_window: Annotated[Literal["24h"], only("24h")] = "24h"
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None


class BatchList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Batch]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class BatchQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=20, ge=1, le=100)
    after: str | None = Field(default=None, max_length=64, description="The last id of the page before.")


@router.post("")
async def create_batch(body: NewBatch, state: State) -> Batch:
    """Check a file of requests, and answer them when it is their turn. One whose file is wrong has failed at once."""
    async with recorded(state.library.audit, "batch.create", body.input_file_id, after={"endpoint": body.endpoint}):
        return await state.batches.create(body.input_file_id, body.endpoint, body.metadata, CURRENT.get())


@router.get("")
async def list_batches(query: Annotated[BatchQuery, Query()], state: State) -> BatchList:
    """Newest first."""
    page, more = page_of(await in_thread(state.batches.all), query.after, query.limit)
    return BatchList(data=page, has_more=more, first_id=page[0].id if page else None,
                     last_id=page[-1].id if page else None)


@router.get("/{batch_id}")
async def show_batch(batch_id: BatchId, state: State) -> Batch:
    return await in_thread(state.batches.find, batch_id)


@router.post("/{batch_id}/cancel")
async def cancel_batch(batch_id: BatchId, state: State) -> Batch:
    """End a batch. What was answered until then is kept, in files of results."""
    found = await in_thread(state.batches.find, batch_id)
    async with recorded(state.library.audit, "batch.cancel", batch_id, before={"status": found.status},
                        needed=False):
        return await state.batches.cancel(batch_id)
