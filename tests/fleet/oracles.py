"""What must be so after all that happened. Each oracle returns its faults in words, none where all is well."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from tests.fleet.facts import facts
from tests.fleet.load import CHAT, NEVER, Answer
from tests.fleet.stage import GRACE_S, Stage
from tests.fleet.timelines import lateness

# How long after the database is back a change that was made shortly before, or meanwhile, may still be on its way.
BACK_S = 1.0
MINUTE_S = 60
# Refused before it is looked what was asked for, and counted without that.
UNROUTED = ("invalid_api_key", "shutting_down")


def due(outages: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """From when on a change of that time has to act: what the database cannot tell of while it is away, it tells of
    when it is back."""
    def when(acknowledged: float) -> float:
        return max([acknowledged, *(back for down, back in outages if down - GRACE_S <= acknowledged <= back)])

    return when


def followed(stage: Stage) -> list[str]:
    """No answer under what was over for a second when it began."""
    found, when = [], due(stage.outages)
    for answer in stage.log.chats:
        for name, seen in facts(answer, stage):
            # What a request follows is decided before its answer begins.
            line = stage.timelines[name]
            if seen & line.possible(answer.began, answer.first, GRACE_S, when):
                continue
            # A process that got no processor is excused for that long.
            stall = stage.heartbeat.stall(answer.replica, answer.began - 2 * GRACE_S, answer.began)
            allowed = line.possible(answer.began, answer.first, GRACE_S + stall, when)
            if not seen & allowed:
                late = lateness(line, seen, answer.began)
                found.append(f"{name} was {sorted(map(str, seen))}, {late:.3f} s after that was over, stalled for "
                             f"{stall:.3f} s; {sorted(map(str, allowed))} may be: {answer}")
    return found


def latest(stage: Stage) -> dict[str, float]:
    """By what was changed, how long after the acknowledgement the last answer began, with the database there, that
    did not follow."""
    worst: dict[str, float] = defaultdict(float)
    for answer in stage.log.chats:
        if not any(down - GRACE_S <= answer.began <= back + BACK_S for down, back in stage.outages):
            for name, seen in facts(answer, stage):
                kind = name.split(" ")[0]
                worst[kind] = max(worst[kind], lateness(stage.timelines[name], seen, answer.began))
    return dict(worst)


def cut(stage: Stage) -> list[str]:
    """No stream is cut, and none ends with an error, but those of the replica that was killed."""
    return [f"cut: {answer}" for answer in stage.log.chats
            if answer.stream and answer.status == 200 and (answer.cut or answer.code) and answer.replica != "c"]


def failed(stage: Stage) -> list[str]:
    """Answers that nothing that happened explains."""
    return [f"failed: {answer}" for answer in stage.log.answers if not answer.done and not _explained(answer, stage)]


def _explained(answer: Answer, stage: Stage) -> bool:
    if answer.status in (401, 403, 429):
        # Whether rightly is for other oracles.
        return answer.code in {401: ("invalid_api_key",), 403: ("policy_violation",),
                               429: ("rate_limit_exceeded",)}[answer.status]
    if answer.code == "library_unavailable":
        return any(answer.began <= back + BACK_S and answer.ended >= down for down, back in stage.outages)
    if answer.code == "shutting_down":
        return answer.ended >= stage.ends.get(answer.replica, NEVER)
    if not answer.replica or answer.cut:
        # The balancer found nobody, or the connection broke: one of them ended meanwhile.
        return any(answer.began <= at + 2 * GRACE_S and answer.ended >= at for at in stage.ends.values())
    return False


def over_quota(answers: Iterable[Answer], a_minute: int, at_once: int, offset: float | None = None) -> list[str]:
    """No more than the limits were let in, of all replicas together. offset: of the clock in UTC to that of answers."""
    offset = time.time() - time.monotonic() if offset is None else offset
    let_in = [answer for answer in answers if answer.status == 200]
    # Which minute one that began in another than it ended in was counted in is not known.
    minutes = Counter(begun for answer in let_in
                      if (begun := (answer.began + offset) // MINUTE_S) == (answer.first + offset) // MINUTE_S)
    found = [f"{count} requests were let in within one minute, the limit is {a_minute}"
             for count in minutes.values() if count > a_minute]
    touched = {(at + offset) // MINUTE_S for answer in let_in for at in (answer.began, answer.first)}
    if len(let_in) > a_minute * len(touched):
        found.append(f"{len(let_in)} requests were let in within {len(touched)} minutes")
    # Between its head and its last byte a stream certainly has a place.
    edges = sorted(edge for answer in let_in if answer.stream and not answer.cut
                   for edge in ((answer.first, 1), (answer.ended, -1)))
    running = most = 0
    for _, step in edges:
        running += step
        most = max(most, running)
    return found + [f"{most} streams ran at once, the limit is {at_once}"] * (most > at_once)


def unaudited(acknowledged: Iterable[Answer], records: Sequence[dict[str, Any]], targets: set[str]) -> list[str]:
    """Of what was acknowledged, what the audit does not have. targets: of what may have been asked for twice, because
    its first answer was lost."""
    requests = {record["request_id"] for record in records}
    recorded = {record["target"] for record in records}
    return [f"not in the audit: {answer}" for answer in acknowledged
            if answer.request_id not in requests] + [f"not in the audit: {target}" for target in targets - recorded]


def gaps(records: Sequence[dict[str, Any]]) -> list[str]:
    """Numbers that follow one another, and each digest that is told by the next record."""
    return [f"record {one['number']} is not followed by the next" for one, other in pairwise(records)
            if (other["number"], other["previous"]) != (one["number"] + 1, one["digest"])]


def miscounted(replica: str, answers: Iterable[Answer], counted: dict[int, float]) -> list[str]:
    """Of one replica: answers to chats by status, as clients have them and as it counts them."""
    had = Counter(answer.status for answer in answers if answer.replica == replica and answer.method == "POST"
                  and (answer.path == CHAT or answer.code in UNROUTED))
    return [f"{replica} counts {counted.get(status, 0):g} answers of status {status}, clients have {had[status]}"
            for status in sorted({*had, *counted}) if had[status] != counted.get(status, 0)]


def together(rows: Iterator[tuple[str, float, float]]) -> list[str]:
    """Two sums that have to be one."""
    return [f"{what}: {one:g} is not {other:g}" for what, one, other in rows if one != other]
