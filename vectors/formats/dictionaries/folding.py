"""From the numbers of an SAE in its maker's conventions to the one form in which they are stored.

Everything is folded in double precision and rounded once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from steering.artifacts.payload import INPUT_NORMS


@dataclass(frozen=True)
class Raw:
    """An SAE in its maker's conventions.

    Attributes:
        encoder, decoder: `[m, width]`. encoder_bias `[m]`, decoder_bias `[width]`.
        subtracted: the decoder's bias is taken from the activation first.
        scale: the activation is multiplied by it before, and the reconstruction divided by it.
        norm: what each token is divided by, a key of INPUT_NORMS.
        k: of TopK. threshold `[m]`: of the pre-activation.
        decoder_norms: pre-activations are multiplied by the norms of the decoder's rows, and features divided by them.
        gate_bias, magnitude `[m]`: of a gated SAE, whose feature is relu(exp(magnitude) e + encoder_bias) where
            e + gate_bias > 0, e being the product with the encoder.
        output `[m]`: what features are multiplied by before they are decoded.
    """

    encoder: Tensor
    decoder: Tensor
    encoder_bias: Tensor
    decoder_bias: Tensor
    subtracted: bool = False
    scale: float = 1.0
    norm: str = "none"
    k: int | None = None
    threshold: Tensor | None = None
    decoder_norms: bool = False
    gate_bias: Tensor | None = None
    magnitude: Tensor | None = None
    output: Tensor | None = None


def folded(raw: Raw) -> dict[str, Tensor]:
    """The tensors of a payload of the kind `sae`."""
    encoder, decoder = raw.encoder.double(), raw.decoder.double()
    bias, centre = raw.encoder_bias.double(), raw.decoder_bias.double()
    threshold = None if raw.threshold is None else raw.threshold.double()
    if raw.output is not None:
        decoder = decoder * raw.output.double()[:, None]
    if raw.decoder_norms:
        norms = decoder.norm(dim=1)
        encoder, bias, decoder = encoder * norms[:, None], bias * norms, decoder / norms[:, None]
    if raw.gate_bias is not None:
        factor = torch.ones_like(bias) if raw.magnitude is None else raw.magnitude.double().exp()
        # e + gate_bias > 0 says the same as factor e + bias > bias - factor gate_bias.
        threshold = bias - factor * raw.gate_bias.double()
        encoder = encoder * factor[:, None]
    if raw.subtracted:
        # Thresholds are of the whole pre-activation, so they stay as they are.
        bias = bias - encoder @ centre
    found = {"encoder": (encoder * raw.scale).float(), "encoder_bias": bias.float(),
             "decoder": (decoder / raw.scale).float(), "decoder_bias": (centre / raw.scale).float()}
    if threshold is not None:
        found["threshold"] = threshold.float()
    if raw.k is not None:
        found["k"] = torch.tensor(raw.k)
    if raw.norm != "none":
        found["input_norm"] = torch.tensor(INPUT_NORMS[raw.norm])
    return found
