"""Lengths of the columns that read a site, for sparsifications that bring no numbers of their own.

They are read from the checkpoint when a request first needs them and are kept: one number for each channel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from threading import Lock

from torch import Tensor

from server.engines.weights import Weights
from server.requests.plan import Planned
from steering.language.errors import InvalidSpec, TrimtabError
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.ops import get_operation
from steering.ops.sparsify import NEEDS, SparsifyOptions
from steering.programs.choices import site_of
from steering.programs.inline import parse_options
from steering.programs.layers import explicit_layers

# Weights of one request that are read, at most. More belong into an artifact, which is made once.
MOST_NUMBERS = 2**31


class Columns:
    """Methods block and may be called by several threads."""

    def __init__(self, model: str, facts: ModelFacts) -> None:
        self._model, self._facts = model, facts
        self._known: dict[tuple[Site, int], Tensor] = {}
        self._lock = Lock()

    def of(self, site: Site, layers: Sequence[int]) -> Mapping[int, Tensor]:
        """By layer, `[width]` float32.

        Raises:
            InvalidSpec: they are of more weights than a request may read.
            UnsupportedModel, UnsupportedSite: the weights cannot be read, or there are none of that place.
        """
        facts = self._facts
        with self._lock:
            missing = [layer for layer in layers if (site, layer) not in self._known]
            if len(missing) * facts.width(site) * facts.d_model > MOST_NUMBERS:
                raise InvalidSpec(f"the columns of {len(missing)} layers would have to be read from the weights",
                                  param=("options", "method"), fix="Make an artifact: trimtab measure sparsity.")
            weights = Weights(self._model, facts) if missing else None
            for layer in missing:
                assert weights is not None
                [matrix] = weights.readers(site, layer, []).values()
                self._known[site, layer] = matrix.norm(dim=0)
            return {layer: self._known[site, layer] for layer in layers}


def with_columns(item: Planned, columns: Columns, facts: ModelFacts) -> Planned:
    """The step with the lengths of columns that it needs and nobody gave. Raises as `Columns.of`."""
    intervention = item.intervention
    if intervention.op != "sparsify" or item.source is not None or intervention.inline is not None:
        return item
    try:
        operation = get_operation("sparsify")
        options: SparsifyOptions = parse_options(operation, intervention.options)
        if NEEDS[options.method] != ("norm",):
            return item
        site, wanted = site_of(intervention, None, operation), intervention.layers
        layers = facts.sites.get(site, ()) if wanted is None or wanted == "all" else explicit_layers(wanted, facts)
        for layer in layers:
            facts.check_site(site, layer, "layers")
        return replace(item, captured=columns.of(site, layers))
    except TrimtabError as error:
        raise item.place(error, error.path) from None
