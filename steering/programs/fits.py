"""Whether an artifact is as wide as the site it is used at. One that is not can be used at no layer, and no override
helps."""

from collections.abc import Iterable

from steering.artifacts.source import Source
from steering.language.errors import ArtifactMismatch
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts


def check_width(source: Source, sites: Iterable[Site], facts: ModelFacts, param: str) -> None:
    """Raises ArtifactMismatch where one of `sites` has another width. This is checked before anything else, because
    the advice of every other error would not help."""
    width = source.payload.width
    for site in sites:
        if width is None or not facts.sites.get(site) or width == facts.width(site):
            continue
        made_on = f" on {source.model_id}" if source.model_id else ""
        fix = "Serve the model it was made on, or make it anew on this one."
        if site != source.site:
            fix = f"It was made for {source.site}; use it at a site of its width."
        raise ArtifactMismatch(f"{source.ref} was made{made_on} for a width of {width}; {site} of the loaded model "
                               f"{facts.model_id} is {facts.width(site)} wide", param=param, fix=fix)
