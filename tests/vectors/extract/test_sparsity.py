"""Sparsity of a map's inputs: planted lazy channels are found, thresholds hold on other text, dealt contributions have
none."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from steering.language.errors import InvalidRequest, TrimtabError
from steering.language.vocabulary import Site
from tests.vectors.extract.toy import D_FF, Toy, never, noise, silent
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.methods.sparsity import SHARES
from vectors.extract.refusals import FitFailed, TooFewExamples

LAZY = 12
TEXTS = [" ".join(f"t{(7 * n + 3 * k) % 90}x{n % 4}" for k in range(14)) for n in range(60)]


class Lazy(Toy):
    """At layer 1 the first channels are small on every token but one; the last channel's column is long."""

    def neurons(self, layer: int, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        h = torch.stack([noise("n", layer, token, n, width=D_FF) for n, token in enumerate(ids)])
        if layer == 1:
            h[:, :LAZY] *= 0.001
        # Where a text begins everything is huge, as at a sink.
        h[0] *= 1000
        return h

    def columns(self, site: Site, layer: int) -> torch.Tensor:
        assert site == "mlp_act"
        return torch.cat([torch.full((D_FF - 1,), 0.5), torch.tensor([5.0])])


def extract(toy: Toy | None = None, **fields: Any) -> Extraction:
    request = parse_request("sparsity", {"name": "sparse", "prompts": TEXTS, **fields})
    return prepare("sparsity", request, toy or Lazy(), "test").run(silent, never)


def test_lazy_channels_are_those_that_were_planted_and_dealt_anew_there_are_none() -> None:
    layers = extract().report["layers"]
    assert layers["1"]["lazy"] == pytest.approx(LAZY / D_FF, abs=0.01)
    assert layers["0"]["lazy"] < 0.05 and layers["1"]["lazy_dealt"] < 0.05
    assert layers["1"]["needed"] < layers["0"]["needed"] < 0.5
    columns = np.array([0.5] * (D_FF - 1) + [5.0])
    assert layers["0"]["norm_variation"] == pytest.approx(columns.std(ddof=1) / columns.mean(), rel=1e-4)
    assert layers["0"]["zeros"] == 0.0


def test_thresholds_are_quantiles_without_the_first_tokens_and_hold_for_other_text() -> None:
    found = extract(layers=[0], max_calibration=500)
    numbers = found.payload.layers[0]
    assert torch.equal(numbers["shares"], torch.tensor(SHARES))
    # Of standard normal sizes, whatever the tokens.
    assert numbers["thresholds"].shape == (len(SHARES), D_FF)
    assert float(numbers["thresholds"][9].mean()) == pytest.approx(0.6745, rel=0.1)
    assert bool((numbers["cut"].diff() >= 0).all()) and float(numbers["cut"][-1]) < 20
    told = found.report["layers"]["0"]["left_out"]
    for share, one in told.items():
        assert one["chess"] == pytest.approx(float(share), abs=0.05)
        assert one["threshold"] == pytest.approx(float(share), abs=0.08)
    meta = found.metadata
    assert (meta.kind, meta.op, meta.site, meta.options) == ("sparsity", "sparsify", "mlp_act",
                                                             {"method": "chess", "share": 0.5})


def test_layers_that_do_not_fit_together_are_read_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = extract()
    monkeypatch.setattr("vectors.extract.methods.sparsity.MOST_BYTES", 1)
    parts = extract()
    assert whole.report == parts.report
    for layer, numbers in whole.payload.layers.items():
        assert all(torch.equal(tensor, parts.payload.layers[layer][name]) for name, tensor in numbers.items())


@pytest.mark.parametrize(("fields", "error"), [
    ({"prompts": TEXTS[:5]}, TooFewExamples), ({"prompts": [*TEXTS, TEXTS[0]]}, TrimtabError),
    ({"site": "resid_post"}, InvalidRequest), ({"share": 1.0}, InvalidRequest)])
def test_requests_that_are_refused(fields: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        extract(**fields)


def test_a_model_whose_weights_cannot_be_read_is_refused() -> None:
    with pytest.raises(FitFailed):
        extract(Toy())
