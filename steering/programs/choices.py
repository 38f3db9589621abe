"""The first step of compiling an intervention: what it says, joined with what its artifact says.

Out of it come the op, its options and the sites, checked against one another and against the loaded model. Where the
request and the artifact disagree, the request is refused unless it says that it overrides the artifact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steering.artifacts.source import Resolved, Source
from steering.language.errors import ArtifactMismatch, InvalidSpec, UnsupportedSite
from steering.language.intervention import Intervention
from steering.language.vocabulary import Op, Site
from steering.models.facts import ModelFacts
from steering.ops import get_operation
from steering.ops.base import Operation
from steering.programs.fits import check_width
from steering.programs.inline import parse_options, split_inline

DEFAULT_SITE: Mapping[Op, Site] = {"neuron_mask": "mlp_act", "head_mask": "head_out", "expert_mask": "router",
                                    "sparsify": "mlp_act"}
MULTI_SITES: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out")


@dataclass(frozen=True)
class Chosen:
    """What an intervention does and where: the op with its options, and the sites.

    inline: tensors that the request brings along; empty where it names an artifact.
    multi_site: one direction acts at all of MULTI_SITES, at every layer.
    """

    operation: Operation
    options: Any
    sites: tuple[Site, ...]
    inline: Mapping[str, Any]
    multi_site: bool


def choose(item: Resolved, facts: ModelFacts) -> Chosen:
    """
    Raises:
        InvalidSpec, ArtifactMismatch, UnsupportedSite: naming the field.
    """
    intervention, source = item.intervention, item.source
    operation = get_operation(_op(item))
    tensors: dict[str, Any] = {}
    given = dict(intervention.options)
    if intervention.inline is not None:
        tensors, options = split_inline(intervention.inline, operation)
        twice = sorted(set(options) & set(given))
        if twice:
            raise InvalidSpec(f"option {twice[0]!r} is given in inline and in options", param=("options", twice[0]))
        given |= options
    elif source is not None and source.op == operation.name:
        given = _merged(source.options, given, operation.options.alternatives)
    options = parse_options(operation, given)
    if operation.name == "patch" and options.source is not None and item.captured is None:
        raise InvalidSpec("captured activations are named in the options of an intervention of the request itself",
                          param=("options", "source"), fix='Write {"op": "patch", "options": {"source": "act-..."}}.')
    multi_site = bool(getattr(options, "multi_site", False))
    if multi_site:
        _check_unplaced(intervention)
    sites = MULTI_SITES if multi_site else (site_of(intervention, source, operation),)
    if source is not None:
        check_width(source, sites, facts, "artifact")
        _check_model(intervention, source, facts)
        _check_kind(source, operation)
    return Chosen(operation, options, sites, tensors, multi_site)


def _op(item: Resolved) -> Op:
    intervention, source = item.intervention, item.source
    if intervention.op is not None:
        # Of a patch from another run the artifact says the directions alone, whatever it is meant for.
        meant = None if source is None or item.captured is not None else source.op
        if source is not None and meant is not None and intervention.op != meant and "op" not in intervention.override:
            raise ArtifactMismatch(f"{source.ref} is meant for op {source.op}, not {intervention.op}", param="op",
                                   fix='Leave op out, or add "override": ["op"].')
        return intervention.op
    if source is None:
        raise InvalidSpec("inline numbers need an op", param="op")
    if source.op is None:
        raise ArtifactMismatch(f"{source.ref} is a {source.payload.kind}, which is read and not applied",
                               param="artifact", fix="Name it in monitor, or as the probe of a gate.")
    return source.op


def site_of(intervention: Intervention, source: Source | None, operation: Operation) -> Site:
    """Where an intervention without multi_site acts. Raises ArtifactMismatch, UnsupportedSite."""
    site = intervention.site
    if source is not None:
        if site is not None and site != source.site and "site" not in intervention.override:
            raise ArtifactMismatch(f"{source.ref} was made at {source.site}, not {site}", param="site",
                                   fix='Leave site out, or add "override": ["site"].')
        site = site or source.site
    site = site or DEFAULT_SITE.get(operation.name, "resid_post")
    if site not in operation.sites:
        raise UnsupportedSite(f"op {operation.name} does not act at {site}", param="site",
                              fix=f"Sites of {operation.name}: {', '.join(operation.sites)}.")
    return site


def _merged(own: Mapping[str, Any], given: Mapping[str, Any], alternatives: Sequence[Sequence[str]]
            ) -> dict[str, Any]:
    """Options of the artifact with those of the request on top. If the request gives another mode, the artifact's
    options are dropped, because they belong to its own. Of options that exclude each other only those of the request
    are kept."""
    if any(name in given and given[name] != own.get(name) for name in ("mode", "multi_site")):
        return dict(given)
    chosen = [group for group in alternatives if any(name in given for name in group)]
    dropped = {name for group in alternatives if chosen and group not in chosen for name in group}
    return {**{name: value for name, value in own.items() if name not in dropped}, **given}


def _check_unplaced(intervention: Intervention) -> None:
    if intervention.site is not None:
        raise InvalidSpec(f"multi_site ablation acts at {', '.join(MULTI_SITES)}", param="site",
                          fix="Leave site out, or multi_site.")
    if intervention.layers not in (None, "all"):
        raise InvalidSpec("multi_site ablation acts at every layer", param="layers",
                          fix="Leave layers out; options.source_layer says whose direction is used.")


def _check_model(intervention: Intervention, source: Source, facts: ModelFacts) -> None:
    if "model" in intervention.override:
        return
    if source.fingerprint is not None and source.fingerprint != facts.fingerprint:
        raise ArtifactMismatch(
            f"{source.ref} was made on {source.model_id or 'another model'} (fingerprint {source.fingerprint[:12]}), "
            f"the loaded model is {facts.model_id} ({facts.fingerprint[:12]})", param="artifact",
            fix='Make it anew on this model, or add "override": ["model"].')


def _check_kind(source: Source, operation: Operation) -> None:
    if source.payload.kind not in operation.kinds:
        raise ArtifactMismatch(f"{source.ref} is a {source.payload.kind}, op {operation.name} takes "
                               f"{', '.join(operation.kinds)}", param="op")
