"""Tokens of a running completion as the penalties of its sampling see them, brought up to date token by token."""

from collections.abc import Sequence

import torch


class Tally:
    """seen: which tokens occurred in prompt or completion, bool `[vocab_size]`. counts: how often each was generated,
    float32 `[vocab_size]`."""

    def __init__(self, prompt_length: int, vocab_size: int, device: torch.device) -> None:
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.counts = torch.zeros(vocab_size, device=device)
        self._prompt_length = prompt_length
        self._known = 0

    def update(self, token_ids: Sequence[int]) -> None:
        """Count the tokens that have come since the last call. `token_ids`: all of prompt and completion."""
        known, self._known = self._known, len(token_ids)
        new = torch.tensor(token_ids[known:], dtype=torch.int64, device=self.seen.device)
        self.seen[new] = True
        generated = new[max(self._prompt_length - known, 0):]
        self.counts.index_add_(0, generated, torch.ones(len(generated), device=self.counts.device))
