"""What the loaded model offers, the language of specs, and the metrics."""

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.api.route import StrictRoute
from server.api.specschema import spec_schema
from server.requests.state import State
from server.text.vocabulary import Vocabulary
from steering.language.fields import MAX_INTERVENTIONS
from steering.models.massive import RATIO, Massive
from steering.ops import operations

router = APIRouter(tags=["capabilities"], route_class=StrictRoute)


@router.get("/v1/capabilities")
def show_capabilities(state: State) -> dict[str, Any]:
    """Sites and ops of the loaded model as the self-test of this start proved them, and the limits of this server."""
    settings, thought = state.settings, state.dialect.thought
    return {
        **state.engine.capabilities(),
        "model_name": settings.model_name,
        # Of a request on this server; the model's own may be more than the engine's cache holds.
        "context_length": state.engine.max_sequence_tokens,
        "model_context_length": state.engine.facts.context_length,
        "vocab_size": state.vocabulary.vocab_size,
        # How the model writes tool calls, and the marks around its thoughts; null where it has none.
        "tool_calls": None if state.dialect.tools is None else state.dialect.tools.name,
        "reasoning": None if thought is None else [thought.begin, thought.end],
        # What requests get that leave these out.
        "sampling_defaults": asdict(state.sampling_defaults),
        "structured_outputs": "structured_outputs" in state.engine.features,
        "contrast": "contrast" in state.engine.features,
        "massive_activations": told(state.engine.facts.massive, state.vocabulary),
        "ops": {op.name: {"sites": list(op.sites), "kinds": list(op.kinds),
                          "strength_units": ["raw", "unit", "rel", "sigma"] if op.adds_direction else ["raw"]}
                for op in operations()},
        "limits": {"interventions": MAX_INTERVENTIONS, "slots": settings.num_slots, "n": settings.max_choices,
                   "prompts": settings.max_prompts, "inline_bytes": settings.max_inline_bytes,
                   "body_bytes": settings.max_body_bytes, "upload_bytes": settings.max_upload_bytes},
    }


def told(found: Massive | None, vocabulary: Vocabulary) -> dict[str, Any] | None:
    """What is known of massive activations, whose dims and sizes are per layer; None: nobody could look."""
    if found is None:
        return None
    return {
        "ratio_over": RATIO, "texts": found.texts, "tokens_read": found.positions,
        "layers": {str(layer): {
            "first": {str(dim): value for dim, value in one.first.items()},
            "every": {str(dim): value for dim, value in one.every.items()},
            "ratio": one.ratio, "first_norm": one.first_norm, "norm": one.norm,
        } for layer, one in found.layers.items()},
        "tokens": [{"id": token, "text": vocabulary.decode([token], special_tokens=True), "share": share}
                   for token, share in found.tokens.items()],
    }


@router.get("/v1/spec/schema")
def show_spec_schema() -> dict[str, Any]:
    """JSON schema of the `steering` field."""
    return spec_schema()


@router.get("/version")
async def show_version() -> dict[str, str]:
    """Which Trimtab this is."""
    return {"version": version("trimtab")}


@router.get("/metrics", response_class=Response,
            responses={200: {"content": {"text/plain": {}}, "description": "Prometheus text format."}})
async def show_metrics(state: State) -> Response:
    return Response(await state.pools.watch(lambda: state.metrics.render(state.engine)), media_type=CONTENT_TYPE_LATEST)
