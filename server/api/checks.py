"""`POST /v1/checks/patch`: whether a direction through which a patch works is one that the model itself uses."""

import asyncio
from typing import Annotated, Any, Literal, Self

import torch
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from server.api.library.of_model import OfModel, served
from server.api.route import StrictRoute
from server.background.apart import apart
from server.background.job import Control, Job
from server.engines.weights import Weights
from server.identity.principal import CURRENT
from server.requests.policy_gate import check_job
from server.requests.state import ServerState, State
from server.requests.submitting import submitted
from server.threads import in_thread
from server.workbench.subject import EngineSubject, sample
from steering.language.errors import ArtifactMismatch, InvalidPayload, InvalidRequest, TrimtabError
from steering.language.fields import ArtifactRef, Finite, Layer, Position
from steering.models.facts import ModelFacts
from vectors.extract.subject import Prompt, Tokens, encoded, first_token
from vectors.extract.trial.effort import seconds
from vectors.patching.run import Pair, Wanted, check

router = APIRouter(prefix="/v1/checks", tags=["checks"], route_class=StrictRoute)
# What an output projection does not see it does not see at all.
EXACT = 1e-6
Numbers = Annotated[list[Finite], Field(min_length=1, max_length=2**17)]
Answer = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class CheckedPair(BaseModel):
    """Two prompts that differ in one thing, and what each is answered with."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    base: Prompt = Field(description="The run that is patched: text, token ids or messages.")
    source: Prompt = Field(description="The run whose activation is put in.")
    base_answer: Answer = Field(description="What the base is answered with, by its first token; mostly with the space "
                                "before it.")
    source_answer: Answer = Field(description="What the source is answered with.")
    base_position: Position = Field(default=-1, description="Token of the base that is patched.")
    source_position: Position = Field(default=-1, description="Token of the source whose activation is taken.")


class PatchCheckBody(BaseModel):
    """A direction at a place, and pairs to patch along it."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    site: Literal["mlp_act", "head_out", "resid_pre", "resid_post"] = Field(description="Where.")
    layer: Layer = Field(description="At which layer.")
    artifact: ArtifactRef | None = Field(default=None, description="A vector, a subspace or a manifold (its subspace) "
                                         "of the library with numbers for the layer.")
    vector: Numbers | None = Field(default=None, description="The direction itself, of any length, instead.")
    basis: Annotated[list[Numbers], Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="Several directions instead; they need not be orthonormal.")
    pairs: Annotated[list[CheckedPair], Field(min_length=1, max_length=512)] = Field(
        description="Pairs that the direction was not found on.")
    readers: Annotated[list[Annotated[str, StringConstraints(max_length=40)]], Field(max_length=128)] = Field(
        default=[], description="In the residual stream: whose row space is the visible part. unembedding, "
        "attention.LAYER, mlp.LAYER. At mlp_act and head_out it is the output projection of the layer.")
    tolerance: float = Field(default=0.05, gt=0, lt=1, description="In the residual stream: what readers see less than "
                             "this share of their largest singular value is invisible.")
    draws: int = Field(default=20, ge=20, le=200, description="Random directions.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Of the draws.")

    @model_validator(mode="after")
    def _one_direction(self) -> Self:
        if sum(given is not None for given in (self.artifact, self.vector, self.basis)) != 1:
            raise ValueError("give exactly one of artifact, vector and basis")
        residual = self.site.startswith("resid")
        if residual and not self.readers:
            raise ValueError('in the residual stream readers say what is visible; give ["unembedding"] or those of '
                             'later blocks, "attention.4" say')
        if self.readers and not residual:
            raise ValueError(f"{self.site} is read by the output projection of its layer alone; leave readers out")
        return self


@router.post("/patch", status_code=202)
async def create_patch_check(body: PatchCheckBody, state: State, model: OfModel = None) -> Job:
    """Start the job. Its result is the report: base runs patched along the direction, along the part of it that the
    readers see, along the part that they do not, by the whole activation and along random directions, with a verdict
    (faithful, illusory or no_effect) and the rule by which it was found."""
    state = served(model, state)
    check_job(CURRENT.get().policies, body.artifact, op="patch", site=body.site, reads=True,
              param=("artifact",) if body.artifact is not None else ("site",))
    given = next((field for field in ("vector", "basis") if getattr(body, field) is not None), None)
    if given is not None:
        CURRENT.get().check("infer_raw", "steering with numbers that the request itself gives", (given,))
    subject = EngineSubject(state, asyncio.get_running_loop())
    wanted = await in_thread(_wanted, body, state)
    pairs = await in_thread(_pairs, body.pairs, subject)
    estimate = await in_thread(lambda: seconds(_tokens(pairs, body.draws), subject, sample(subject)))

    async def work(control: Control) -> dict[str, Any]:
        subject.control = control
        found = await apart(lambda: check(pairs, wanted, subject, control.progress))
        return found.model_dump(mode="json")

    return await submitted(state, "patch check", work, about=body.artifact or "inline numbers", estimate_s=estimate)


def _wanted(body: PatchCheckBody, state: ServerState) -> Wanted:
    """Raises TrimtabError: the direction does not fit, or what reads it cannot be had."""
    facts = state.engine.facts
    layer = facts.check_layer(body.layer, "layer")
    facts.check_site(body.site, layer, "site")
    directions = _directions(body, layer, facts, state)
    readers = Weights(state.settings.model, facts).readers(body.site, layer, body.readers)
    tolerance = body.tolerance if body.site.startswith("resid") else EXACT
    return Wanted(body.site, layer, directions, readers, tolerance, body.draws, body.seed)


def _directions(body: PatchCheckBody, layer: int, facts: ModelFacts, state: ServerState) -> torch.Tensor:
    width = facts.width(body.site)
    if body.artifact is None:
        field, rows = ("vector", [body.vector]) if body.vector is not None else ("basis", body.basis)
        if any(row is None or len(row) != width for row in rows or []):
            raise InvalidPayload(f"{body.site} of the loaded model is {width} wide", param=field)
        found = torch.tensor(rows, dtype=torch.float64)
    else:
        try:
            source = state.library.source(body.artifact)
        except TrimtabError as error:
            raise error.about("artifact") from None
        field, tensors = "artifact", source.payload.layers.get(layer, {})
        if source.site != body.site or source.payload.kind not in ("vector", "subspace", "manifold") or not tensors:
            raise ArtifactMismatch(f"{source.ref} is no direction at {body.site} of layer {layer}", param="artifact",
                                   fix=f"It is a {source.payload.kind} at {source.site} with numbers for the layers "
                                   f"{', '.join(map(str, source.payload.layers))}.")
        if source.fingerprint is not None and source.fingerprint != facts.fingerprint:
            raise ArtifactMismatch(f"{source.ref} was made on {source.model_id or 'another model'}", param="artifact",
                                   fix="Make one on this model.")
        found = (tensors["basis"] if "basis" in tensors else tensors["vector"].unsqueeze(0)).double()
        if found.shape[1] != width:
            raise ArtifactMismatch(f"{source.ref} is {found.shape[1]} wide, {body.site} {width}", param="artifact")
    if not bool((found.norm(dim=1) > 0).all()):
        raise InvalidPayload("a direction is zero", param=field, fix="Give directions that point somewhere.")
    return found


def _pairs(given: list[CheckedPair], subject: EngineSubject) -> list[Pair]:
    """Raises TrimtabError: naming the pair and the field."""
    found = []
    for n, pair in enumerate(given):
        base, source = (encoded(subject, text, ("pairs", n, field)) for field, text in (
            ("base", pair.base), ("source", pair.source)))
        answers = [first_token(subject, answer, ("pairs", n, field)) for field, answer in (
            ("base_answer", pair.base_answer), ("source_answer", pair.source_answer))]
        if answers[0] == answers[1]:
            raise InvalidRequest("both answers begin with the same token, so they cannot be told apart",
                                 param=("pairs", n, "source_answer"), fix="Leave the pair out.")
        found.append(Pair(base, source, _position(base, pair.base_position, ("pairs", n, "base_position")),
                          _position(source, pair.source_position, ("pairs", n, "source_position")), *answers))
    return found


def _position(text: Tokens, position: int, where: tuple[str | int, ...]) -> int:
    if not -len(text) <= position < len(text):
        raise InvalidRequest(f"position {position} lies outside of {len(text)} tokens", param=where)
    return position % len(text)


def _tokens(pairs: list[Pair], draws: int) -> int:
    """That go through the model."""
    return sum((6 + draws) * len(pair.base) + 2 * len(pair.source) for pair in pairs)
