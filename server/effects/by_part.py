"""Effects of a completion that was made under more than one program, as guarded ones are."""

from server.engines.base import Engine
from server.engines.data import CompareRequest, Comparison
from server.engines.parts import Part, spans
from steering.divergence import Divergence, ResidualShift


async def compare_parts(engine: Engine, request: CompareRequest, parts: list[Part]) -> Comparison:
    """Every part against the untouched model under its own program, joined. One part: as `Engine.compare`."""
    if len(parts) < 2:
        return await engine.compare(request)
    count = len(request.token_ids) - request.prompt_length
    found: list[tuple[slice, Comparison]] = []
    for part, stop in spans(parts, count):
        over = CompareRequest(request.token_ids[:request.prompt_length + stop], request.prompt_length, part.program,
                              request.roles, request.end_ids)
        found.append((slice(part.start, stop), await engine.compare(over)))
    return Comparison(
        total=Divergence.join([c.total.part(rows) for rows, c in found]),
        without=tuple(Divergence.join([c.without[i].part(rows) for rows, c in found])
                      for i in range(len(request.program.compiled))),
        residual=ResidualShift.join([c.residual.part(rows) for rows, c in found]),
        exact=all(c.exact for _, c in found), rerun="apart")
