"""vLLM's log-probabilities against plain Hugging Face hooks: every op, mixed batch, compiled and eager."""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lab import model_path
from server.engines.grammar import of_schema
from tests.engines import reference as ref
from tests.engines.capture_cases import captures_equal_hooks
from tests.engines.cases import vector
from tests.engines.conftest import compiled, generate, ids
from tests.engines.field_cases import fields_choose_as_a_greedy_loop
from tests.engines.patch_cases import patches_equal_hooks
from tests.engines.section_cases import scopes_follow_sections
from tests.engines.sparsify_cases import sparsified_equals_hooks
from tests.engines.vllm import checks, resuming
from tests.engines.vllm.apps import Running, client_of, make_app
from tests.engines.vllm.conftest import Group
from tests.engines.vllm.same import same_answers_over_http
from tests.sweeps import sweep_of

pytestmark = [pytest.mark.asyncio(loop_scope="module"),
              pytest.mark.parametrize("group", indirect=True, argvalues=sweep_of(
                  "dense-eager", slow=("dense-compiled", "moe-compiled", "moe-eager")))]


async def test_mixed_batch_equals_hooks(group: Group) -> None:
    await checks.mixed_batch_equals_hooks(group)


async def test_scores_equal_hooks(group: Group) -> None:
    await checks.scores_equal_hooks(group, checks.cases_of(group))


async def test_next_logprobs_equal_hooks(group: Group) -> None:
    spec, edits = checks.cases_of(group)[0]
    texts = [checks.prompt_of(i) for i in range(5)]
    found = await group.engine.next_logprobs(texts, compiled(group.engine, *spec))
    expected = torch.stack([ref.logprobs(group.model, text, len(text), edits)[-1] for text in texts])
    assert torch.allclose(found, expected, atol=checks.TOLERANCE)


async def test_many_programs_through_few_slots(group: Group) -> None:
    """Distinct programs cycle through 32 slots; a sample is checked against hooks, memory stays as it is."""
    facts, options = group.engine.facts, group.engine.options
    count = 200 if options.eager or facts.num_experts else 1000
    vectors = [vector(100 + n, facts.d_model, 6.0) for n in range(count)]
    programs = [compiled(group.engine, {"op": "add", "layers": [n % 6], "inline": {"vector": v.tolist()}})
                for n, v in enumerate(vectors)]
    before = (await group.engine.connection.rpc("trimtab_describe"))[0]["bytes"]
    for start in range(0, count, 25):
        part = range(start, start + 25)
        done = await asyncio.gather(*(generate(group.engine, checks.prompt_of(n), programs[n], max_tokens=3)
                                      for n in part))
        n = start + 7
        checks.check_tokens(group, checks.prompt_of(n), done[7][0],
                            [ref.Edit("resid_post", n % 6, ref.add(vectors[n]), ref.everywhere)], steered=True)
    assert group.engine.slots.num_resident == 32
    assert group.engine.slots.num_pinned == 0
    assert (await group.engine.connection.rpc("trimtab_describe"))[0]["bytes"] <= before + 64 * 4 * facts.d_model


async def test_capture_is_what_hooks_see(group: Group) -> None:
    await checks.capture_is_what_hooks_see(group)


async def test_captures_over_http_are_what_hooks_see(group: Group, tmp_path: Path) -> None:
    app = make_app(group.name, Running(group.engine), "vllm", tmp_path)
    async with client_of(app) as client:
        await captures_equal_hooks(client, group.name, group.model, {"resid_post": [0, 2], "mlp_out": [2],
                                                                     "head_out": [4]}, checks.TOLERANCE)
        await patches_equal_hooks(client, group.name, group.model, ["resid_post", "head_out"], checks.TOLERANCE)


async def test_what_is_left_out_over_http_is_what_hooks_leave_out(group: Group, tmp_path: Path) -> None:
    app = make_app(group.name, Running(group.engine), "vllm", tmp_path)
    async with client_of(app) as client:
        sites = [site for site in ("mlp_act", "head_out") if site in group.engine.facts.sites]
        await sparsified_equals_hooks(client, group.name, group.model, sites, checks.TOLERANCE)


async def test_comparison_equals_two_plain_passes(group: Group) -> None:
    await checks.comparison_equals_two_plain_passes(group)


async def test_what_was_kept_tells_what_two_passes_tell(group: Group) -> None:
    await checks.what_was_kept_tells_what_two_passes_tell(group)


async def test_resumed_completions(group: Group) -> None:
    await resuming.goes_on_as_in_one_go(group)
    await resuming.goes_on_under_another_program(group)
    await resuming.what_cannot_go_on_is_refused(group)


async def test_the_kill_switch_on_running_streams(group: Group) -> None:
    await resuming.goes_on_unsteered_when_it_is_switched_off(group)


async def test_low_temperatures_are_those_that_were_asked_for(group: Group) -> None:
    await checks.low_temperatures_are_those_that_were_asked_for(group)


async def test_scopes_that_name_sections(group: Group) -> None:
    await scopes_follow_sections(group.engine, group.model, lambda i: checks.prompt_of(i, 24), count=8, new_tokens=40)


async def test_same_answers_as_the_embedded_engine(group: Group, tmp_path: Path) -> None:
    await same_answers_over_http(group, tmp_path)


async def test_fields_choose_as_a_greedy_loop(group: Group) -> None:
    push = vector(5, group.engine.facts.d_model, 5.0)
    program = compiled(group.engine, {"op": "add", "layers": [2], "inline": {"vector": push.tolist()}})
    prompts = [checks.prompt_of(n, 20) for n in range(20)]
    await fields_choose_as_a_greedy_loop(group.engine, group.model, prompts, program,
                                         [ref.Edit("resid_post", 2, ref.add(push), ref.everywhere)])


async def test_answers_of_a_json_schema(group: Group) -> None:
    """vLLM's structured outputs are reached, steered or not."""
    schema = {"type": "object", "properties": {"day": {"enum": ["Monday", "Friday"]}}, "required": ["day"],
              "additionalProperties": False}
    tokenizer = AutoTokenizer.from_pretrained(model_path(group.name))
    push = compiled(group.engine, {"op": "add", "layers": [2], "strength": 30.0,
                                   "inline": {"vector": vector(1, group.engine.facts.d_model).tolist()}})
    for program in (None, push):
        tokens, _ = await generate(group.engine, tokenizer.encode("One day after Sunday is"), program, max_tokens=60,
                                   grammar=of_schema(schema, "response_format"),
                                   stop_token_ids=group.engine.end_ids, logprobs=5)
        assert tokens[-1].finish_reason == "stop"
        answer = json.loads(tokenizer.decode(ids(tokens), skip_special_tokens=True))
        assert answer["day"] in ("Monday", "Friday")
        # What the schema rules out has no probability; JSON has no number for its logarithm.
        others = [value for token in tokens for _, value in token.top_logprobs]
        assert min(others) == -9999.0 and all(token.logprob is not None and token.logprob > -99 for token in tokens)
