"""`/v1/files`: requests of batches that are uploaded, and their results, as OpenAI has them."""

from typing import Annotated, Literal, TypeVar

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import FileResponse
from openai.types import Batch, FileDeleted, FileObject
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile

from server.api.route import StrictRoute
from server.errors import UnsupportedMediaType, UnsupportedParameter
from server.identity.recording import recorded
from server.requests.state import State
from server.threads import in_thread
from steering.language.errors import Conflict, InvalidRequest

router = APIRouter(prefix="/v1/files", tags=["batches"], route_class=StrictRoute)
FileId = Annotated[str, Path(max_length=64)]
T = TypeVar("T", FileObject, Batch)
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class FileQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    purpose: str | None = Field(default=None, max_length=64)
    limit: int = Field(default=1000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"
    after: str | None = Field(default=None, max_length=64, description="The last id of the page before.")


@router.post("", openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
    "type": "object", "required": ["file", "purpose"], "properties": {
        "file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": ["batch"]},
        ANCHOR: {"type": "string", "enum": ["created_at"]},
        SECONDS: {"type": "integer", "minimum": 1, "description": "After which it is removed."}}}}}}})
async def upload_file(request: Request, state: State) -> FileObject:
    """Take in the requests of a batch."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise UnsupportedMediaType(f"the body is {kind[:80] or 'of no stated type'}", param="Content-Type",
                                   fix="Send multipart/form-data with the parts file and purpose.")
    # Not a byte is read before its turn: what waits lies in the client's memory.
    async with state.pools.uploads, request.form(max_files=1, max_fields=3) as form:
        unknown = sorted(set(form) - {"file", "purpose", ANCHOR, SECONDS})
        if unknown:
            raise InvalidRequest(f"unknown form field {unknown[0][:80]!r}", param=unknown[0][:80])
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise InvalidRequest("the form has no file", param="file")
        if purpose != "batch":
            raise UnsupportedParameter("files are kept for batches only", param="purpose", fix='Send "batch".')
        seconds = _seconds(form.get(ANCHOR), form.get(SECONDS))
        name, data = file.filename or "requests.jsonl", await file.read()
        async with recorded(state.library.audit, "file.create", name, after={"bytes": len(data)}):
            return await in_thread(state.files.upload, name, data, seconds)


@router.get("")
async def list_files(query: Annotated[FileQuery, Query()], state: State) -> FileList:
    """Newest first."""
    found = [file for file in await in_thread(state.files.all) if query.purpose in (None, file.purpose)]
    page, more = page_of(found[::-1] if query.order == "asc" else found, query.after, query.limit)
    return FileList(data=page, has_more=more, first_id=page[0].id if page else None,
                    last_id=page[-1].id if page else None)


@router.get("/{file_id}")
async def show_file(file_id: FileId, state: State) -> FileObject:
    return await in_thread(state.files.find, file_id)


@router.get("/{file_id}/content", response_class=FileResponse,
            responses={200: {"content": {"application/jsonl": {}}, "description": "The file."}})
async def file_content(file_id: FileId, state: State) -> FileResponse:
    return FileResponse(await in_thread(state.files.content, file_id), media_type="application/jsonl")


@router.delete("/{file_id}")
async def delete_file(file_id: FileId, state: State) -> FileDeleted:
    """Remove a file that no batch reads any more."""
    if await in_thread(state.batches.uses, file_id):
        raise Conflict("a batch reads the file", param="file_id", fix="Cancel the batch, or wait for its end.")
    found = await in_thread(state.files.find, file_id)
    async with recorded(state.library.audit, "file.delete", file_id, before={"filename": found.filename,
                                                                            "bytes": found.bytes}):
        await in_thread(state.files.delete, file_id)
    return FileDeleted(id=file_id, deleted=True, object="file")


def page_of(found: list[T], after: str | None, limit: int) -> tuple[list[T], bool]:
    """What follows on `after`, and whether there is more than `limit`. Raises InvalidRequest: it is not there."""
    start = 0
    if after is not None:
        start = next((n + 1 for n, one in enumerate(found) if one.id == after), -1)
        if start < 0:
            raise InvalidRequest(f"there is no {after[:64]!r} in the list", param="after")
    return found[start:start + limit], len(found) > start + limit


def _seconds(anchor: object, seconds: object) -> float | None:
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest("a time counts from created_at only", param=ANCHOR)
    if not isinstance(seconds, str) or not (seconds.isascii() and seconds.isdigit() and int(seconds[:12]) > 0):
        raise InvalidRequest("it is no number of seconds", param=SECONDS)
    return float(seconds[:12])
