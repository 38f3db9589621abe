"""Three replicas behind a balancer, under load, while everything happens to them: then what must be so is looked at.

One story runs for all tests of this file (`story`), a few minutes long; each test asks another question about it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.fleet import acts, oracles, reading
from tests.fleet.clients import clients
from tests.fleet.cluster import Fleet, Replica, needs_fleet, running
from tests.fleet.heartbeat import Heartbeat
from tests.fleet.load import CHAT, RESPONSES, Answer, Asker, Load, Log, now
from tests.fleet.reading import Metrics, get
from tests.fleet.stage import A_MINUTE, AT_ONCE, NONE, POLICIES, Stage, furnish

pytestmark = [pytest.mark.fleet, needs_fleet]
KILLED, DRAINED = "c", "b"
# Of a server that is killed: for how long before that it has not logged answers, nor stored samples and effects.
UNLOGGED_S, UNSAMPLED_S, UNSTORED_S = 1.0, 3.0, 15.0
EQUAL_S = 60.0


@dataclass
class Story:
    stage: Stage
    began: float
    acts: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def fleet(self) -> Fleet:
        return self.stage.fleet

    @property
    def left(self) -> list[Replica]:
        """Those that serve at the end."""
        return [self.fleet.replicas[name] for name in self.stage.serving]

    @asynccontextmanager
    async def act(self, name: str) -> AsyncIterator[None]:
        began = now()
        yield
        self.acts[name] = began, now()


async def _play(fleet: Fleet) -> Story:
    log, heartbeat = Log(), Heartbeat()
    async with AsyncExitStack() as stack:
        asks = {name: Asker(replica.url, log, name) for name, replica in fleet.replicas.items()}
        front = Asker(fleet.front, log)
        for asker in (front, *asks.values()):
            stack.push_async_callback(asker.close)
        stage = Stage(fleet, log, heartbeat, asks, front)
        story = Story(stage, now())
        await furnish(stage)
        async with heartbeat.listening(lambda: fleet.alive), Load(front).running(*clients(stage)):
            await stage.settled(now())
            async with story.act("changes"):
                await acts.changes(stage, 4)
            async with story.act("roll-out begins"):
                ramp = acts.Ramp(stage)
                await ramp.begin()
            async with story.act("a replica is killed"):
                await acts.kill(stage, KILLED, "d")
            async with story.act("roll-out ramps"):
                await ramp.reached(acts.STEPS[-1])
            async with story.act("roll-out returns"):
                await ramp.make_worse()
                await ramp.ended()
            async with story.act("the database restarts"):
                await acts.restart_database(stage)
            async with story.act("S3 answers 503"):
                await acts.refuse_blobs(stage)
            async with story.act("a replica is drained"):
                await acts.drain(stage, DRAINED, "e")
            async with story.act("changes again"):
                await acts.changes(stage, 4)
            async with story.act("jobs end"):
                await acts.finish_jobs(stage)
    return story


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with running(tmp_path_factory.mktemp("fleet")) as fleet, fleet.balanced():
        found = asyncio.run(_play(fleet))
        for name, (began, ended) in found.acts.items():
            print(f"{began - found.began:7.1f} s  {name}, {ended - began:.1f} s")
        print(f"{len(found.stage.log.answers)} answers; the last that did not follow a change began after it by: "
              + told(oracles.latest(found.stage)))
        print("replicas stalled for: " + ", ".join(f"{name} {stall:.2f} s at {at - found.began:.1f} s" for name, (
            stall, at) in sorted(found.stage.heartbeat.worst().items())))
        yield found


def told(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f} s" for name, value in sorted(seconds.items()))


def none(faults: list[str]) -> None:
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults[:20])


def test_whatever_is_changed_acts_on_every_replica_within_a_second(story: Story) -> None:
    none(oracles.followed(story.stage))
    # The control: everything was changed under load, and every value was seen.
    seen: dict[str, set[Any]] = {}
    for answer in story.stage.log.chats:
        for name, values in oracles.facts(answer, story.stage):
            if len(values) == 1:
                seen.setdefault(name.split(" ")[0], set()).update(values)
    assert seen["calm"] == {1, 2} == seen["turn"] and seen["switch"] == {True, False}
    assert seen["default"] == {NONE, "tone@1", "tone@2"} and seen["policy"] == set(POLICIES)
    assert seen["mood"] >= {None} and "open" in seen["key"]
    assert sum(answer.status == 401 for answer in story.stage.log.chats) > 10


def test_no_stream_is_cut_but_those_of_the_replica_that_was_killed(story: Story) -> None:
    none(oracles.cut(story.stage))
    at = story.stage.ends
    for name in (KILLED, DRAINED):
        assert [answer for answer in story.stage.log.chats if answer.stream and answer.replica == name
                and answer.first < at[name] < answer.ended], f"{name} had no stream open when it ended"
    assert [answer for answer in story.stage.log.chats if answer.cut and answer.replica == KILLED]


def test_nothing_fails_that_nothing_explains(story: Story) -> None:
    none(oracles.failed(story.stage))
    codes = {answer.code for answer in story.stage.log.answers}
    assert {"library_unavailable", "rate_limit_exceeded", "policy_violation", "invalid_api_key"} <= codes


def test_conversations_go_on_whoever_answers(story: Story) -> None:
    """What could not be found would have failed; here are the replicas on which one went on that another had begun."""
    answers = [answer for answer in story.stage.log.chats if answer.path == RESPONSES and answer.done]
    of = {answer.body["id"]: answer.replica for answer in answers}
    went = {(of[before], answer.replica) for answer in answers if (before := answer.body["previous_response_id"])}
    assert len({one for one, other in went if one != other}) > 2


def test_no_error_tells_where_anything_is(story: Story) -> None:
    fleet = story.fleet
    places = (str(fleet.database.folder), fleet.s3.url.removeprefix("http://"), str(fleet.redis.port), "psycopg")
    told = [f"{answer}: {answer.body}" for answer in story.stage.log.answers
            if answer.code and any(place in str(answer.body) for place in places)]
    assert not told, told[:5]


def test_the_roll_out_ramped_and_returned_by_itself(story: Story) -> None:
    for replica in story.left:
        found = get(replica, f"/v1/admin/rollouts/{story.stage.rollout}")
        assert found["status"] == "returned"
        assert [(event["what"], event["by"]) for event in found["history"]] == [
            ("created", "owner"), ("published", "owner"), ("step 1", "roll-out"), ("step 2", "roll-out"),
            ("returned", "roll-out")]
        assert "dose" in found["history"][-1]["why"]
    arms = {one["arm"] for answer in story.stage.log.chats if answer.steering for one in answer.steering["rollouts"]}
    assert arms == {"stable", "candidate"}


def test_samples_of_guard_rails_add_up(story: Story) -> None:
    """The rail `errors` has one sample of each answer, from whatever replica, but for those that the killed one had not
    stored, and those that came when the roll-out had ended or was about to."""
    stage = story.stage
    [rail] = [one for one in get(story.left[0], f"/v1/admin/rollouts/{stage.rollout}")["rails"]
              if one["rail"]["metric"] == "errors"]
    over, dead = stage.timelines["mood"].changes[-1].sent, stage.ends[KILLED] - UNSAMPLED_S
    for arm in ("stable", "candidate"):
        given = [answer for answer in stage.log.chats if answer.done and answer.steering
                 and [one["arm"] for one in answer.steering["rollouts"]] == [arm]]
        late = sum(answer.ended >= over or (answer.replica == KILLED and answer.ended > dead) for answer in given)
        assert len(given) - late <= rail[f"{arm}_samples"] <= len(given), (arm, len(given), late, rail)
        assert len(given) - late > 20


def test_what_was_acknowledged_is_there_whoever_is_asked(story: Story) -> None:
    stage = story.stage
    assert len(stage.made) > 10 and len(stage.jobs) == 3
    for replica in story.left:
        for made in stage.made:
            assert get(replica, f"/v1/artifacts/{made.ref}")["digest"] == made.digest, (replica.name, made.ref)
        versions = {name: get(replica, f"/v1/artifacts/{name}@production")["version"] for name in ("calm", "turn")}
        assert versions == {name: stage.timelines[name].last for name in versions}
        policy = next(one["policy"] for one in get(replica, "/v1/admin/policies")["data"] if one["tenant"] == "blue")
        assert {name: value for name, value in policy.items() if value is not None and name in (
            "artifacts", "mandatory")}.keys() == POLICIES[stage.timelines["policy"].last].keys()
        keys = {f"{one['tenant']}/{one['name']}": one["blocked"] for one in get(replica, "/v1/admin/keys")["data"]}
        assert keys == {label: stage.timelines[f"key {label}"].last == "blocked" for label in stage.ids}
        assert get(replica, "/v1/admin/kill-switch")["on"] is False
        jobs = {one["id"]: one for one in get(replica, "/v1/jobs")["data"]}
        for id, name in stage.jobs.items():
            assert jobs[id]["status"] == "succeeded", (replica.name, jobs[id])
            assert [one["version"] for one in get(replica, f"/v1/artifacts/{name}/versions")["data"]] == [1]


def test_the_numbers_of_what_was_stored_come_back(story: Story) -> None:
    """Through S3, from a replica that has never read them."""
    from safetensors.numpy import load

    newest = story.fleet.replicas["e"]
    for made in story.stage.made[::5]:
        data = reading.asked(f"{newest.url}/v1/artifacts/{made.ref}/download")
        assert data.status_code == 200, (made.ref, data.text[:300])
        [vector] = load(data.content).values()
        assert vector == pytest.approx(made.numbers, abs=1e-4)


def test_the_audit_is_whole_and_has_all_that_was_acknowledged(story: Story) -> None:
    said = {(done.returncode, done.stdout) for done in map(reading.verified, story.left)}
    assert len(said) == 1 and said.pop()[0] == 0, said
    records = reading.audit(story.left[0])
    none(oracles.gaps(records))
    changes = [answer for answer in story.stage.log.answers if answer.done and answer.method != "GET"
               and answer.path not in (CHAT, RESPONSES) and answer.key != "maker/main"]
    assert len(changes) > 40
    none(oracles.unaudited(changes, records, {made.ref for made in story.stage.made} | set(story.stage.jobs)))
    assert {"rollout.step", "rollout.returned", "job.resume", "kill_switch.set"} <= {one["action"] for one in records}


def test_quotas_hold_over_all_replicas(story: Story) -> None:
    asked = [answer for answer in story.stage.log.chats if answer.asked.get("tenant") == "small"]
    none(oracles.over_quota(asked, A_MINUTE, AT_ONCE))
    refused, let_in = ([answer for answer in asked if answer.status == status] for status in (429, 200))
    assert len(refused) > 20 and len({answer.replica for answer in let_in}) > 2
    counted = sum(Metrics(replica).total("trimtab_quota_store_failures_total") for replica in story.left)
    assert counted == 0, "Redis was away, and replicas counted by themselves"


def test_answers_are_counted_once(story: Story) -> None:
    """What clients were answered is what the replicas count: those that live in their metrics, the drained one, whose
    metrics went with it, in its log, and the killed one but for its last moments."""
    answers = story.stage.log.answers

    def faults() -> list[str]:
        # A request is counted a moment after its last byte.
        return [fault for replica in story.left
                for fault in oracles.miscounted(replica.name, answers, Metrics(replica).chats())]

    deadline = time.monotonic() + EQUAL_S
    while faults() and time.monotonic() < deadline:
        time.sleep(0.5)
    none(faults() + oracles.miscounted(DRAINED, answers, reading.logged_chats(story.fleet.replicas[DRAINED])))
    killed, at = story.fleet.replicas[KILLED], story.stage.ends[KILLED]
    had = [answer for answer in answers if answer.replica == KILLED and answer.path == CHAT and not answer.cut]
    logged = sum(reading.logged_chats(killed).values())
    last = sum(answer.ended > at - UNLOGGED_S for answer in had)
    assert len(had) - last <= logged <= len(had) + last + sum(
        bool(answer.cut) for answer in answers if answer.path == CHAT and answer.ended >= at), (len(had), last, logged)


def test_what_answers_say_is_what_is_counted(story: Story) -> None:
    def rows() -> Iterator[tuple[str, float, float]]:
        for replica in story.left:
            counted, had = Metrics(replica), [answer for answer in story.stage.log.chats
                                              if answer.replica == replica.name and answer.steering]
            receipts: list[dict[str, Any]] = [answer.steering for answer in had if answer.steering]
            yield (f"tokens of {replica.name}", sum(answer.tokens for answer in had),
                   counted.total("trimtab_generated_tokens_total"))
            yield (f"steered by {replica.name}", sum(bool(one["applied"]) for one in receipts),
                   counted.total("trimtab_steered_requests_total"))
            yield (f"held back by {replica.name}", sum(one["disabled"] for one in receipts),
                   counted.total("trimtab_suppressed_requests_total"))
            yield (f"refused by quota on {replica.name}", sum(
                answer.status == 429 for answer in story.stage.log.chats if answer.replica == replica.name),
                   counted.total("trimtab_quota_refused_total"))
            yield (f"uses of calm on {replica.name}", sum(
                one["artifact"].startswith("calm@") for receipt in receipts for one in receipt["applied"]),
                   counted.total("trimtab_artifact_uses_total", artifact="calm"))

    deadline = time.monotonic() + EQUAL_S
    while (found := oracles.together(rows())) and time.monotonic() < deadline:
        time.sleep(0.5)
    none(found)


def test_effects_of_all_replicas_add_up(story: Story) -> None:
    """Records of what was measured, of whole specs and of each intervention: those that every replica tells, with those
    that it says are lost, are all that were made, but for what the killed one had not stored yet. What is lost of a
    roll-out is a record more, the one of its arm, which is told beside the others and not among them."""
    killed, drained = story.fleet.replicas[KILLED], story.fleet.replicas[DRAINED]
    of_killed = sum(map(_records, killed.lines("effect")))
    late = sum(_records(line) for line in killed.lines("effect") if _age(line, killed) <= UNSTORED_S)

    def sums() -> tuple[float, float, set[float]]:
        counted = [Metrics(replica) for replica in story.left]
        measured = sum(one.total("trimtab_effect_kl_nats_count") for one in counted) + of_killed
        lost = sum(one.total("trimtab_effect_records_lost_total") for one in counted)
        told = {sum(row["completions"] for row in get(replica, "/v1/effects", limit=1000)["data"])
                for replica in story.left}
        return (measured + sum(map(_records, drained.lines("effect"))),
                lost + sum(line["records"] for one in (drained, killed) for line in one.lines("effects_not_stored")),
                told)

    def well(measured: float, lost: float, told: set[float]) -> bool:
        return len(told) == 1 and measured - late <= max(told) + lost <= measured + lost / 2

    deadline = time.monotonic() + EQUAL_S
    while not well(*(found := sums())) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert well(*found), f"measured, lost and told: {found}; {of_killed} by the killed one, {late} of these late"
    assert found[0] > 100 and found[1] < found[0] / 2


def _records(line: dict[str, Any]) -> int:
    return 1 + len({(artifact, op) for artifact, op, _ in line["interventions"]})


def _age(line: dict[str, Any], replica: Replica) -> float:
    """How long before its last line a server has logged a line."""
    from datetime import datetime

    def at(one: dict[str, Any]) -> datetime:
        return datetime.fromisoformat(one["timestamp"])

    last = max(at(one) for event in ("request", "effect") for one in replica.lines(event))
    return (last - at(line)).total_seconds()


def test_clients_were_many_and_mixed(story: Story) -> None:
    """The control of all others: there was load, of every tenant, on every replica, all the time."""
    answers: list[Answer] = [answer for answer in story.stage.log.chats if answer.done]
    assert {answer.key for answer in answers} >= {"blue/main", "green/main", "small/main"}
    assert {answer.replica for answer in answers} == {"a", "b", "c", "d", "e"}
    for name, (began, ended) in story.acts.items():
        assert any(began <= answer.ended and answer.began <= ended for answer in answers), f"no load during {name}"
