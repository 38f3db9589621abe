"""`/v1/history`: what was counted, in buckets; `/v1/live`: the same as it happens; `/v1/alerts`: what stands out."""

import time
from collections.abc import AsyncGenerator, Callable
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from server.api.openai.streaming import stream
from server.api.route import StrictRoute
from server.history.alerts import LONGEST_MIN, Alert, alerts
from server.history.interval import Interval, Spread, buckets
from server.history.store import MINUTE_S
from server.requests.state import ServerState, State
from server.threads import in_thread
from steering.language.errors import InvalidRequest

router = APIRouter(tags=["history"], route_class=StrictRoute)
MOST_BUCKETS = 1500
# As many as a chart shows where no width is asked for.
SHOWN_BUCKETS = 240
HOUR_S = 3600


class Timing(BaseModel):
    """How long something took, in seconds; null where nothing of it happened."""

    count: int
    mean: float | None
    p50: float | None = Field(description="Median, as the bounds of the histogram let it be told.")
    p95: float | None

    @classmethod
    def of(cls, spread: Spread) -> Self:
        return cls(count=int(spread.count), mean=spread.mean, p50=spread.quantile(0.5), p95=spread.quantile(0.95))


class Counts(BaseModel):
    """What was counted in a stretch of time. Names that nothing was counted of are left out of maps."""

    requests: dict[str, int] = Field(description="Requests that ask the model for text, by status: 2xx, 4xx, 5xx.")
    prompt_tokens: int
    generated_tokens: int
    steered: int = Field(description="Requests with at least one intervention.")
    suppressed: int = Field(description="Requests whose steering the kill switch held back.")
    running: float = Field(description="Completions in the engine, on average.")
    waiting: float = Field(description="Completions that wait in the engine, on average.")
    queued: float = Field(description="Requests that wait in front of the engine, on average.")
    queued_most: int
    slots_used: float
    slots_total: float
    cache_used: float | None = Field(description="Share of the blocks of the cache in use; null where the engine does "
                                     "not tell.")
    request: Timing = Field(description="From a request to the end of its response.")
    queue: Timing = Field(description="What a completion waited for its place.")
    first_token: Timing = Field(description="From the start of a completion to its first token.")
    between_tokens: Timing = Field(description="Mean time between the tokens of a completion.")
    refusals: dict[str, int] = Field(description="Errors answered, by code.")
    dropped: dict[str, int] = Field(description="Completions that were to be measured and were not, by reason.")
    records_lost: int = Field(description="Measurements that could not be stored.")
    gates: dict[str, int] = Field(description="Decisions of gates for prompts: open, shut.")
    guard_checks: int
    guard_breaches: dict[str, int] = Field(description='What guards did, by what was over its limit: "kl lowered".')
    uses: dict[str, int] = Field(description="Interventions, by the name of their artifact.")
    drift: dict[str, float] = Field(description="What was measured of an artifact over what its card tells for the "
                                    "same strengths, by reference with version.")
    restarts: dict[str, int] = Field(description="Restarts of the engine, by what was wrong.")

    @classmethod
    def of(cls, seen: Interval) -> Self:
        def by(name: str) -> dict[str, int]:
            return {label: round(value) for label, value in sorted(seen.by(name).items())}

        blocks = seen.level("kv_blocks_total").mean
        return cls(
            requests=by("requests"), prompt_tokens=round(seen.total("prompt_tokens")),
            generated_tokens=round(seen.total("generated_tokens")), steered=round(seen.total("steered")),
            suppressed=round(seen.total("suppressed")), running=seen.level("running").mean,
            waiting=seen.level("waiting").mean, queued=seen.level("queued").mean,
            queued_most=round(seen.level("queued").most), slots_used=seen.level("slots_used").mean,
            slots_total=seen.level("slots_total").most,
            cache_used=seen.level("kv_blocks_used").mean / blocks if blocks else None,
            request=Timing.of(seen.spread("request")), queue=Timing.of(seen.spread("queue")),
            first_token=Timing.of(seen.spread("first_token")), between_tokens=Timing.of(seen.spread("between_tokens")),
            refusals=by("refusals"), dropped=by("dropped"), records_lost=round(seen.total("records_lost")),
            gates=by("gates"), guard_checks=round(seen.total("guard_checks")), guard_breaches=by("guard_breaches"),
            uses=by("uses"), restarts=by("restarts"),
            drift={name: seen.by("card_measured").get(name, 0.0) / told
                   for name, told in sorted(seen.by("card_expected").items()) if told > 0})


class Bucket(Counts):
    start: int = Field(description="Seconds since 1970.")


class HistoryView(BaseModel):
    since: int
    until: int
    bucket_s: int
    total: Counts = Field(description="Of all buckets.")
    data: list[Bucket] = Field(description="Oldest first; one that nothing is known of is left out.")


class Now(Counts):
    """What was counted since the event before."""

    at: float = Field(description="Seconds since 1970.")


class AlertView(BaseModel):
    name: str = Field(description="As in deploy/prometheus/alerts.yml.")
    severity: Literal["info", "warning", "critical"]
    state: Literal["pending", "firing"] = Field(description="pending: holds now, and not long enough yet to fire.")
    subject: str = Field(description="The artifact, preset, code or reason that it is about; may be empty.")
    value: float
    since: int = Field(description="Seconds since 1970.")
    summary: str
    action: str

    @classmethod
    def of(cls, alert: Alert) -> Self:
        return cls(name=alert.rule.name, severity=alert.rule.severity, state=alert.state, subject=alert.subject,
                   value=alert.value, since=alert.since, summary=alert.summary, action=alert.action)


class AlertList(BaseModel):
    data: list[AlertView]


@router.get("/v1/history")
async def show_history(
    state: State,
    since: Annotated[int | None, Query(ge=0, le=2**40, description="Seconds since 1970; by default an hour before "
                                       "`until`.")] = None,
    until: Annotated[int | None, Query(ge=0, le=2**40, description="Seconds since 1970; by default now.")] = None,
    bucket_s: Annotated[int | None, Query(ge=MINUTE_S, le=2**24, multiple_of=MINUTE_S, description=f"Seconds of a "
                        f"bucket, whole minutes; by default as many as make {SHOWN_BUCKETS} buckets at most. What is "
                        "older than two days is known by the hour.")] = None,
) -> HistoryView:
    """Traffic, latency, load and refusals of the past, from the server's own record."""
    end = int(time.time()) + 1 if until is None else until
    begin = end - HOUR_S if since is None else since
    if begin >= end:
        raise InvalidRequest("the time begins after its end", param="since", fix="Give an earlier one.")
    width = bucket_s or -(-(end - begin) // (SHOWN_BUCKETS * MINUTE_S)) * MINUTE_S
    if (end - begin) / width > MOST_BUCKETS:
        raise InvalidRequest(f"these are more than {MOST_BUCKETS} buckets", param="bucket_s",
                             fix=f"Use at least {-(-(end - begin) // (MOST_BUCKETS * MINUTE_S)) * MINUTE_S}.")
    begin -= begin % width
    rows = await state.history.rows(begin, end)

    def view() -> HistoryView:
        found = buckets(rows, width)
        return HistoryView(since=begin, until=end, bucket_s=width, total=Counts.of(Interval.of(found.values())),
                           data=[Bucket(start=start, **Counts.of(one).model_dump()) for start, one in found.items()])

    return await in_thread(view)


EVENT = Now.model_json_schema(ref_template="#/components/schemas/{model}")
# Timing is described as a part of the history.
del EVENT["$defs"]


@router.get("/v1/live", response_class=Response,
            responses={200: {"content": {"text/event-stream": {"schema": EVENT}}, "description": "The data of each "
                             "event."}})
async def follow_live(request: Request, state: State) -> Response:
    """What is counted, every few seconds as server-sent events, until the client leaves."""
    closing = request.app.state.open_requests
    return await stream(_events(state, lambda: closing.closing), request, {})


@router.get("/v1/alerts")
async def list_alerts(state: State) -> AlertList:
    """What stands out now by the rules of deploy/prometheus/alerts.yml, of this server's own record."""
    now = int(time.time())
    rows = await state.history.rows(now - now % MINUTE_S - LONGEST_MIN * MINUTE_S, now + 1)
    return AlertList(data=[AlertView.of(one) for one in await in_thread(alerts, rows, now)])


async def _events(state: ServerState, ends: Callable[[], bool]) -> AsyncGenerator[Now, None]:
    async for interval in state.history.follow(ends):
        yield Now(at=time.time(), **Counts.of(interval).model_dump())
