"""Answers of the embedded engine that are held to a grammar, or to lists of tokens, beside others in one batch."""

import asyncio
import json
import math
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from server.engines.data import LEAST_LOGPROB, Generation, Sampling, Token
from server.engines.grammar import Grammar, of_choices, of_schema
from server.engines.grammar_work import THREADS, GrammarWork
from server.engines.transformers.constraints import follow, held
from server.engines.transformers.running import Running
from steering.language.errors import EngineUnavailable, InvalidRequest
from tests.engines.conftest import compiled, generate, ids
from tests.engines.test_batching import add
from tests.server.tokenizers import byte_tokenizer
from tests.tiny import tiny

TOKENIZER: PreTrainedTokenizerFast = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
PROMPT = TOKENIZER.encode("one two three", add_special_tokens=False)
PERSON = of_schema({"type": "object", "properties": {"name": {"enum": ["Ann", "Bo"]}, "age": {"type": "integer"}},
                    "required": ["name", "age"], "additionalProperties": False}, "response_format")
ABC = Grammar("regex", "[a-c]{3,5}", "structured_outputs.regex")
YES = of_choices(["yes", "no"], "structured_outputs.choice")


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model that writes bytes."""
    folder: Path = tmp_path_factory.mktemp("text-model")
    tiny("qwen3", vocab_size=len(TOKENIZER) + 5).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.fixture
async def engine(start_engine: Any, text_model: str) -> Any:
    return await start_engine("qwen3", model=text_model)


def told(tokens: list[Token]) -> str:
    return str(TOKENIZER.decode(ids(tokens), skip_special_tokens=True))


async def test_grammars_hold_in_a_mixed_batch_and_change_nobody_else(engine: Any) -> None:
    push = compiled(engine, add(1, strength=3.0))
    wanted: list[dict[str, Any]] = []
    for n in range(4):
        for grammar in (PERSON, ABC, YES, None):
            wanted.append({"program": push if n % 2 else None, "max_tokens": 150 if grammar else 20, "grammar": grammar,
                           "temperature": 0.9 * (n > 1), "seed": n, "stop_token_ids": (EOS,), "logprobs": 3})
    together = await asyncio.gather(*(generate(engine, PROMPT, **one) for one in wanted))
    for one, (tokens, _) in zip(wanted, together, strict=True):
        alone, _ = await generate(engine, PROMPT, **one)
        assert ids(tokens) == ids(alone)
        assert [t.logprob for t in tokens] == pytest.approx([t.logprob for t in alone], abs=1e-4)
        text, ended = told(tokens), tokens[-1].finish_reason == "stop"
        if one["grammar"] is PERSON and ended:
            found = json.loads(text)
            assert found["name"] in ("Ann", "Bo") and text == json.dumps(found, separators=(",", ":"))
        elif one["grammar"] is PERSON:
            assert text.lstrip().startswith("{")
        elif one["grammar"] is ABC:
            assert ended and re.fullmatch("[a-c]{3,5}", text)
        elif one["grammar"] is YES:
            assert ended and text in ("yes", "no")
    # The control: without a grammar none of these texts comes about.
    assert all(not re.fullmatch("[a-c]{3,5}|yes|no|\\{.*\\}", told(tokens)) for one, (tokens, _) in
               zip(wanted, together, strict=True) if one["grammar"] is None)


async def test_log_probabilities_are_of_what_the_grammar_leaves(engine: Any) -> None:
    tokens, _ = await generate(engine, PROMPT, grammar=ABC, max_tokens=1, logprobs=5)
    full = (await engine.score(PROMPT, full=True)).full[-1]
    letters = [TOKENIZER.convert_tokens_to_ids(letter) for letter in "abc"]
    left = full[letters].log_softmax(-1).tolist()
    assert dict(tokens[0].top_logprobs) == pytest.approx(
        {**dict(zip(letters, left, strict=True)), 0: LEAST_LOGPROB, 1: LEAST_LOGPROB}, abs=1e-4)
    assert tokens[0].logprob == pytest.approx(max(left), abs=1e-4)


async def test_a_completion_goes_on_under_its_grammar(engine: Any) -> None:
    whole, _ = await generate(engine, PROMPT, grammar=PERSON, max_tokens=30, logprobs=None)
    sampling = Sampling(max_tokens=30, temperature=0.0, grammar=PERSON)
    rest = engine.generate(Generation("goes on", PROMPT, sampling, generated_ids=tuple(ids(whole)[:12])))
    assert [token.token_id async for token in rest] == ids(whole)[12:]
    other = engine.generate(Generation("does not", PROMPT, sampling, generated_ids=(PROMPT[0],)))
    with pytest.raises(EngineUnavailable, match="does not fit"):
        await other.admit()


async def test_what_a_step_noted_can_be_undone(engine: Any) -> None:
    running = Running.build(Generation("r", PROMPT, Sampling(max_tokens=9, grammar=YES)), 0)
    running.matcher = await engine._grammars.matcher(running.generation.sampling)
    logits = torch.zeros(1, engine.facts.vocab_size)
    before = held(logits, [running])
    assert int(before.isfinite().sum()) == 2 and int(logits.isfinite().sum()) == logits.numel()
    token = TOKENIZER.convert_tokens_to_ids("y")
    assert follow(running.matcher, [token])
    running.token_ids.append(token)
    assert int(held(logits, [running]).isfinite().sum()) == 1
    running.rewind(PROMPT)
    assert torch.equal(held(logits, [running]), before)


async def test_a_grammar_nothing_can_go_on_with_fails_its_own_request_alone(engine: Any) -> None:
    other = asyncio.ensure_future(generate(engine, PROMPT, max_tokens=20))
    token = TOKENIZER.convert_tokens_to_ids("a")
    with pytest.raises(InvalidRequest, match="nothing can follow"):
        # Only letters are allowed, and of letters only what the grammar has not.
        await generate(engine, PROMPT, grammar=YES, allowed_token_ids=(token,))
    assert ids((await other)[0]) == ids((await generate(engine, PROMPT, max_tokens=20))[0])


async def test_lists_rule_tokens_out_and_log_probabilities_do_not_show_it(engine: Any) -> None:
    free, _ = await generate(engine, PROMPT, max_tokens=8)
    likely = ids(free)
    some = tuple(TOKENIZER.encode("abcdefgh", add_special_tokens=False))
    allowed, _ = await generate(engine, PROMPT, max_tokens=8, allowed_token_ids=some)
    assert set(ids(allowed)) <= set(some)
    full = (await engine.score([*PROMPT, *ids(allowed)])).logprobs[len(PROMPT):].tolist()
    assert [token.logprob for token in allowed] == pytest.approx(full, abs=1e-4)
    # The second token may not follow the first, and comes anywhere else.
    bad, _ = await generate(engine, PROMPT, max_tokens=8, bad_words=((likely[0], likely[1]),))
    assert ids(bad)[0] == likely[0] and ids(bad)[1] != likely[1]
    single, _ = await generate(engine, PROMPT, max_tokens=8, bad_words=((likely[0],),))
    assert likely[0] not in ids(single)
    stop = likely[2]
    early, _ = await generate(engine, PROMPT, max_tokens=8, stop_token_ids=(stop,))
    late, _ = await generate(engine, PROMPT, max_tokens=8, stop_token_ids=(stop,), min_tokens=5)
    assert len(early) == likely.index(stop) + 1 <= 3 and len(late) > 5 and stop not in ids(late)[:5]


async def test_compiled_grammars_are_kept_within_bounds(start_engine: Any, text_model: str,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await start_engine("qwen3", model=text_model, grammar_cache_bytes=30_000)
    grammars, made = engine._grammars, []
    compile_ = grammars._compiled
    monkeypatch.setattr(grammars, "_compiled", lambda grammar: (made.append(grammar), compile_(grammar))[1])
    for n in range(30):
        for grammar in (ABC, of_choices([f"choice {n}", "none"], "g")):
            await grammars.matcher(Sampling(max_tokens=1, grammar=grammar))
    # What is used again and again stays; the others go.
    assert made.count(ABC) == 1 and grammars._kept.currsize <= 30_000 and len(grammars._kept) < 31


async def test_work_on_a_grammar_is_bounded_in_time_and_done_once() -> None:
    work, let_go, begun = GrammarWork(0.2), threading.Event(), []
    grammars = [of_choices([f"{n}"], f"field {n}") for n in range(THREADS + 1)]

    def slow(grammar: Grammar) -> str:
        begun.append(grammar)
        assert let_go.wait(60)
        return grammar.text

    found = await asyncio.gather(*(work.done(g, slow) for g in [*grammars[:THREADS], grammars[0]]),
                                 return_exceptions=True)
    assert [type(one) for one in found] == [InvalidRequest] * 3 and found[0].param == "field 0"
    # All threads are taken by what takes too long, so the next one is not to blame.
    with pytest.raises(EngineUnavailable) as refused:
        await work.done(grammars[-1], slow)
    # Threads start in no particular order.
    assert refused.value.retry_after_s and sorted(begun, key=grammars.index) == grammars[:THREADS]
    let_go.set()
    work = GrammarWork(math.inf)
    assert await work.done(grammars[0], slow) == grammars[0].text


async def test_a_wrong_grammar_is_the_requests_fault_and_comes_before_any_token(engine: Any) -> None:
    wrong = engine.generate(Generation("wrong", PROMPT, Sampling(
        max_tokens=4, grammar=of_schema({"type": "foo"}, "response_format.json_schema.schema"))))
    with pytest.raises(InvalidRequest) as refused:
        await wrong.admit()
    assert refused.value.param == "response_format.json_schema.schema" and not engine.roster.completions
