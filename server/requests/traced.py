"""A generation as a trace tells it, by the conventions for generative models."""

from server.effects.outcomes import Outcomes
from server.observability.tracing import evaluation, record, traced
from server.requests.generate import Run
from server.requests.plan import Plan
from server.requests.state import ServerState


def trace_generation(run: Run, plan: Plan, state: ServerState, *, operation: str, asked: str, request_id: str,
                     began: int, graded: Outcomes | None) -> None:
    """
    Args:
        operation: "chat" or "text_completion".
        asked: name of the model in the request.
        began: nanoseconds since 1970.
        graded: by graders that the request asked for.
    """
    if not traced():
        return
    model = state.settings.model_name
    acting = [] if plan.program is None else plan.program.compiled
    record(f"{operation} {model}", began, attributes={
        "gen_ai.operation.name": operation, "gen_ai.provider.name": "trimtab", "gen_ai.request.model": asked,
        "gen_ai.response.model": model, "gen_ai.response.id": request_id,
        "gen_ai.request.choice.count": len(run.choices), "gen_ai.usage.input_tokens": run.prompt_tokens,
        "gen_ai.usage.output_tokens": run.completion_tokens, "trimtab.engine": state.engine_name,
        "trimtab.presets": tuple((plan.presets or {}).values()),
        "trimtab.artifacts": tuple(one.applied.artifact or "inline" for one in acting),
    }, events=[evaluation(grader.grader, label=choice.outcome) for grader in ([] if graded is None else graded.graders)
               for choice in grader.choices])
