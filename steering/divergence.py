"""How far two next-token distributions are apart, per token. Natural logarithms: nats."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

# Numbers of one distribution that are worked on at a time. Larger blocks leave the caches of a CPU, and their memory is
# asked of the system anew each time.
NUMBERS_AT_ONCE = 2**18


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

    def part(self, tokens: slice) -> "Divergence":
        return Divergence(**{f.name: getattr(self, f.name)[tokens] for f in fields(self)})


def divergence(steered: torch.Tensor, other: torch.Tensor, chosen: torch.Tensor, ends: Sequence[int] = ()
               ) -> Divergence:
    """Compare logits `[G, vocab_size]` of a steered and another run that predict the tokens `chosen [G]`.

    ends: tokens that end a text; without them that probability is 0.
    """
    rows = max(1, NUMBERS_AT_ONCE // steered.shape[-1])
    parts = [_of_rows(*block, list(ends)) for block in
             zip(torch.split(steered, rows), torch.split(other, rows), torch.split(chosen, rows), strict=True)]
    return parts[0] if len(parts) == 1 else Divergence.join(parts)


def _of_rows(steered: torch.Tensor, other: torch.Tensor, chosen: torch.Tensor, ends: list[int]) -> Divergence:
    a, b = steered.float(), other.float()
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    # A softmax of its own is cheaper than exp of what is there.
    mass, other_mass = a.softmax(-1), b.softmax(-1)
    chosen_q = q.gather(1, chosen.unsqueeze(1))
    apart = p - q
    return Divergence(
        # Rounding can give a tiny negative number where the distributions are equal.
        kl=_mean(mass, apart).clamp_min(0.0),
        reverse_kl=(-_mean(other_mass, apart)).clamp_min(0.0),
        entropy=-_mean(mass, p),
        other_entropy=-_mean(other_mass, q),
        top1_agree=(_likeliest(p) == _likeliest(q)).float(),
        surprise=-chosen_q.squeeze(1),
        # Written as floats, because bools take three times as long to be summed.
        rank=torch.gt(q, chosen_q, out=torch.empty_like(q)).sum(-1),
        end=mass[:, ends].sum(-1),
        other_end=other_mass[:, ends].sum(-1),
    )


def _likeliest(rows: torch.Tensor) -> torch.Tensor:
    """Index of the largest number of each row; on a CPU by numpy, which takes a tenth of the time."""
    return torch.from_numpy(rows.numpy().argmax(-1)) if rows.device.type == "cpu" else rows.argmax(-1)


def _mean(mass: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Mean of `values [n, vocab_size]` by row. An entry without probability mass is left out, even if its value is
    infinite."""
    found = (mass * values).sum(-1)
    if bool(found.isnan().any()):
        found = torch.where(mass == 0, 0.0, mass * values).sum(-1)
    return found


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

    def part(self, tokens: slice) -> "ResidualShift":
        return ResidualShift(self.relative[tokens], self.cosine[tokens])


def residual_shift(steered: torch.Tensor, base: torch.Tensor) -> ResidualShift:
    """From hidden states `[G, d_model]`."""
    length = base.norm(dim=-1).clamp_min(1e-12)
    return ResidualShift((steered - base).norm(dim=-1) / length,
                         torch.nn.functional.cosine_similarity(steered, base, dim=-1))
