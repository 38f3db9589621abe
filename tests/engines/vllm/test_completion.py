"""A completion's own bookkeeping, with an engine that is acted out."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from server.engines.data import Generation, Sampling
from server.engines.grammar import of_schema
from server.engines.grammar_work import GrammarWork
from server.engines.vllm.host.completion import VllmCompletion
from server.engines.vllm.host.taken import StepSums, Taken
from server.engines.vllm.wire import Fault
from steering.language.errors import EngineUnavailable, InvalidRequest, SteeringOverflow
from steering.language.scope import Scope
from steering.ops.base import Row
from steering.programs.program import Applied, Compiled, Program

APPLIED = Applied(None, "add", (), (), {}, {})
PROGRAM = Program((Compiled("add", Scope(), {("resid_post", 0): Row("add", {})}, APPLIED),))
SCHEMA = of_schema({"type": "object"}, "response_format.json_schema.schema")


class Engine:
    """vLLM's outputs as (token ids, why it ended), what workers say, and in what order things are let go."""

    def __init__(self, outputs: list[tuple[list[int], str | None]], taken: Taken) -> None:
        self.outputs, self._taken, self.order = outputs, taken, []  # type: ignore[var-annotated]
        self.asking = SimpleNamespace(taken=self.taken)
        self.grammars = GrammarWork(60)
        self.silent = False

    async def taken(self, name: str) -> Taken:
        self.order.append("asked")
        if self.silent:
            await asyncio.Event().wait()
        return self._taken

    async def spell(self, program: Program) -> None:
        return None

    async def pin(self, program: Program) -> Any:
        return SimpleNamespace(slot=1, release=lambda: self.order.append("released"),
                               distrust=lambda: self.order.append("distrusted"))

    async def run(self, *args: Any) -> AsyncIterator[Any]:
        try:
            for n, (ids, reason) in enumerate(self.outputs):
                yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason=reason)],
                                      num_cached_tokens=2 + n)
        finally:
            self.order.append("closed")

    async def explain(self, program: Program, *args: Any) -> Exception:
        return SteeringOverflow("too much")


def completion(engine: Engine, program: Program | None = PROGRAM, **sampling: Any) -> VllmCompletion:
    fake: Any = engine
    return VllmCompletion(fake, Generation("r", [1, 2, 3], Sampling(max_tokens=9, **sampling), program))


async def tokens(given: VllmCompletion) -> list[int]:
    return [token.token_id async for token in given]


async def test_what_was_cached_is_what_vllm_said_first() -> None:
    found = completion(Engine([([7], None), ([8], "length")], Taken({})), None)
    assert found.cached() is None
    await tokens(found)
    assert found.cached() == 2


async def test_a_finished_one_tells_its_steps() -> None:
    engine = Engine([([5], None), ([6], "stop")], Taken({0: StepSums(2.0, 6.0, 4, 1)}))
    given = completion(engine)
    assert await tokens(given) == [5, 6]
    found = given.touched()[0]
    assert (found.largest_step, found.mean_step, found.clipped) == (2.0, 1.5, 1)
    await given.cancel()
    assert engine.order == ["asked", "closed", "released"]


@pytest.mark.parametrize("schema", [None, SCHEMA])
async def test_a_fault_is_told_as_what_it_is_with_a_schema_or_without(schema: Any) -> None:
    engine = Engine([([], "error")], Taken({}, Fault("step", 1)))
    with pytest.raises(SteeringOverflow):
        await tokens(completion(engine, grammar=schema))
    assert engine.order == ["asked", "closed", "released"]


async def test_a_grammar_that_cannot_be_compiled_after_all_is_the_schemas_fault() -> None:
    engine = Engine([([], "error")], Taken({}))
    with pytest.raises(InvalidRequest) as refused:
        await tokens(completion(engine, None, grammar=SCHEMA))
    assert refused.value.param == "response_format.json_schema.schema"


async def test_a_fault_that_only_another_rank_knows_of_fails_the_request_at_its_end() -> None:
    engine = Engine([([5], None), ([6], "length")], Taken({}, Fault("step", 1)))
    with pytest.raises(SteeringOverflow):
        await tokens(completion(engine))


async def test_a_lost_program_is_not_trusted_again() -> None:
    engine = Engine([([], "error")], Taken({}, Fault("program", 0)))
    with pytest.raises(SteeringOverflow):
        await tokens(completion(engine))
    assert engine.order == ["asked", "distrusted", "closed", "released"]


async def test_one_that_vllm_aborts_is_no_answer() -> None:
    for outputs in ([([5], None), ([], "abort")], [([5], None)]):
        engine = Engine(outputs, Taken({}))
        with pytest.raises(EngineUnavailable):
            await tokens(completion(engine))
        assert "closed" in engine.order and engine.order[-1] == "released"


async def test_one_that_is_left_lets_go_in_order_even_if_nobody_answers_or_it_is_cancelled_meanwhile() -> None:
    for hurried in (False, True):
        engine = Engine([([5], None), ([6], "stop")], Taken({0: StepSums(2.0, 2.0, 1, 0)}))
        given = completion(engine)
        async for _ in given:
            break
        if hurried:
            engine.silent = True
            leaving = asyncio.ensure_future(given.cancel())
            while "asked" not in engine.order:
                await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
        else:
            await given.cancel()
            assert given.touched()[0].largest_step == 2.0
        assert engine.order == ["asked", "closed", "released"]
