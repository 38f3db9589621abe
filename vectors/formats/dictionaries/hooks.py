"""From the names that other programs have for places in a model to site and layer."""

import re

from steering.language.errors import InvalidPayload
from steering.language.vocabulary import Site

# hook_resid_mid is after the attention's contribution and before the MLP's: no site stands there.
LENS: dict[str, Site] = {
    "hook_resid_pre": "resid_pre", "hook_resid_post": "resid_post", "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out", "attn.hook_z": "head_out", "mlp.hook_post": "mlp_act"}
# The output of a module, or where the name says so its input. What comes after the norm behind an MLP is its
# contribution, where there is such a norm.
MODULES: dict[str, Site] = {
    "": "resid_post", "output": "resid_post", "input": "resid_pre", "self_attn": "attn_out", "attn": "attn_out",
    "attention": "attn_out", "self_attn.output": "attn_out", "self_attn.o_proj.input": "head_out", "mlp": "mlp_out",
    "mlp.output": "mlp_out", "mlp.down_proj.input": "mlp_act", "post_feedforward_layernorm.output": "mlp_out"}
_LENS = re.compile(r"blocks\.([0-9]{1,4})\.(.+)")
_MODULE = re.compile(r"(?:(?:model|transformer|gpt_neox)\.)?(?:layers|h)[._]([0-9]{1,4})(?:\.(.+))?")
# Folders and files of published SAEs.
_PATH_SITE: tuple[tuple[str, Site], ...] = (
    ("resid_post", "resid_post"), ("resid_pre", "resid_pre"), ("attn_out", "head_out"), ("mlp_out", "mlp_out"),
    ("-pt-res", "resid_post"), ("-it-res", "resid_post"), ("-pt-att", "head_out"), ("-it-att", "head_out"),
    ("-pt-mlp", "mlp_out"), ("-it-mlp", "mlp_out"), ("sae-res", "resid_post"))
# "l0" is how sparse an SAE is, unless it stands behind a hyphen.
_PATH_LAYER = re.compile(r"(?:^|[^a-z])layers?[._]?([0-9]{1,4})(?![0-9a-z])|-l([0-9]{1,4})(?![0-9a-z_])")


def place_of(hook: str) -> tuple[Site, int]:
    """Site and layer of a place as TransformerLens or transformers name it.

    Raises:
        InvalidPayload: nothing can be read or changed there.
    """
    for pattern, sites in ((_LENS, LENS), (_MODULE, MODULES)):
        match = pattern.fullmatch(hook)
        if match is not None and (match[2] or "") in sites:
            return sites[match[2] or ""], int(match[1])
    raise InvalidPayload(f"the SAE is of {hook[:120]!r}, which is no site that this server has", param="file",
                         fix="If it is one under another name, give site and layers with the metadata.")


def place_in_path(parts: tuple[str, ...]) -> tuple[Site | None, int | None]:
    """What the folders and the name of a file say, as far as they do: the nearest to the file wins."""
    site: Site | None = None
    layer: int | None = None
    for part in reversed([part.lower() for part in parts]):
        if site is None:
            site = next((found for mark, found in _PATH_SITE if mark in part), None)
        if layer is None and (match := _PATH_LAYER.search(part)) is not None:
            layer = int(match[1] or match[2])
    return site, layer
