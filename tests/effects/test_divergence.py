"""Divergences against scipy, degeneration against hand-made texts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy

from server.effects.degeneration import compression, degeneration, repetition
from steering.divergence import Divergence, divergence, residual_shift


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0.1, 8))
def test_equals_scipy(seed: int, count: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, count, 11)) * scale
    chosen = rng.integers(0, 11, count)
    found = divergence(torch.tensor(a), torch.tensor(b), torch.tensor(chosen), ends=(2, 7))
    p, q = softmax(a, axis=-1), softmax(b, axis=-1)
    for name, expected in {
        "kl": entropy(p, q, axis=-1), "reverse_kl": entropy(q, p, axis=-1), "entropy": entropy(p, axis=-1),
        "other_entropy": entropy(q, axis=-1), "surprise": -np.log(q[np.arange(count), chosen]),
        "top1_agree": (a.argmax(-1) == b.argmax(-1)).astype(float),
        "end": p[:, [2, 7]].sum(-1), "other_end": q[:, [2, 7]].sum(-1),
        "rank": [(b[i] > b[i, chosen[i]]).sum() for i in range(count)],
    }.items():
        assert getattr(found, name).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-4), name


def test_equal_runs_diverge_by_nothing_and_impossible_tokens_do_not_make_nan() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [2.0, -torch.inf, 0.5]])
    found = divergence(logits, logits, torch.tensor([1, 0]))
    assert found.kl.tolist() == found.reverse_kl.tolist() == [0.0, 0.0]
    assert torch.isfinite(found.entropy).all() and found.top1_agree.tolist() == [1.0, 1.0]


def test_without_ends_no_text_ever_ends() -> None:
    found = divergence(torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([0, 1, 2]))
    assert found.end.tolist() == found.other_end.tolist() == [0.0] * 3


def test_parts_join_to_the_whole() -> None:
    a, b = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    joined = Divergence.join([divergence(a[:3], b[:3], chosen[:3]), divergence(a[3:], b[3:], chosen[3:])])
    assert torch.allclose(joined.kl, divergence(a, b, chosen).kl) and len(joined) == 7


def test_residual_shift() -> None:
    base = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    found = residual_shift(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), base)
    assert found.relative.tolist() == pytest.approx([0.0, 2**0.5])
    assert found.cosine.tolist() == pytest.approx([1.0, 0.0])


def test_loops_show_and_prose_does_not() -> None:
    prose = "The guide met us near the old bridge and told a long story about the river".split()
    ids = {word: i for i, word in enumerate(dict.fromkeys(prose))}
    assert repetition([ids[w] for w in prose]) == 0.0
    assert repetition([1, 2, 3] * 10) == pytest.approx(1 - 3 / 28)
    assert repetition([1, 2]) == 0.0
    assert compression("the soup was good " * 30) > 3 * compression(" ".join(prose))
    assert degeneration([1, 2, 3, 1, 2, 3], "abcabc", ended=True).length == 6
