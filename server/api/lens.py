"""`POST /v1/lens`: the logit lens and the diagonal tuned lens on a text, steered or not."""

from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from server.api.looking import Looking
from server.api.route import StrictRoute
from server.engines.touching import count_touched
from server.identity.principal import CURRENT
from server.requests.gates import Decided
from server.requests.lens import SITE, Map, look
from server.requests.policy_gate import check_lens
from server.requests.reading import Text, positions_in
from server.requests.receipt import Outcome, Receipt, receipt
from server.requests.state import ServerState, State
from server.text.prompts import Prompt
from steering.language.errors import ArtifactMismatch, InvalidRequest, Path, TrimtabError
from steering.language.fields import ArtifactRef, Position
from steering.language.layers import Layers
from steering.language.spec import Steering
from steering.programs.layers import explicit_layers

router = APIRouter(tags=["reading"], route_class=StrictRoute)
MAX_ROWS = 4096

Spelling = Annotated[str, Field(min_length=1, max_length=256)]


class LensRequest(BaseModel):
    """A text to look into."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str = Field(min_length=1, max_length=256, description="Base model, or base:preset.")
    input: Text = Field(description="Text, token ids or a conversation up to where the "
                                               "assistant speaks.")
    lens: Literal["logit"] | ArtifactRef = Field(
        default="logit", description='"logit", or a tuned lens of the library (POST /v1/extract/tuned_lens).')
    layers: Layers = Field(default="all", description="Layers to look at.")
    positions: Annotated[list[Position], Field(min_length=1, max_length=4096)] | None = Field(
        default=[-1], description="Tokens to look at, negative ones from the end; null: all.")
    top_k: int = Field(default=5, ge=0, le=100, description="Likeliest tokens to list.")
    groups: dict[Annotated[str, Field(min_length=1, max_length=64)],
                 Annotated[list[Spelling], Field(min_length=1, max_length=64)]] = Field(
        default={}, max_length=64, description='Words of which every spelling counts, by their first token: {"yes": '
        '[" yes", "yes", " Yes"]}. A token that follows other text mostly begins with a space.')
    steering: Steering = Field(default=Steering(), description="What to do to the model meanwhile. All tokens are "
                              "prompt to scopes.")


class LensToken(BaseModel):
    id: int
    text: str
    logprob: float


class GroupReading(BaseModel):
    logprob: float = Field(description="Of all spellings together.")
    rank: int = Field(description="Of the best spelling, from 0.")
    spelling: str = Field(description="The best one.")


class LensRow(BaseModel):
    entropy: float = Field(description="In nats.")
    top: list[LensToken] = Field(description="Likeliest next tokens.")
    groups: dict[str, GroupReading]


class LensPosition(LensRow):
    position: int = Field(description="From the start.")
    token: str = Field(description="The token that is there.")


class LensLayer(BaseModel):
    layer: int
    positions: list[LensPosition]


class LensReading(BaseModel):
    model: str
    lens: str = Field(description='"logit", or the reference of the tuned lens with version.')
    tokens: int = Field(description="Length of the text.")
    layers: list[LensLayer]
    first_tokens: dict[str, dict[str, str]] = Field(
        description="Per group and spelling, the token it was read by: all of it where the vocabulary has it.")
    steering: Receipt


@router.post("/v1/lens")
async def read_lens(body: LensRequest, request: Request, state: State) -> LensReading:
    """What each layer of the model would say next, had it to speak from there."""
    check_lens(CURRENT.get().policies, body.lens)
    looking = Looking(body, request, state)
    state = looking.state
    async with looking.begin():
        tuned = None if body.lens == "logit" else await state.pools.complete(
            lambda: _map(body.lens, state))
        groups = await state.texts.run(lambda: _groups(body, state), sum(
            len(spelling) for spellings in body.groups.values() for spelling in spellings))
    prompt = looking.prompt
    positions = positions_in(len(prompt.token_ids), body.positions)
    layers = _layers(body.layers, tuned, state)
    if len(positions) * len(layers) > MAX_ROWS:
        raise InvalidRequest(f"{len(positions)} positions at {len(layers)} layers are more than {MAX_ROWS} readings",
                             param="positions", fix="Look at fewer.")
    # Of the passes that read the rows, each has as many tokens as it reads.
    async with looking.run(len(prompt.token_ids) + len(positions) * len(layers)) as decided:
        seen = await look(state.engine, prompt.token_ids, layers, positions, decided.program, tuned, prompt.roles,
                          read=lambda rows: [_row(one, body.top_k, groups, state) for one in rows])
    vocabulary = state.vocabulary
    return LensReading(
        model=body.model, lens="logit" if tuned is None else tuned.ref, tokens=len(prompt.token_ids),
        layers=[LensLayer(layer=layer, positions=[
            LensPosition(position=position, token=vocabulary.token_text(prompt.token_ids[position]),
                         **row.model_dump()) for position, row in zip(seen.positions, seen.layers[layer], strict=True)])
            for layer in layers],
        first_tokens={name: {spelling: vocabulary.token_text(token) for spelling, token in spellings.items()}
                      for name, spellings in groups.items()},
        steering=receipt(looking.plan, [_outcome(prompt, decided)], state.engine_name))


def _map(ref: str, state: ServerState) -> Map:
    """The tuned lens. Raises NotFound, ArtifactMismatch."""
    try:
        source = state.library.source(ref)
    except TrimtabError as error:
        raise error.about("lens") from None
    facts = state.engine.facts
    width = next(iter(source.payload.layers.values())).get("scale", torch.empty(0)).shape[-1]
    if source.payload.kind != "diagonal" or source.site != SITE or width != facts.d_model:
        raise ArtifactMismatch(f"{source.ref} is no lens of this model: a lens is a diagonal map at {SITE} of width "
                               f"{facts.d_model}", param="lens", fix="Make one with POST /v1/extract/tuned_lens.")
    if source.fingerprint is not None and source.fingerprint != facts.fingerprint:
        raise ArtifactMismatch(f"{source.ref} was made on {source.model_id or 'another model'}", param="lens",
                               fix="Make one on this model.")
    return Map(source.ref, source.payload.layers)


def _layers(wanted: Layers, tuned: Map | None, state: ServerState) -> list[int]:
    facts = state.engine.facts
    layers = sorted(explicit_layers(wanted, facts))
    for layer in (*layers, facts.num_layers - 1):
        facts.check_site(SITE, layer, "layers")
    missing = [n for n in layers if tuned is not None and n not in tuned.layers and n != facts.num_layers - 1]
    if missing and tuned is not None:
        raise InvalidRequest(f"{tuned.ref} has no map for layer {missing[0]}", param="layers",
                             fix=f"Layers it has: {', '.join(map(str, tuned.layers))}.")
    return layers


def _first(spelling: str, where: Path, state: ServerState) -> int:
    ids = state.vocabulary.encode(spelling, special_tokens=False)
    if not ids:
        raise InvalidRequest("the spelling has no token", param=where)
    return ids[0]


def _groups(body: LensRequest, state: ServerState) -> dict[str, dict[str, int]]:
    return {name: {spelling: _first(spelling, ("groups", name, n), state) for n, spelling in enumerate(spellings)}
            for name, spellings in body.groups.items()}


def _row(logprobs: torch.Tensor, top_k: int, groups: dict[str, dict[str, int]], state: ServerState) -> LensRow:
    """What is told of log-probabilities `[vocab_size]`."""
    values, ids = logprobs.topk(min(top_k, len(logprobs)))
    top = [LensToken(id=i, text=state.vocabulary.token_text(i), logprob=p)
           for i, p in zip(ids.tolist(), values.tolist(), strict=True)]
    readings: dict[str, GroupReading] = {}
    for name, spellings in groups.items():
        best = max(spellings, key=lambda spelling: float(logprobs[spellings[spelling]]))
        # Spellings that begin with the same token count once.
        together = logprobs[torch.tensor(sorted(set(spellings.values())))].logsumexp(dim=0)
        readings[name] = GroupReading(logprob=float(together), spelling=best,
                                      rank=int((logprobs > logprobs[spellings[best]]).sum()))
    entropy = -float(torch.where(logprobs.isneginf(), 0.0, logprobs.exp() * logprobs).sum())
    return LensRow(entropy=entropy, top=top, groups=readings)


def _outcome(prompt: Prompt, decided: Decided) -> Outcome:
    program = decided.program
    touch: Any = None
    if program is not None and program.acting:
        touch = program.touch(prompt.token_ids, 0, prompt.roles)
    touched = count_touched(program, touch, prompt.token_ids, len(prompt.token_ids))
    return Outcome(0, prompt.token_ids, [], prompt.roles, touched, decided)
