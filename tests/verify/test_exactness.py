"""The cases of `trimtab verify` hold on an engine that is right, and each error of an engine is found by them."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from server.engines.transformers.engine import TransformersEngine
from server.engines.transformers.options import EngineOptions
from server.verify import cases as verify_cases
from server.verify.cases import Case, make_cases
from server.verify.exactness import TOLERANCE, Answer, Exact, compare, mixed_batches
from server.verify.forms import FORMS
from server.verify.run import seen_by
from steering.language.errors import UnsupportedModel
from steering.ops import get_operation, operations

FAMILIES = ("qwen3", "qwen3_moe", "gemma3_text", "gpt2")
PROMPTS = [[5 + (7 * i + 3 * t) % 80 for t in range(9 + 4 * i)] for i in range(4)]
pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class Proof:
    """An engine, the plain model, and the cases of the engine."""

    engine: TransformersEngine
    model: Any
    cases: Sequence[Case]

    def of(self, op: str) -> list[Case]:
        return [case for case in self.cases if case.op == op]

    async def tried(self, cases: Sequence[Case]) -> list[Exact]:
        answers = await mixed_batches(self.engine, cases, PROMPTS)
        return self.judged(cases, answers)

    def judged(self, cases: Sequence[Case], answers: Sequence[Sequence[Answer]]) -> list[Exact]:
        return [compare(self.model, case, given, TOLERANCE["float32"])
                for case, given in zip(cases, answers, strict=True)]


async def proof_of(family: str, folder: Path) -> Proof:
    engine = TransformersEngine(EngineOptions(model=str(folder), model_id="tiny", kv_cache_tokens=8192, page_size=8,
                                              self_test=False))
    await engine.start()
    offered = engine.capabilities()["sites"]
    cases = make_cases(engine.facts, offered, await seen_by(engine, offered, PROMPTS[3]))
    return Proof(engine, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), cases)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=FAMILIES)
async def any_proof(request: pytest.FixtureRequest, folder_of: Callable[[str], Path]) -> AsyncIterator[Proof]:
    proof = await proof_of(request.param, folder_of(request.param))
    yield proof
    await proof.engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proof(folder_of: Callable[[str], Path]) -> AsyncIterator[Proof]:
    proof = await proof_of("qwen3_moe", folder_of("qwen3_moe"))
    yield proof
    await proof.engine.stop()


async def test_an_engine_that_is_right_is_exact_and_every_control_shows(any_proof: Proof) -> None:
    found = await any_proof.tried(any_proof.cases)
    assert [one for one in found if not one.exact or not one.controlled] == []
    offered = any_proof.engine.capabilities()["sites"]
    assert {(one.op, one.site) for one in found if one.op} == {(op, site) for site, about in offered.items()
                                                              for op in about["ops"]}
    # Each form of each op that the model has a site for.
    for op in {one.op for one in found if one.op}:
        assert all(any(f"{op} ({form})" in one.name for one in found) for form in FORMS[op])


@pytest.mark.parametrize("op", [op.name for op in operations()])
async def test_an_op_that_does_half_of_it_is_found(op: Any, proof: Proof, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every op that knows a strength; of the others another expert is taken."""
    operation = get_operation(op)
    right = type(operation).row

    def wrong(self: Any, tensors: Any, options: Any, place: Any) -> Any:
        if getattr(options, "mode", None) in ("force", "off_refill"):
            tensors = {**tensors, "experts": (tensors["experts"] + 1) % place.facts.num_experts}
        elif op == "rotate" and options.mode == "to":
            options = options.model_copy(update={"angle": 0.5 * options.angle})
        else:
            place = replace(place, scale=0.5 * place.scale)
        return right(self, tensors, options, place)

    others = [case for case in proof.cases if case.op != op][:4]
    mine = proof.of(op)
    with monkeypatch.context() as patch:
        patch.setattr(type(operation), "row", wrong)
        answers = await mixed_batches(proof.engine, [*mine, *others], PROMPTS)
    found = proof.judged([*mine, *others], answers)
    assert mine and not any(one.exact for one in found[:len(mine)])
    assert all(one.exact for one in found[len(mine):])


async def test_a_scope_that_is_off_by_a_token_is_found(proof: Proof) -> None:
    near = [case for case in proof.cases if "off by a token" in case.name]
    scopes = ({"prompt": {"positions": [-1]}, "generation": "all"}, {"prompt": {"positions": [-2, -1]}},
              {"prompt": {"windows": [[1, 5]]}}, {"prompt": {"exclude": {"positions": [-1]}}, "generation": "none"})
    wrong = [replace(case, interventions=[{**case.interventions[0], "scope": scope}])
             for case, scope in zip(near, scopes, strict=True)]
    assert not any(one.exact for one in await proof.tried(wrong))
    assert all(one.exact for one in await proof.tried(near))


async def test_what_leaks_to_a_request_that_nothing_steers_is_found(proof: Proof) -> None:
    answers = await mixed_batches(proof.engine, [proof.of("add")[0]], PROMPTS)
    assert not proof.judged([proof.cases[0]], answers)[0].exact


async def test_an_op_without_a_formula_is_refused(proof: Proof, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_cases, "FORMS", {name: forms for name, forms in FORMS.items() if name != "clamp"})
    offered = proof.engine.capabilities()["sites"]
    with pytest.raises(UnsupportedModel, match="no formula for the op clamp"):
        make_cases(proof.engine.facts, offered, await seen_by(proof.engine, offered, PROMPTS[0]))


async def test_every_op_has_formulas() -> None:
    assert set(FORMS) == {op.name for op in operations()}

