"""`POST /v1/artifacts/{ref}/port`: an artifact of another checkpoint made to fit the served model."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from server.activations.paired import WholeTexts, whole_texts
from server.api.library.of_model import OfModel, served
from server.api.library.refs import REF
from server.api.route import StrictRoute
from server.background.apart import apart
from server.background.job import Control, Job
from server.identity.principal import CURRENT
from server.requests.policy_gate import check_artifact_read, check_job
from server.requests.state import ServerState, State
from server.requests.submitting import submitted
from server.threads import in_thread
from server.workbench.subject import EngineSubject, sample
from steering.language.errors import ArtifactMismatch, InvalidRequest, TrimtabError
from steering.models.facts import ModelFacts
from vectors.artifact import Artifact, Name
from vectors.extract.trial.effort import seconds
from vectors.library.naming import check_written
from vectors.porting.read import read_rows
from vectors.porting.run import Choice, check_portable, near, port

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"], route_class=StrictRoute)
MOST_TOKENS = 16_384
MOST_LAYERS = 8


class PortBody(BaseModel):
    """Activations of the model that the artifact was made on, and what is to be stored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: Name = Field(description="What is stored is called so; it is of the served model.")
    source: Annotated[str, StringConstraints(max_length=64)] = Field(
        description="Id of activations of the artifact's own model, at its site and layers, of whole texts: captured "
        "here or sent to POST /v1/activations/import. The served model reads the same tokens.")
    method: Choice = Field(default="auto", description="How activations are mapped: orthogonal, ridge or cca; auto: "
                           "what gives most of the variance of texts held out.")
    depth: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="How many layers the source's model has; by default as many as the served one. "
        "Layers are matched by relative depth.")


@router.post(f"/{REF}/port", status_code=202)
async def create_port(ref: str, body: PortBody, state: State, model: OfModel = None) -> Job:
    """Start the job. Its result is the report, with the stored artifact. Vectors, subspaces and probes are ported; what
    has indices of neurons, heads or experts means nothing in another model."""
    state = served(model, state)
    held = CURRENT.get().policies
    check_artifact_read(held, ref)
    check_written(body.name, "name")
    artifact = await in_thread(state.library.resolve, ref)
    check_job(held, body.name, op=artifact.metadata.op, site=artifact.metadata.site, reads=True)
    candidates, texts = await in_thread(_prepared, artifact, body, state)
    subject = EngineSubject(state, asyncio.get_running_loop())
    tokens = sum(map(len, texts.tokens)) * len({n for some in candidates.values() for n in some})
    estimate = await in_thread(lambda: seconds(tokens, subject, sample(subject)))

    async def work(control: Control) -> dict[str, Any]:
        subject.control = control

        def run() -> dict[str, Any]:
            payload = state.library.payload(artifact)
            rows = read_rows(texts.tokens, texts.activations, texts.text, texts.position, artifact.metadata.site,
                             candidates, subject, lambda share, stage: control.progress(share / 2, stage))
            found = port(artifact.ref, artifact.metadata, payload, body.name, rows, candidates, body.method,
                         subject.facts, f"POST /v1/artifacts/{artifact.ref}/port",
                         lambda share, stage: control.progress(0.5 + share / 2, stage))
            control.check()
            stored = state.library.create(found.metadata, found.payload)
            return found.report.model_copy(update={"artifact": stored.ref}).model_dump(mode="json")

        return await apart(run)

    return await submitted(state, "port", work, about=artifact.ref, estimate_s=estimate)


def _prepared(artifact: Artifact, body: PortBody, state: ServerState) -> tuple[dict[int, list[int]], WholeTexts]:
    """Layers of the served model by layer of the artifact, and the texts. Raises TrimtabError."""
    facts, metadata = state.engine.facts, artifact.metadata
    try:
        described = state.activations.find(body.source)
        path = state.activations.content(body.source)
    except TrimtabError as error:
        raise error.about("source") from None
    layers = check_portable(metadata, state.library.payload(artifact), facts)
    if metadata.fingerprint is not None and described.fingerprint != metadata.fingerprint:
        raise ArtifactMismatch(f"{described.id} is of other weights than {artifact.ref}", param="source",
                               fix=f"Capture the texts on {metadata.model_id or 'the model that it was made on'}.")
    if len(layers) > MOST_LAYERS:
        raise InvalidRequest(f"{artifact.ref} acts at {len(layers)} layers; {MOST_LAYERS} are ported at once",
                             param="ref", fix="Store it with fewer default layers.")
    texts = whole_texts(path, described, metadata.site, layers, MOST_TOKENS)
    _check_tokens(texts, facts)
    offered = dict.fromkeys(facts.sites.get(metadata.site, ()))
    if not offered:
        facts.check_site(metadata.site, 0, "ref")
    depth = max(max(layers) + 1, body.depth or facts.num_layers)
    candidates = {layer: near(layer, depth, facts, offered) for layer in layers}
    return candidates, texts


def _check_tokens(texts: WholeTexts, facts: ModelFacts) -> None:
    longest, largest = max(map(len, texts.tokens)), max(map(max, texts.tokens))
    if longest > facts.context_length:
        raise InvalidRequest(f"a text has {longest} tokens; {facts.model_id} takes {facts.context_length}",
                             param="source", fix="Capture shorter texts.")
    if largest >= facts.vocab_size:
        raise InvalidRequest(f"token {largest} is outside of this model's vocabulary of {facts.vocab_size}",
                             param="source", fix="Port between models of one tokenizer.")
