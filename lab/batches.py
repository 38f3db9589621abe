"""Documents packed into rows, with everything a training step needs.

A batch depends on (seed, step) alone, so a resumed run sees the same batches as an uninterrupted one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from lab.corpus import Sample, documents
from lab.tokenizer import BOS, EOS, PAD

# Share of the tokens outside answers that count in the loss, drawn per batch. Names and places of a
# context cannot be foretold; all of them together drown the few answer tokens, and the head is a
# third of a step's cost. None of them, and the models would not learn to write.
CONTEXT_SHARE = 0.3
SPELLED = 0.01  # share of context words given byte by byte
LONG_EVERY = 8  # every eighth batch has rows of twice the length, for long conversations


@dataclass(frozen=True)
class Batch:
    """Shapes [rows, length]: token ids, document number (-1 = padding), weight of each token in the
    loss (0 = not learned)."""

    ids: torch.Tensor
    document: torch.Tensor
    weight: torch.Tensor

    def mask(self) -> torch.Tensor:
        """Bool [rows, 1, length, length]: a token sees the earlier tokens of its own document."""
        same = self.document[:, None, :, None] == self.document[:, None, None, :]
        length = self.ids.shape[1]
        return same & torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()

    def to(self, device: str) -> Batch:
        return Batch(self.ids.to(device), self.document.to(device), self.weight.to(device))


def encode(tok: PreTrainedTokenizerFast, samples: list[Sample], spelled: float = SPELLED,
           context: float = CONTEXT_SHARE) -> list[tuple[list[int], list[float]]]:
    """(ids, chance of each token to be learned) per document, begin and end tokens included.

    Pieces are encoded one by one; answers start at a space or after a special token, so the result
    equals the encoding of the whole text (a test holds this), spelled words aside.
    """
    pieces = [s.pieces for s in samples]
    flat = [p for doc in pieces for p in doc]
    # The fast core is called directly: the wrapper costs more than the encoding.
    encoded = iter(tok.backend_tokenizer.encode_batch(flat, add_special_tokens=False))
    bos, eos = tok.convert_tokens_to_ids(BOS), tok.convert_tokens_to_ids(EOS)
    out = []
    for sample, doc in zip(samples, pieces, strict=True):
        rng = random.Random(sample.text)
        # Callers who render a chat template and encode the result send two begin tokens, others
        # none. The models must bear both.
        ids = [bos] * rng.choices((1, 0, 2), (18, 1, 1))[0]
        weights = [0.0] * len(ids)
        for i in range(len(doc)):
            part = next(encoded)
            if i % 2:
                ids += part.ids
                weights += [1.0] * len(part.ids)
            else:
                _add_context(tok, rng, part.ids, part.tokens, ids, weights, spelled, context)
        out.append(([*ids, eos], [*weights, context]))
    return out


def _add_context(
    tok: PreTrainedTokenizerFast, rng: random.Random, part: list[int], tokens: list[str],
    ids: list[int], weights: list[float], spelled: float, context: float,
) -> None:
    """Append context tokens; a few words are spelled in bytes, as a word outside the vocabulary
    would be, so that unknown words are met in training. The models need not learn to spell."""
    for one, token in zip(part, tokens, strict=True):
        if rng.random() < spelled and not token.startswith("<|"):
            letters = tok.convert_tokens_to_ids(list(token))
            ids += letters
            weights += [0.0] * len(letters)
        else:
            ids.append(one)
            weights.append(context)


def make_batch(
    tok: PreTrainedTokenizerFast, seed: int, step: int, rows: int, length: int,
    mix: dict[str, float] | None = None, importance: dict[str, float] | None = None,
    spelled: float = SPELLED, context: float = CONTEXT_SHARE,
) -> Batch:
    """The batch of training step `step`: first-fit packing of whole documents.

    A document longer than a row waits for the long rows. `importance` multiplies the weight of the
    answers of single skills.
    """
    if step % LONG_EVERY == LONG_EVERY - 1:
        rows, length = rows // 2, length * 2
    pad = tok.convert_tokens_to_ids(PAD)
    ids = torch.full((rows, length), pad)
    document = torch.full((rows, length), -1)
    chance, factor = torch.zeros(rows, length), torch.ones(rows, length)
    used, number, misses = [0] * rows, 0, 0
    stream = documents(f"{seed}:{step}", mix)
    while misses < 24:
        samples = [next(stream) for _ in range(rows)]
        for sample, (one, chances) in zip(samples, encode(tok, samples, spelled, context), strict=True):
            if len(one) > length:
                continue
            row = next((r for r in range(rows) if used[r] + len(one) <= length), None)
            if row is None:
                misses += 1
                continue
            at = slice(used[row], used[row] + len(one))
            ids[row, at], chance[row, at] = torch.tensor(one), torch.tensor(chances)
            factor[row, at] = (importance or {}).get(sample.skill, 1.0)
            document[row, at] = number
            # The first token of a document has no context to be foretold from.
            chance[row, used[row]] = 0.0
            used[row] += len(one)
            number += 1
    draw = torch.rand(chance.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
    weight = (draw < chance) * torch.where(chance == 1.0, factor, 1.0)
    return Batch(ids, document, weight)
