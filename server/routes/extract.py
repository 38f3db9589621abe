"""`POST /v1/extract`: make a vector from contrastive pairs, as a job."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from fastapi import APIRouter
from pydantic import ConfigDict, Field

from server.engines.base import CaptureRequest, Engine
from server.extraction import extract_and_store
from server.jobs import Control, Job
from server.openai.schema import Message
from server.route import StrictRoute
from server.state import ServerState, State
from server.threads import in_thread
from steering.language.errors import InvalidRequest
from steering.language.fields import Model
from steering.language.vocabulary import Site
from vectors.extract import ExtractOptions, ExtractRequest, Pair, check_options, run
from vectors.extract.contract import Split
from vectors.extract.spelling import spelling_report

router = APIRouter(tags=["extract"], route_class=StrictRoute)

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Conversation = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class TextPair(Model):
    """Two texts that differ in the concept: plain text, a conversation, or token ids."""

    positive: str | Conversation | TokenIds = Field(description="The text that has the concept.")
    negative: str | Conversation | TokenIds = Field(description="The text that lacks it.")
    item: Annotated[str, Field(max_length=256)] | None = Field(
        default=None, description="What the pair is about; pairs of one item stay in one split.")
    split: Split | None = Field(default=None, description="Fixed split; for all pairs or for none.")


class ExtractBody(ExtractOptions):
    model_config = ConfigDict(extra="forbid", frozen=True)

    pairs: Annotated[list[TextPair], Field(min_length=2, max_length=20_000)]


@router.post("/v1/extract", status_code=202)
async def create_extraction(body: ExtractBody, state: State) -> Job:
    """Start the job. Its result names the artifact it stored and holds the report."""
    return await start_extraction(body, state)


async def start_extraction(body: ExtractBody, state: ServerState) -> Job:
    """A contrastive extraction as a job.

    Raises:
        InvalidRequest: options or texts that do not fit.
    """
    options = ExtractOptions(**{name: getattr(body, name) for name in ExtractOptions.model_fields})
    check_options(options)
    pairs = await in_thread(_pairs, body, state)
    request = ExtractRequest(options=options, pairs=pairs, facts=state.engine.facts, created_by="POST /v1/extract",
                             spelling=_spelling(body, pairs, state))
    return state.jobs.submit("extract", lambda control: _work(request, control, state))


async def _work(request: ExtractRequest, control: Control, state: ServerState) -> dict[str, Any]:
    capture = _Capture(state.engine, asyncio.get_running_loop())
    return await extract_and_store(state, control,
                                   lambda: run(request, capture, control.progress, control.cancelled))


@dataclass(frozen=True)
class _Capture:
    """Reads activations from the engine for an extraction that runs in a thread."""

    engine: Engine
    loop: asyncio.AbstractEventLoop

    def __call__(self, texts: Sequence[Sequence[int]], site: Site, layers: Sequence[int],
                 positions: Sequence[int] | None) -> list[Mapping[int, torch.Tensor]]:
        requests = [CaptureRequest(text, {site: layers}, positions) for text in texts]
        captured = asyncio.run_coroutine_threadsafe(self.engine.capture(requests), self.loop).result()
        return [item[site] for item in captured]


def _pairs(body: ExtractBody, state: ServerState) -> list[Pair]:
    return [Pair(positive=_ids(pair.positive, state, f"pairs[{i}].positive"),
                 negative=_ids(pair.negative, state, f"pairs[{i}].negative"), item=pair.item, split=pair.split)
            for i, pair in enumerate(body.pairs)]


def _spelling(body: ExtractBody, pairs: Sequence[Pair], state: ServerState) -> dict[str, Any]:
    """Of the plain texts."""
    num_bytes = num_tokens = 0
    for given, pair in zip(body.pairs, pairs, strict=True):
        for text, ids in ((given.positive, pair.positive), (given.negative, pair.negative)):
            if isinstance(text, str):
                num_bytes, num_tokens = num_bytes + len(text.encode()), num_tokens + len(ids)
    return spelling_report(num_bytes, num_tokens, state.engine.facts.model_id)


def _ids(text: str | list[Message] | list[int], state: ServerState, param: str) -> tuple[int, ...]:
    if isinstance(text, str):
        return tuple(state.vocabulary.encode(text, special_tokens=True))
    if isinstance(text[0], Message):
        turns = [turn.as_template() for turn in text if isinstance(turn, Message)]
        return tuple(state.chat_prompts.conversation(turns, param))
    ids = tuple(token for token in text if isinstance(token, int))
    if max(ids) >= state.vocabulary.vocab_size:
        raise InvalidRequest(f"there is no token {max(ids)}", param=param)
    return ids
