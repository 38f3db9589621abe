"""How a choice begins in the engine: where something acts, under the kill switch, and guarded if the plan says so."""

from collections.abc import Sequence
from dataclasses import replace

from server.engines.base import Completion
from server.engines.data import Contrast, Generation, Sampling
from server.requests.gates import Decided
from server.requests.guard import GuardedCompletion
from server.requests.plan import Plan
from server.requests.state import ServerState
from server.requests.switched import SwitchedCompletion
from steering.language.errors import InvalidSpec
from steering.programs.program import Program


def check_guarded(sampling: Sampling, state: ServerState) -> None:
    """Raises InvalidSpec where the engine cannot make a completion in parts, as guards need it."""
    if "resume" not in state.engine.features:
        raise InvalidSpec(f"the engine {state.engine_name} cannot weaken the steering of a running completion, so "
                          "specs with a guard are refused", param=("steering", "guard"), fix="Leave guards out.")
    for name in state.engine.not_resumed:
        if getattr(sampling, name):
            field = name if sampling.grammar is None or name != "grammar" else sampling.grammar.param
            raise InvalidSpec(f"a guard does not go with {field} on the engine {state.engine_name}",
                              param=("steering", "guard"), fix="Leave one of them out.")


def check_contrast(state: ServerState) -> None:
    """Raises InvalidSpec where the engine cannot run two programs in step."""
    if "contrast" not in state.engine.features:
        raise InvalidSpec(f"the engine {state.engine_name} cannot keep two runs in one step, so contrasts are refused",
                          param=("steering", "contrast"), fix="Leave the contrast out, or serve with the embedded "
                          "engine.")


def begin(state: ServerState, plan: Plan, obeys: bool, generation: Generation, decided: Decided) -> Completion:
    """A choice in the engine; where something acts, under the kill switch, and guarded where the plan says so."""
    program = decided.program
    if plan.contrast is not None and decided.weak is not None:
        generation = replace(generation, contrast=Contrast(decided.weak.program, plan.contrast.alpha,
                                                           plan.contrast.beta))
    elif program is None or not program.acting:
        return state.engine.generate(generation)
    closed = [j for j, decision in decided.gates.items() if not decision.open]

    async def weaken(factors: Sequence[float]) -> Program:
        return await state.pools.complete(lambda: state.planner.weakened(plan, closed, list(factors)))

    def steered() -> Completion:
        if plan.guards:
            return GuardedCompletion(state.engine, generation, plan.guards, weaken, state.guard_metrics)
        return state.engine.generate(generation)

    if not obeys:
        return steered()
    return SwitchedCompletion(state.engine, generation, program, steered, state.kill_switch,
                              ends=plan.required or state.settings.kill_switch_running == "end")
