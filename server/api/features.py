"""`POST /v1/features`: which features of an SAE are active in a text, steered or not."""

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from server.api.looking import Looking
from server.api.route import StrictRoute
from server.engines.data import CaptureRequest
from server.engines.touching import count_touched
from server.identity.principal import CURRENT
from server.requests.features import Seen, find
from server.requests.policy_gate import check_artifact_read
from server.requests.reading import Text, positions_in
from server.requests.receipt import Outcome, Receipt, receipt
from server.requests.state import ServerState, State
from server.threads import in_thread
from steering.artifacts.dictionary import Dictionary
from steering.language.errors import ArtifactMismatch, InvalidRequest, TrimtabError
from steering.language.fields import ArtifactRef, Index, Position
from steering.language.spec import Steering
from steering.language.vocabulary import Site
from steering.programs.reading import compile_reader

router = APIRouter(tags=["reading"], route_class=StrictRoute)
MAX_POSITIONS = 4096
# Products of one number with another that a request may take, some seconds on two cores.
MOST_WORK = 2**37


class FeaturesRequest(BaseModel):
    """A text to look into."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str = Field(min_length=1, max_length=256, description="Base model, or base:preset.")
    input: Text = Field(description="Text, token ids or a conversation up to where the assistant speaks.")
    artifact: ArtifactRef = Field(description="An SAE of the library.")
    layer: Annotated[int, Field(ge=-512, le=4096)] | None = Field(
        default=None, description="Which layer, of an SAE with several.")
    positions: Annotated[list[Position], Field(min_length=1, max_length=MAX_POSITIONS)] | None = Field(
        default=None, description="Tokens to look at, negative ones from the end; null: all.")
    top_k: int = Field(default=10, ge=0, le=100, description="Strongest features to list.")
    features: Annotated[list[Index], Field(max_length=64)] = Field(
        default=[], description="Features whose values are told at every token.")
    steering: Steering = Field(default=Steering(), description="What to do to the model meanwhile. All tokens are "
                              "prompt to scopes.")


class FeatureValue(BaseModel):
    feature: int
    value: float = Field(description="To the bit as an edit of the feature finds it.")


class FeaturesPosition(BaseModel):
    position: int = Field(description="From the start.")
    token: str = Field(description="The token that is there.")
    active: int = Field(description="Features that are not 0.")
    explained: float = Field(description="What the reconstruction leaves of the squared length, taken from 1.")
    top: list[FeatureValue] = Field(description="Strongest first.")
    features: list[FeatureValue] = Field(description="Those that were asked for, in their order.")


class FeatureSummary(BaseModel):
    feature: int
    largest: float
    mean: float = Field(description="Over the tokens that were looked at.")
    tokens: int = Field(description="Tokens on which it is active.")


class FeaturesReading(BaseModel):
    model: str
    artifact: str = Field(description="Reference with version.")
    site: Site
    layer: int
    tokens: int = Field(description="Length of the text.")
    explained: float | None = Field(description="Share of the variance of the tokens that were looked at; null for "
                                    "one.")
    top: list[FeatureSummary] = Field(description="The features with the largest values.")
    positions: list[FeaturesPosition]
    steering: Receipt


@router.post("/v1/features")
async def read_features(body: FeaturesRequest, request: Request, state: State) -> FeaturesReading:
    """Which features of an SAE are active in a text, and how strongly."""
    check_artifact_read(CURRENT.get().policies, body.artifact)
    looking = Looking(body, request, state)
    state = looking.state
    async with looking.begin():
        ref, site, layer, dictionary = await state.pools.complete(lambda: _dictionary(body, state))
    prompt = looking.prompt
    positions = positions_in(len(prompt.token_ids), body.positions)
    work = 2 * len(positions) * dictionary.tensors["encoder"].numel()
    if len(positions) > MAX_POSITIONS or work > MOST_WORK:
        raise InvalidRequest(f"{len(positions)} positions of {dictionary.num_features} features are more than one "
                             "request may look at", param="positions", fix="Look at fewer.")
    async with looking.run(len(prompt.token_ids)) as decided:
        wanted = CaptureRequest(prompt.token_ids, {site: [layer]}, positions, roles=prompt.roles)
        captured = (await state.engine.capture([wanted], decided.program))[0][site][layer]
        seen = await in_thread(find, dictionary, captured.float(), body.top_k, body.features)
    program = decided.program
    touch = None if program is None or not program.acting else program.touch(prompt.token_ids, 0, prompt.roles)
    touched = count_touched(program, touch, prompt.token_ids, len(prompt.token_ids))
    outcome = Outcome(0, prompt.token_ids, [], prompt.roles, touched, decided)
    return FeaturesReading(
        model=body.model, artifact=ref, site=site, layer=layer, tokens=len(prompt.token_ids), explained=seen.explained,
        top=[FeatureSummary(feature=one.feature, largest=one.largest, mean=one.mean, tokens=one.tokens)
             for one in seen.top],
        positions=_positions(seen, positions, [state.vocabulary.token_text(prompt.token_ids[n]) for n in positions],
                             body.features),
        steering=receipt(looking.plan, [outcome], state.engine_name))


def _dictionary(body: FeaturesRequest, state: ServerState) -> tuple[str, Site, int, Dictionary]:
    """Reference, site, layer and numbers. Raises NotFound, ArtifactMismatch, InvalidRequest: naming the field."""
    facts = state.engine.facts
    try:
        source = state.library.source(body.artifact)
        if source.payload.kind != "sae":
            raise ArtifactMismatch(f"{source.ref} is a {source.payload.kind}, not an SAE", fix="Name one.")
        for feature in body.features or [0]:
            reader = compile_reader(source, facts, feature=feature)
    except TrimtabError as error:
        raise error.about("features" if error.path == ("feature",) else "artifact") from None
    layers = list(reader.layers)
    if body.layer is None and len(layers) > 1:
        raise InvalidRequest(f"{source.ref} is of several layers", param="layer",
                             fix=f"Name one of {', '.join(map(str, layers))}.")
    layer = layers[0] if body.layer is None else facts.check_layer(body.layer, "layer")
    if layer not in reader.layers:
        raise InvalidRequest(f"{source.ref} has no numbers for layer {layer}", param="layer",
                             fix=f"Name one of {', '.join(map(str, layers))}.")
    return source.ref, source.site, layer, Dictionary(reader.layers[layer])


def _positions(seen: Seen, positions: list[int], tokens: list[str], asked: list[int]) -> list[FeaturesPosition]:
    return [FeaturesPosition(
        position=position, token=token, active=one.active, explained=one.explained,
        top=[FeatureValue(feature=feature, value=value) for feature, value in one.top],
        features=[FeatureValue(feature=feature, value=value) for feature, value in zip(asked, one.asked, strict=True)])
        for position, token, one in zip(positions, tokens, seen.tokens, strict=True)]
