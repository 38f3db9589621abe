"""`extract sae` on a toy whose activations are sums of planted features, and its figures against plain hooks."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from steering.models.describe import model_facts
from tests.tiny import tiny
from tests.vectors.extract.test_local import Words
from tests.vectors.extract.toy import D_MODEL, VOCAB, Toy, never, noise, silent, unit
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.dictionary.quality import loss_recovered
from vectors.extract.local import LocalSubject
from vectors.extract.refusals import ExtractionCancelled, InvalidData, TooFewExamples
from vectors.extract.work import Work

PLANTED, ON, LENGTH = 48, 3, 16
DIRECTIONS = torch.stack([unit("planted", n) for n in range(PLANTED)])


@cache
def state(before: int, token: int) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(before * VOCAB + token)
    on = torch.randperm(PLANTED, generator=drawn)[:ON]
    return 4 * (torch.rand(ON, generator=drawn, dtype=torch.float64) + 0.5) @ DIRECTIONS[on]


class Sparse(Toy):
    """A token's activation is a sum of a few planted features, drawn by it and the one before; the next token depends
    on them alone."""

    def __init__(self, *, planted: bool = True) -> None:
        super().__init__()
        self.planted = planted
        self.unembedding = torch.stack([noise("u", n) for n in range(VOCAB)]) / 2

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        rows = [state(ids[max(n - 1, 0)], token) if self.planted else 4 * noise("row", ids[max(n - 1, 0)], token)
                for n, token in enumerate(ids)]
        # As a massive activation of the first token has it.
        rows[0] = rows[0] + 500 * torch.eye(D_MODEL, dtype=torch.float64)[3]
        return torch.stack(rows)

    def read(self, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        return self.unembedding @ resid

    def texts(self, count: int) -> list[list[int]]:
        """What it says itself, sampled."""
        drawn, found = torch.Generator().manual_seed(5), []
        for n in range(count):
            ids = [n % VOCAB, (7 * n) % VOCAB]
            while len(ids) < LENGTH:
                logits = self.unembedding @ self.embed(ids)[-1]
                ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=drawn)))
            found.append(ids)
        return found


TEXTS = Sparse().texts(500)
FIELDS: dict[str, Any] = {"name": "features", "texts": TEXTS, "layers": [1], "features": 64, "k": ON, "steps": 900,
                          "batch": 256, "max_eval": 12}


def extract(toy: Toy | None = None, path: Path | None = None, cancelled: Any = never, **fields: Any) -> Extraction:
    request = parse_request("sae", {**FIELDS, **fields})
    return prepare("sae", request, toy or Sparse(), "test").run(silent, cancelled, path)


def test_planted_features_are_found_and_the_card_says_how_good_they_are() -> None:
    found = extract()
    assert (found.metadata.kind, found.metadata.op, found.metadata.site) == ("sae", "sae", "resid_post")
    numbers = found.payload.layers[1]
    nearest = (DIRECTIONS.float() @ numbers["decoder"].T).amax(dim=1)
    assert float(nearest.mean()) > 0.9
    report = found.report
    assert report["explained"] > 0.85 and report["l0"] == pytest.approx(ON, abs=0.2) and report["dead"] < 0.3
    loss = report["loss"]
    assert loss["clean"] <= loss["spliced"] < loss["mean"] and loss["recovered_of_mean"] > 0.7
    assert report["stability"]["found"] > report["stability"]["max"] + 0.2
    assert found.metadata.card is not None and "draft" not in found.metadata.card
    assert found.metadata.card["loss"] == loss and found.metadata.card["stability"]["same"] > 0.6


def test_a_model_without_features_makes_a_draft_whose_seeds_disagree() -> None:
    """The control: activations as large, of which no few directions are the parts."""
    found = extract(Sparse(planted=False), steps=300)
    assert found.report["explained"] < 0.5 and found.metadata.card is not None and "draft" in found.metadata.card
    assert found.report["stability"]["same"] < 0.5


def test_a_jumprelu_has_thresholds_and_about_as_many_features_as_asked_for() -> None:
    found = extract(activation="jumprelu", seeds=1, steps=1500)
    numbers = found.payload.layers[1]
    assert "threshold" in numbers and "k" not in numbers and abs(found.report["l0"] - ON) < 1.5
    assert "stability" not in found.report and found.report["explained"] > 0.7


def test_a_cancelled_one_goes_on_where_it_was_and_becomes_the_same(tmp_path: Path) -> None:
    path, steps = tmp_path / "kept.safetensors", 450
    whole = extract(steps=steps)
    with pytest.raises(ExtractionCancelled):
        # Once there is something kept, at a step that is not kept.
        extract(steps=steps, path=path, cancelled=lambda: path.exists() and next(ticks) > 100)
    asked: list[float] = []
    request = parse_request("sae", {**FIELDS, "steps": steps})
    again = prepare("sae", request, Sparse(), "test").run(lambda share, stage: asked.append(share)
                                                          if stage == "fit" else None, never, path)
    assert min(asked) > 0.4
    assert all(torch.equal(again.payload.layers[1][name], tensor) for name, tensor in whole.payload.layers[1].items())
    assert again.report == whole.report


ticks = iter(range(10**6))


@pytest.mark.parametrize("when", [0, 40])
def test_it_stops_within_a_step(when: int) -> None:
    seen: list[str] = []

    def tell(share: float, stage: str) -> None:
        if stage == "fit":
            seen.append(stage)

    with pytest.raises(ExtractionCancelled):
        prepare("sae", parse_request("sae", FIELDS), Sparse(), "test").run(tell, lambda: len(seen) > when)
    assert len(seen) == when + 1


@pytest.mark.parametrize(("fields", "error", "param"), [
    ({"layers": [0, 1]}, InvalidData, "layers"), ({"k": 33}, InvalidData, "k"),
    ({"features": 2**17, "site": "mlp_act", "batch": 16_384}, InvalidData, "features"),
    ({"texts": TEXTS[:3]}, TooFewExamples, "texts"), ({"texts": [[n] for n in range(20)]}, TooFewExamples, "texts")])
def test_refusals(fields: dict[str, Any], error: type[Exception], param: str) -> None:
    with pytest.raises(error) as caught:
        extract(**fields)
    assert caught.value.param == param  # type: ignore[attr-defined]


def test_the_same_request_has_the_same_digest_whatever_it_is_called() -> None:
    def digest(**fields: Any) -> str:
        return prepare("sae", parse_request("sae", {**FIELDS, **fields}), Sparse(), "test").digest

    assert digest() == digest(name="other", description="Something.") != digest(seed=1)


def test_an_estimate_counts_the_training() -> None:
    def seconds(**fields: Any) -> float:
        request = parse_request("sae", {**FIELDS, **fields})
        found = prepare("sae", request, Sparse(), "test").estimate(TEXTS[0])
        assert found is not None
        return found

    assert seconds(steps=10**6) > 20 * seconds(steps=10)


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
@torch.no_grad()
def test_the_loss_recovered_is_that_of_plain_hooks(activation: str) -> None:
    model, layer, drawn = tiny("llama"), 1, torch.Generator().manual_seed(3)
    texts = [tuple(torch.randint(3, 97, (length,), generator=drawn).tolist()) for length in (9, 14, 11)]
    states = torch.cat([model(torch.tensor([text]), output_hidden_states=True).hidden_states[layer + 1][0, 1:]
                        for text in texts])
    rows = torch.linalg.qr(torch.randn(32, 32, generator=drawn)).Q
    mean = states.mean(0)
    numbers = {"encoder": torch.cat([rows, -rows]), "encoder_bias": torch.cat([-rows, rows]) @ mean,
               "decoder": torch.cat([rows, -rows]), "decoder_bias": mean,
               **({"k": torch.tensor(20)} if activation == "topk" else {"threshold": torch.full((64,), 0.05)})}

    def loss(change: Any) -> float:
        def hook(module: Any, args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[0, 1:] = change(hidden[0, 1:])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle, total, count = model.model.layers[layer].register_forward_hook(hook), 0.0, 0
        for text in texts:
            logits = model(torch.tensor([text])).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:]), reduction="sum"))
            count += len(text) - 1
        handle.remove()
        return total / count

    def spliced(h: torch.Tensor) -> torch.Tensor:
        pre = (h - mean) @ numbers["encoder"].T
        value = pre.relu() * (pre > 0.05)
        if activation == "topk":
            value = torch.zeros_like(pre).scatter(1, pre.topk(20).indices, pre.relu().gather(1, pre.topk(20).indices))
        return value @ numbers["decoder"] + mean

    expected = {"clean": loss(lambda h: h), "spliced": loss(spliced), "mean": loss(lambda h: mean.expand_as(h)),
                "zero": loss(torch.zeros_like)}
    local = LocalSubject(model, Words(), model_facts(model, model_id="m", fingerprint="f" * 16))  # type: ignore[arg-type]
    work = Work(local, silent, never, "test")
    found = loss_recovered(work, "resid_post", layer, numbers, mean, texts, work.within(0, 1, "control"))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=2e-5), name
    assert len({round(value, 4) for value in expected.values()}) == 4
    assert found["recovered_of_zero"] == pytest.approx(
        (expected["zero"] - expected["spliced"]) / (expected["zero"] - expected["clean"]), abs=1e-3)
