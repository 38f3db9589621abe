"""A spec is run on the engine before it is stored: a few tokens, by the way of any request, with every gate open.

What cannot run is refused when somebody is there to read why, not at the first request after the next start.
"""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace

import anyio
import structlog

from server.errors import RehearsalFailed
from server.observability.metrics import Metrics
from server.observability.unexpected import report_unexpected
from server.requests.admission.caller import OWN, Caller
from server.requests.admission.deadline import Deadline
from server.requests.plan import Plan
from server.requests.schema import CompletionRequest
from server.requests.service import start
from server.requests.state import ServerState
from server.text.prompts import Prompt
from server.threads import in_thread
from steering.language.errors import EngineUnavailable, InvalidRequest, TrimtabError
from steering.language.scope import PromptPick, PromptSelection, Scope
from steering.language.spec import Spec
from vectors.library.spaces import FOR_ALL, reading

log = structlog.get_logger("trimtab.rehearsal")
TOKENS = 4
# Longest a rehearsal may take, its wait for room in the engine included.
LONGEST_S = 30.0
WORDS = "Tell me about your day. "
# Most tokens of the prompt that are there because a scope names them.
NAMED = 64


async def rehearse(spec: Spec, state: ServerState) -> None:
    """Run `spec` by itself, also while the kill switch is on.

    Raises:
        EngineUnavailable: it cannot be run now. SlotsExhausted and other 503s: likewise.
        RehearsalFailed: the engine failed on it, or did not get through in time.
        TrimtabError: it does not fit the model or cannot be carried out; its path begins at `interventions`.
    """
    condition = state.engine.condition()
    if not condition.ready:
        error = condition.error()
        error.fix = f"Nothing was stored: a spec is stored once it has run. {error.fix or ''}".rstrip()
        raise error
    try:
        with anyio.fail_after(LONGEST_S):
            await _run(spec, state)
    except TimeoutError:
        raise RehearsalFailed(f"the spec was tried on the engine and did not get through {TOKENS} tokens in "
                              f"{LONGEST_S:.0f} s", fix="Nothing was stored. Try again when the server has less to do."
                              ) from None
    except EngineUnavailable as error:
        raise RehearsalFailed(f"the engine failed while it tried the spec: {error.message}", fix="Nothing was stored. "
                              "The server's log says more; try again if it was something else.") from error
    except TrimtabError as error:
        if error.path[:1] == ("steering",):
            error.about(*error.path[1:])
        raise (error if error.path else error.about("interventions")) from None
    except Exception as error:  # whoever stores the spec is told of any error, so that the next request need not be
        request_id = f"rehearsal-{secrets.token_hex(12)}"
        report_unexpected(error, request_id)
        raise RehearsalFailed(f"the spec was tried on the engine and failed; its id in the log is {request_id}",
                              fix="Nothing was stored.") from error


async def try_default_spec(state: ServerState) -> None:
    """Try the default spec at the start of the server. One that fails is reported and bars the requests it would act
    on; the server runs on."""
    # As the requests see it that it acts on: the names of a tenant are not there for all of them.
    with reading(FOR_ALL):
        try:
            spec = await in_thread(state.planner.default_spec)
            if spec is None:
                return
            await in_thread(state.planner.check_spec, spec)
        except TrimtabError as error:
            # What it lacks may be stored later, so every request looks again.
            _report(error)
            return
        try:
            await rehearse(spec, state)
        except TrimtabError as error:
            _report(error)
            state.planner.bar_default_spec(spec, error.message)


async def _run(spec: Spec, state: ServerState) -> None:
    plan = await in_thread(state.planner.check_spec, spec)
    room = state.engine.max_sequence_tokens - TOKENS
    prompt = await in_thread(_prompt, plan, [item.scope for item in spec.interventions], room, state)
    body = CompletionRequest(model=state.settings.model_name, prompt=prompt.token_ids, temperature=0.0, ignore_eos=True)
    # It is nobody's request, so it goes to metrics that nobody reads.
    started = await start(body, replace(state, metrics=Metrics()), plan, [prompt],
                          request_id=f"rehearsal-{secrets.token_hex(12)}",
                          max_tokens=min(TOKENS, state.settings.max_output_tokens or TOKENS),
                          max_tokens_field="max_tokens", prompt_field="prompt", logprobs=None,
                          caller=Caller(OWN, Deadline(state.settings.request_timeout_s or None)),
                          obeys_kill_switch=False)
    for choice in started.run.choices:
        # The gates have been read. They are taken as open here, so that every intervention acts.
        program = None if plan.program is None else plan.program.decided(())
        choice.decided = replace(choice.decided, program=program)
    async for _ in started.run.pieces():
        pass
    if not state.engine.condition().ready:
        raise EngineUnavailable("it does not run any more")


def _prompt(plan: Plan, scopes: Sequence[Scope], room: int, state: ServerState) -> Prompt:
    """A prompt that has the roles, positions and tokens that the scopes name, as far as the context allows."""
    picks = list(_picks(scopes))
    length = min(max((_reach(pick) for pick in picks), default=1), room)
    if plan.names_roles:
        text = WORDS
        prompt = _conversation(text, state)
        while len(prompt.token_ids) < length:
            text += text
            prompt = _conversation(text, state)
        return prompt
    ids = state.vocabulary.encode(WORDS, special_tokens=True) or [0]
    ids += [token for pick in picks for token in pick.token_ids or () if token < state.vocabulary.vocab_size][:NAMED]
    ids *= -(-length // len(ids))
    return Prompt(ids[:max(length, 1)] if len(ids) > room else ids)


def _conversation(text: str, state: ServerState) -> Prompt:
    turns = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
    try:
        return state.chat_prompts.prompt(turns, roles=True)
    except InvalidRequest:
        # Not every template takes a system turn, or a second one of the user.
        return state.chat_prompts.prompt(turns[1:2], roles=True)


def _picks(scopes: Sequence[Scope]) -> Iterator[PromptPick]:
    for scope in scopes:
        if isinstance(scope.prompt, PromptSelection):
            yield scope.prompt
            if scope.prompt.exclude is not None:
                yield scope.prompt.exclude


def _reach(pick: PromptPick) -> int:
    """Tokens a prompt needs to have the positions and the beginnings of the windows."""
    starts = [start for start, _ in pick.windows or () if start is not None]
    return max((at + 1 if at >= 0 else -at for at in [*(pick.positions or ()), *starts]), default=1)


def _report(error: TrimtabError) -> None:
    log.error("default_spec_unusable", code=error.code, param=error.param, message=str(error))
