"""The sampler: what is drawn is the distribution that was asked for, and nothing of it depends on the batch."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from server.engines.data import Generation, Sampling
from server.engines.transformers.noise import exponential, keys
from server.engines.transformers.running import Running
from server.engines.transformers.sampler import FIRST_LOOK, _cut, _penalised, reports, sample
from server.engines.transformers.tally import Tally

SIZE = 1500


def running(seed: int = 0, **settings: Any) -> Running:
    return Running.build(Generation("x", [1], Sampling(**{"max_tokens": 1, "temperature": 1.0, **settings})), seed)


def logits(seed: int = 0, *, spread: float = 2.0, size: int = SIZE) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def drawn(row: torch.Tensor, seeds: int, **settings: Any) -> torch.Tensor:
    return torch.cat([sample(row.expand(len(part), -1).contiguous(), [running(int(s), **settings) for s in part])
                      for part in torch.arange(seeds).split(500)])


def kept(row: torch.Tensor, s: Sampling) -> torch.Tensor:
    """Tokens that top_k, min_p and top_p leave, by a sort: the definition."""
    probs, order = (row.double() / s.temperature).softmax(-1).sort(descending=True, stable=True)
    keep = torch.arange(len(probs)) < (s.top_k if s.top_k > 0 else len(probs))
    keep &= probs >= s.min_p * probs[0]
    mass = (probs * keep / (probs * keep).sum()).cumsum(-1)
    keep &= torch.cat([torch.zeros(1), mass[:-1]]) < s.top_p
    return order[keep].sort().values


def misfit(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """The p-value of a chi-square test, tokens expected less than ten times taken together."""
    expected = (probs / probs.sum() * counts.sum()).double().numpy()
    rare = expected < 10
    seen, wanted = (np.append(x[~rare], x[rare].sum()) for x in (counts.double().numpy(), expected))
    return float(stats.chisquare(seen[wanted > 0], wanted[wanted > 0]).pvalue)


def test_noise_is_exponential_and_independent_of_its_neighbours() -> None:
    seeds, counters = np.meshgrid(np.arange(40), np.arange(40), indexing="ij")
    rows = torch.from_numpy(keys(seeds.ravel().tolist(), counters.ravel().tolist()))
    noise = exponential(rows, 40).reshape(40, 40, 40)
    assert stats.kstest(noise.flatten().numpy(), "expon").pvalue > 1e-3
    uniform = (-noise).exp()
    for dim in range(3):
        one, other = uniform.narrow(dim, 0, 39), uniform.narrow(dim, 1, 39)
        assert abs(np.corrcoef(one.flatten().numpy(), other.flatten().numpy())[0, 1]) < 0.02
    assert noise.unique().numel() > 0.99 * noise.numel()


def test_numbers_are_those_of_splitmix64() -> None:
    """Against the reference written with Python's integers: they must not change from one version to the next."""
    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    golden = 0x9E3779B97F4A7C15
    for seed, counter in ((0, 0), (7, 3), (2**63 - 1, 10**6)):
        key = mix(mix((seed + (counter + 1) * golden) % 2**64))
        found = keys([seed], [counter])
        assert int(found[0]) % 2**64 == key
        expected = [-np.log(((mix((key + (v + 1) * golden) % 2**64) >> 11) + 0.5) / 2**53) for v in range(5)]
        assert exponential(torch.from_numpy(found), 5)[0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1},
                                      {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.02}], ids=str)
def test_draws_are_an_exact_sample(settings: dict[str, Any]) -> None:
    row = logits(size=80)
    wanted = Sampling(**{"max_tokens": 1, "temperature": 1.0, **settings})
    counts = torch.bincount(drawn(row, 8_000, **settings), minlength=80)
    probs = torch.zeros(80, dtype=torch.float64)
    stay = kept(row, wanted)
    probs[stay] = (row.double() / wanted.temperature).softmax(-1)[stay]
    assert int(counts[probs == 0].sum()) == 0
    assert misfit(counts, probs) > 1e-4
    # The control: a distribution that is a little warmer is told apart.
    assert misfit(counts, probs**0.8) < 1e-6


def test_tokens_of_the_far_tail_are_drawn_as_often_as_they_should() -> None:
    """One token with nearly all of the mass, and a thousand that share a fiftieth."""
    row = torch.full((1000,), -np.log(1000 * 49.0))
    row[123] = 0.0
    found = drawn(row, 8_000)
    rare = found[found != 123]
    assert stats.binomtest(len(rare), 8_000, 0.02).pvalue > 1e-4
    assert stats.kstest(rare.numpy() / 1000, "uniform").pvalue > 1e-4


def test_a_draw_does_not_depend_on_the_order_of_near_equals() -> None:
    """Each token's logit is a rounding off in the batch, so that neighbours in the tail swap places."""
    row = logits(spread=1e-5)
    batch = row + logits(1, spread=2e-7)
    assert not torch.equal(row.argsort(), batch.argsort())
    assert (drawn(row, 2000) == drawn(batch, 2000)).all()

    # The control: a number that is looked up in the sorted mass, as many samplers do, finds other tokens.
    def looked_up(of: torch.Tensor) -> torch.Tensor:
        probs, order = of.softmax(-1).sort(descending=True, stable=True)
        return order[torch.searchsorted(probs.cumsum(-1), torch.linspace(0.001, 0.998, 500))]

    assert (looked_up(row) != looked_up(batch)).any()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows = torch.stack([logits(n, spread=0.1 + n % 3) for n in range(12)])
    settings: list[dict[str, Any]] = [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.05}, {"temperature": 0.0},
                                      {"top_k": 900, "top_p": 0.99}]
    runs = [running(n, logprobs=n % 4, **settings[n % 6]) for n in range(12)]
    together = sample(rows, runs)
    told = reports(rows, together.tolist(), runs)
    for n in range(12):
        alone = sample(rows[n:n + 1], runs[n:n + 1])
        assert alone.tolist() == [int(together[n])]
        assert reports(rows[n:n + 1], alone.tolist(), runs[n:n + 1]) == [told[n]]


@pytest.mark.parametrize("equals", [False, True])
def test_what_is_cut_is_what_a_sort_cuts(equals: bool) -> None:
    """Also where many are equal, as in 16 bits, and where the end of top_p lies beyond the first look."""
    settings = [Sampling(1, **{"temperature": 1.0, **s}) for s in (
        {"top_k": 3}, {"top_k": 700}, {"top_p": 0.5}, {"top_p": 0.999}, {"top_p": 1e-9}, {"min_p": 0.3}, {"min_p": 1.0},
        {"top_k": 50, "top_p": 0.7}, {"top_k": 300, "top_p": 0.9, "min_p": 0.01}, {}, {"top_k": 5000})]
    for spread in (0.01, 1.0, 4.0):
        row = logits(spread=spread)
        row = (row * 4).round() / 4 if equals else row
        chances = (row - row.max()).exp().expand(len(settings), -1).clone()
        _cut(chances, settings)
        for s, left in zip(settings, chances, strict=True):
            expected = kept(row, s)
            found = (left >= 0).nonzero().flatten()
            # A share may end at another token by a rounding of its mass.
            assert found.tolist() == expected.tolist() or (
                s.top_p < 1 and abs(len(found) - len(expected)) <= 1), (s, len(found), len(expected))
    assert FIRST_LOOK < SIZE / 2


def test_equals_are_told_in_the_order_of_their_ids() -> None:
    """In 16 bits many logits are equal. The greedy token is the first that is reported, and how many alternatives a
    neighbour wants changes nothing."""
    row = torch.zeros(300)
    row[[250, 40, 170, 90]] = 2.0
    row[10] = 1.0
    runs = [running(temperature=0.0, logprobs=count) for count in (0, 2, 3, 7, 20)]
    rows = row.expand(len(runs), -1).contiguous()
    tokens = sample(rows, runs).tolist()
    assert tokens == [40] * 5
    told = [[token for token, _ in choice.top] for choice in reports(rows, tokens, runs)]
    assert told[4] == [40, 90, 170, 250, 10, *[i for i in range(16) if i != 10]]
    assert all(some == told[4][:len(some)] for some in told)
    assert [len(some) for some in told] == [0, 2, 3, 7, 20]
    assert int(drawn(row, 50, top_k=1).unique()) == 40


def test_all_but_one_ruled_out_leaves_that_one() -> None:
    row = torch.full((500,), float("-inf"))
    row[77] = -40.0
    assert drawn(row, 2000).unique().tolist() == [77]
    assert drawn(row, 50, top_p=0.5).unique().tolist() == drawn(row, 50, top_k=9).unique().tolist() == [77]


@pytest.mark.parametrize(("settings", "allowed"), [
    ({"temperature": 1.0}, range(6)), ({"temperature": 1.0, "top_k": 2}, [5, 4]),
    ({"temperature": 1.0, "top_p": 0.6}, [5]), ({"temperature": 1.0, "min_p": 0.2}, [5, 4]),
    ({"temperature": 0.0}, [5]), ({"temperature": 1.0, "logit_bias": {0: 100.0}}, [0]),
    ({"temperature": 0.0, "logit_bias": {5: -100.0}}, [4]),
])
def test_sampling_draws_from_the_truncated_distribution(settings: dict[str, Any], allowed: Any) -> None:
    probs = torch.tensor([0.01, 0.02, 0.03, 0.06, 0.24, 0.64])
    runs = [Running.build(Generation("x", [1], Sampling(max_tokens=1, **settings)), seed) for seed in range(4000)]
    drawn = sample(probs.log().expand(4000, -1).contiguous(), runs)
    counts = torch.bincount(drawn, minlength=6).double() / 4000
    assert set(drawn.tolist()) == set(allowed)
    if "logit_bias" not in settings and settings["temperature"]:
        expected = torch.zeros(6).double()
        expected[list(allowed)] = probs[list(allowed)].double()
        assert torch.allclose(counts, expected / expected.sum(), atol=0.03)


def test_penalties_follow_their_formulas() -> None:
    settings = Sampling(max_tokens=4, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)
    running = Running.build(Generation("x", [0, 1], settings), 0)
    running.token_ids += [2, 2, 3]
    logits = torch.tensor([[4.0, -4.0, 3.0, 3.0, 1.0]])
    scores = _penalised(logits, [running], [settings])
    assert scores.tolist() == [[2.0, -8.0, 1.5 - 0.5 - 0.5, 1.5 - 0.25 - 0.5, 1.0]]
    assert logits.tolist() == [[4.0, -4.0, 3.0, 3.0, 1.0]]


def test_a_tally_reads_each_token_once() -> None:
    """However long a completion gets, a step looks at its new tokens; the counts are those of all of them."""
    class Watched(list[int]):
        read = 0

        def __getitem__(self, index: Any) -> Any:
            found = super().__getitem__(index)
            Watched.read += len(found) if isinstance(index, slice) else 1
            return found

    prompt, generated = [3, 3, 5], [7, 5, 7, 7, 9]
    tokens, tally = Watched(prompt + generated[:1]), Tally(3, 12, torch.device("cpu"))
    for token in generated[1:]:
        tally.update(tokens)
        tally.update(tokens)
        tokens.append(token)
    tally.update(tokens)
    assert Watched.read == len(tokens)
    assert tally.seen.nonzero().flatten().tolist() == [3, 5, 7, 9]
    assert tally.counts.tolist() == [generated.count(token) for token in range(12)]
    # A completion that is taken back counts anew.
    penal = Running.build(Generation("r", prompt, Sampling(max_tokens=9, presence_penalty=1.0)), 1)
    penal.token_ids += generated
    sample(torch.zeros(1, 12), [penal])
    penal.rewind([*prompt, 7])
    sample(torch.zeros(1, 12), [penal])
    assert penal.tally is not None and penal.tally.counts.nonzero().flatten().tolist() == [7]
