"""How far two next-token distributions are apart, per token. Natural logarithms: nats."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Divergence:
    """Per generated token, `[G]` float32 each (top1_agree 0 or 1, rank from 0).

    kl: KL(steered || other). reverse_kl: KL(other || steered). entropy, other_entropy: of the two distributions.
    surprise: -log p(chosen token) under the other. rank: how many tokens the other finds likelier than the chosen one.
    end, other_end: probability that the text ends here, under either.
    """

    kl: torch.Tensor
    reverse_kl: torch.Tensor
    entropy: torch.Tensor
    other_entropy: torch.Tensor
    top1_agree: torch.Tensor
    surprise: torch.Tensor
    rank: torch.Tensor
    end: torch.Tensor
    other_end: torch.Tensor

    def __len__(self) -> int:
        return len(self.kl)

    @classmethod
    def join(cls, parts: Sequence["Divergence"]) -> "Divergence":
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})


def divergence(steered: torch.Tensor, other: torch.Tensor, chosen: torch.Tensor, ends: Sequence[int] = ()
               ) -> Divergence:
    """Compare logits `[G, vocab_size]` of a steered and another run that predict the tokens `chosen [G]`.

    ends: tokens that end a text; without them none ever ends.
    """
    p, q = steered.float().log_softmax(-1), other.float().log_softmax(-1)
    chosen_q = q.gather(1, chosen.unsqueeze(1))
    return Divergence(
        kl=_kl(p, q),
        reverse_kl=_kl(q, p),
        entropy=-(p.exp() * p).nan_to_num(0.0).sum(-1),
        other_entropy=-(q.exp() * q).nan_to_num(0.0).sum(-1),
        top1_agree=(p.argmax(-1) == q.argmax(-1)).float(),
        surprise=-chosen_q.squeeze(1),
        rank=(q > chosen_q).sum(-1).float(),
        end=p[:, list(ends)].exp().sum(-1),
        other_end=q[:, list(ends)].exp().sum(-1),
    )


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    # Rounding can give a tiny negative number where the distributions are equal.
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1).clamp_min(0.0)


@dataclass(frozen=True)
class ResidualShift:
    """Last layer's residual stream, steered against untouched, per token that predicts a generated one, `[G]` each.

    relative: |steered - base| / |base|. cosine: of the two.
    """

    relative: torch.Tensor
    cosine: torch.Tensor

    @classmethod
    def join(cls, parts: Sequence["ResidualShift"]) -> "ResidualShift":
        return cls(torch.cat([part.relative for part in parts]), torch.cat([part.cosine for part in parts]))


def residual_shift(steered: torch.Tensor, base: torch.Tensor) -> ResidualShift:
    """From hidden states `[G, d_model]`."""
    length = base.norm(dim=-1).clamp_min(1e-12)
    return ResidualShift((steered - base).norm(dim=-1) / length,
                         torch.nn.functional.cosine_similarity(steered, base, dim=-1))
