"""`/v1/receipts`: the newest ones, and what was applied to an answer whose client keeps nothing of it but its id."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel

from server.api.route import StrictRoute
from server.requests.kept_receipts import ReceiptSummary
from server.requests.receipt import Receipt
from server.requests.state import State
from server.threads import in_thread
from steering.language.errors import NotFound
from steering.language.fields import ArtifactRef

router = APIRouter(tags=["completions"], route_class=StrictRoute)
AnyId = Annotated[str, Path(max_length=128, description="X-Trimtab-Request of the response, or the id of the answer.")]


class ReceiptList(BaseModel):
    data: list[ReceiptSummary]


@router.get("/v1/receipts")
async def list_receipts(
    state: State, limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    artifact: Annotated[ArtifactRef | None, Query(description="Only of answers that this acted on.")] = None,
) -> ReceiptList:
    """Receipts that are kept, newest first; without texts, as receipts have none."""
    return ReceiptList(data=await in_thread(state.receipts.newest, limit, artifact))


@router.get("/v1/receipts/{request_id}", response_model=Receipt)
async def show_receipt(request_id: AnyId, state: State) -> Response:
    """The receipt of a finished request, for as long as it is kept (`receipts_kept_s`, `receipts_kept_bytes`)."""
    content = state.receipts.find(request_id)
    if content is None:
        raise NotFound("there is no receipt of this id here", param="request_id", fix="Ask soon after the end of the "
                       "answer, with its id or with X-Trimtab-Request; a restart forgets receipts.")
    return Response(content, media_type="application/json")
