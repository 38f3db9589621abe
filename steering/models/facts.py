"""What the compiler must know of a loaded model: its widths and counts, and which sites it offers."""

from dataclasses import dataclass, field

from steering.language.errors import LayerOutOfRange, Path, UnsupportedSite
from steering.language.vocabulary import Site
from steering.models.massive import Massive


@dataclass(frozen=True)
class ModelFacts:
    """Facts of one loaded model.

    Attributes:
        model_id: the name it is served under, which artifacts record.
        fingerprint: hash of configuration and weights; artifacts made on other weights are refused.
        family: the architecture family, a name of the table in `families.py`.
        num_experts: routed experts a MoE layer has, 0 for a dense model.
        adapter: what was trained on these weights and is on them, as NAME@DIGEST; None for the weights alone. It is not
        in the fingerprint, because artifacts made on the weights fit it.
        sites: for each site the layers at which the self-test reached it. All other places are refused.
        massive: the massive activations of the weights, without any adapter; None where nobody looked for them.
    """

    model_id: str
    fingerprint: str
    family: str
    num_layers: int
    d_model: int
    num_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    context_length: int
    num_experts: int = 0
    experts_per_token: int = 0
    adapter: str | None = None
    sites: dict[Site, tuple[int, ...]] = field(default_factory=dict)
    massive: Massive | None = None

    def width(self, site: Site) -> int:
        """Length of the last axis of the activation at `site`."""
        if site == "head_out":
            return self.num_heads * self.head_dim
        if site == "mlp_act":
            return self.d_ff
        if site == "router":
            return self.num_experts
        return self.d_model

    def check_layer(self, layer: int, param: str | Path) -> int:
        """The non-negative form of `layer`; negative numbers count from the end."""
        resolved = layer + self.num_layers if layer < 0 else layer
        if not 0 <= resolved < self.num_layers:
            raise LayerOutOfRange(f"layer {layer} does not exist in {self.model_id} ({self.num_layers} layers)",
                                  param=param, value=layer,
                                  fix=f"Use 0 to {self.num_layers - 1}, or -{self.num_layers} to -1.")
        return resolved

    def check_site(self, site: Site, layer: int, param: str | Path) -> None:
        layers = self.sites.get(site)
        if not layers:
            raise UnsupportedSite(f"{self.model_id} ({self.family}) does not offer the site {site}",
                                  param=param, value=site,
                                  fix=f"Offered: {', '.join(sorted(self.sites)) or 'none'}. See GET /v1/capabilities.")
        if layer not in layers:
            raise UnsupportedSite(f"layer {layer} of {self.model_id} does not offer the site {site}",
                                  param=param, value=layer, fix=f"Layers that do: {', '.join(map(str, layers))}.")
