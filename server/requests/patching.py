"""Patches from another run: one step for each token, and its numbers read from captured activations.

They are read when a request is planned, and belong to it from then on, so that it does not matter what becomes of the
activations while it runs.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from server.activations.rows import Row, read_row
from server.activations.store import Activations, StoredActivations
from server.requests.plan import Planned
from steering.artifacts.source import Source
from steering.language.errors import ArtifactMismatch, InvalidSpec, PayloadTooLarge, TrimtabError
from steering.language.scope import PromptSelection, Scope
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.ops import get_operation
from steering.ops.patch import PatchOptions
from steering.programs.choices import site_of
from steering.programs.inline import parse_options
from steering.programs.layers import explicit_layers


def by_token(item: Planned) -> list[Planned]:
    """The step itself, or of a patch that takes several tokens of its source one step for each.

    Raises:
        InvalidSpec: it does not say which token goes where.
    """
    if item.intervention.captured is None:
        return [item]
    try:
        options = _options(item)
        pairs = _pairs(options.positions or [], item.intervention.scope, item.intervention.model_fields_set)
    except TrimtabError as error:
        raise item.place(error, error.path) from None
    return [item] if not pairs else [_single(item, source, base) for source, base in pairs]


def _pairs(positions: Sequence[int], scope: Scope, given: set[str]) -> list[tuple[int, int]]:
    """Position of the source and of the prompt, where there are several."""
    if "scope" not in given or not {"prompt", "generation"} <= scope.model_fields_set:
        raise InvalidSpec("a patch from another run has to say which tokens it replaces", param="scope",
                          fix='Give both parts of the scope: {"prompt": {"positions": [-1]}, "generation": "none"}.')
    if len(positions) < 2:
        return []
    prompt = scope.prompt
    if not isinstance(prompt, PromptSelection) or set(prompt.model_dump(exclude_none=True)) != {"positions"} \
            or scope.generation != "none":
        raise InvalidSpec(f"{len(positions)} tokens of the source need as many positions of the prompt, and nothing "
                          "else, to go to", param="scope",
                          fix='Give {"prompt": {"positions": [...]}, "generation": "none"}.')
    bases = prompt.positions or []
    if len(bases) != len(positions):
        raise InvalidSpec(f"{len(positions)} tokens of the source do not go to {len(bases)} positions",
                          param=("scope", "prompt", "positions"), fix="Give as many of the one as of the other.")
    return list(zip(positions, bases, strict=True))


def _single(item: Planned, source: int, base: int) -> Planned:
    intervention = item.intervention
    fields = {name: getattr(intervention, name) for name in intervention.model_fields_set}
    fields["options"] = {**intervention.options, "positions": [source]}
    fields["scope"] = Scope(prompt=PromptSelection(positions=[base]), generation="none")
    # Made anew and not copied, because a copy would take the digest along.
    return replace(item, intervention=type(intervention)(**fields))


def with_rows(item: Planned, store: StoredActivations, facts: ModelFacts, most_bytes: int) -> Planned:
    """The step with the activation that it takes from its source. Blocks.

    Raises:
        NotFound: there is no such source, for whoever asks.
        ArtifactMismatch: it is of other weights, of another site or other layers.
        PayloadTooLarge, InvalidSpec, InvalidRequest, InvalidPayload, UnsupportedSite, StorageUnavailable.
    """
    if item.intervention.captured is None:
        return item
    try:
        return replace(item, captured=_read(item, store, facts, most_bytes))
    except TrimtabError as error:
        raise item.place(error, error.path) from None


def _read(item: Planned, store: StoredActivations, facts: ModelFacts, most_bytes: int) -> dict[int, Tensor]:
    options = _options(item)
    assert options.source is not None
    try:
        described = store.find(options.source)
    except TrimtabError as error:
        raise error.about("options", "source") from None
    site = site_of(item.intervention, item.source, get_operation("patch"))
    layers = _layers(item, described, site, item.source, facts)
    size = 4 * facts.width(site) * len(layers)
    if size > most_bytes:
        raise PayloadTooLarge(f"the source's activations at {len(layers)} layers take {size} bytes, and the numbers of "
                              f"one intervention may take {most_bytes}", param="layers",
                              fix="Name fewer layers, or raise max_inline_bytes.")
    row = Row(options.text, options.positions[0] if options.positions else None, options.row)
    try:
        return dict(read_row(store.content(described.id), described, site, layers, row))
    except TrimtabError as error:
        raise error.at("options") if error.path else error from None


def _layers(item: Planned, described: Activations, site: Site, along: Source | None, facts: ModelFacts) -> list[int]:
    """Layers to read. "all" and none mean those of the source."""
    if described.fingerprint != facts.fingerprint:
        raise ArtifactMismatch(f"{described.id} was captured on {described.model} with other weights "
                               f"({described.fingerprint[:12]}, the loaded model is {facts.fingerprint[:12]})",
                               param=("options", "source"), fix="Capture it anew on this model.")
    held = described.sites.get(site)
    if not held:
        raise ArtifactMismatch(f"{described.id} holds nothing of {site}", param=("options", "source"),
                               fix=f"It holds {', '.join(described.sites)}; name that site, or capture {site}.")
    wanted = item.intervention.layers
    if wanted is None and along is not None:
        wanted = along.layers
    if wanted is None or wanted == "all":
        return sorted(held)
    layers = explicit_layers(wanted, facts)
    missing = [layer for layer in layers if layer not in held]
    if missing:
        raise ArtifactMismatch(f"{described.id} holds {site} not of layer {missing[0]}", param="layers",
                               fix=f"Layers that it holds: {', '.join(map(str, sorted(held)))}.")
    return layers


def _options(item: Planned) -> PatchOptions:
    found: PatchOptions = parse_options(get_operation("patch"), item.intervention.options)
    return found
