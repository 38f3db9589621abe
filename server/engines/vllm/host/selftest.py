"""Proof, at start, that every hooked place is reached in the graph that will serve.

A stale compiled graph loads without an error and does nothing. Therefore a strong push at each (site, layer) must move
the log-probabilities of a short prompt, and the same prompt without a program must not move. A place whose push moves
nothing stops the start, because the server must not offer what it cannot do.
"""

from dataclasses import replace

import torch

from server.engines.vllm.host.passes import Pass
from server.engines.vllm.host.reading import engine_dtype
from server.engines.vllm.host.serving import Serving
from steering.acting.selftest import PROMPT_LENGTH
from steering.language.errors import UnsupportedModel
from steering.language.scope import Scope
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.ops.base import Row
from steering.programs.program import Applied, Compiled, Program

# Log-probabilities of one prompt differ by rounding from batch to batch; a push must move them by far more.
FLOOR = {"float32": 1e-3}
COARSE_FLOOR = 0.1
ATTEMPTS = 3


async def run_selftest(serving: Serving, facts: ModelFacts) -> ModelFacts:
    """The facts, offering what was reached.

    Raises:
        UnsupportedModel: a hooked place is not reached, or an untouched request moves.
    """
    # In a pipeline each rank has hooked its own layers.
    places = list(dict.fromkeys((site, int(layer)) for described in serving.connection.described
                                for site, layer in described["places"]))
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(facts.vocab_size, (PROMPT_LENGTH,), generator=generator).tolist()
    floor = FLOOR.get(engine_dtype(serving.options), COARSE_FLOOR)
    plain = await _scores(serving, prompt, None)
    missed: list[str] = []
    for start in range(0, len(places), serving.options.slots):
        part = places[start:start + serving.options.slots]
        pushed = [await _moved(serving, facts, prompt, place, plain, generator, floor) for place in part]
        missed += [f"{site}[{layer}]" for (site, layer), moved in zip(part, pushed, strict=True) if not moved]
    if missed:
        raise UnsupportedModel(
            f"{facts.model_id}: a push at {', '.join(missed)} changes nothing", param="model",
            fix="If vLLM took a compiled graph from its cache, remove that cache (VLLM_CACHE_ROOT) and start again.")
    again = await _scores(serving, prompt, None)
    if float((again - plain).abs().max()) > floor:
        raise UnsupportedModel(f"{facts.model_id}: steering one request changes another", param="model")
    sites: dict[Site, tuple[int, ...]] = {}
    for site, layer in places:
        sites[site] = (*sites.get(site, ()), layer)
    return replace(facts, sites={site: tuple(sorted(layers)) for site, layers in sites.items()})


async def _moved(serving: Serving, facts: ModelFacts, prompt: list[int], place: tuple[Site, int], plain: torch.Tensor,
                 generator: torch.Generator, floor: float) -> bool:
    for attempt in range(ATTEMPTS):
        found = await _scores(serving, prompt, _push(serving, facts, place, attempt, generator))
        if float((found - plain).abs().max()) > floor:
            return True
    return False


async def _scores(serving: Serving, prompt: list[int], program: Program | None) -> torch.Tensor:
    given = Pass(prompt, len(prompt), program, None, keep_from=0)
    await serving.measuring.run(given, serving.slots)
    (chosen,), _ = await serving.connection.first_answer("trimtab_scores", given.tag, prompt, False, None)
    return torch.frombuffer(bytearray(chosen), dtype=torch.float32)[:-1]


def _push(serving: Serving, facts: ModelFacts, place: tuple[Site, int], attempt: int, generator: torch.Generator
          ) -> Program:
    """A change that must show, stronger with each attempt: what a late MLP adds may be small beside the stream. As far
    as the limit on steps lets it.

    At the router: force one expert, in the next attempt another one.
    """
    site, width = place[0], facts.width(place[0])
    strength = min(8.0**attempt, serving.options.step_limit.largest / 2)
    if site == "router":
        force = torch.zeros(width)
        force[attempt % width] = 1.0
        row = Row("route", {"bias": torch.zeros(width), "gate": torch.ones(width), "force": force,
                            "renormalise": torch.tensor(0.0)})
    else:
        direction = torch.randn(width, generator=generator)
        row = Row("add_norm_match", {"delta": strength * direction / direction.norm()})
    return Program((Compiled("add", Scope(), {place: row}, Applied(None, "add", (), (), {}, {})),))
