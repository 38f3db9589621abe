"""The check of an SAE on import: the right one passes, and each wrong convention is refused with the one that fits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from steering.artifacts.payload import Payload
from steering.language.errors import LayerOutOfRange
from steering.models.facts import ModelFacts
from vectors.reconstruction import WrongConvention, check_reconstruction, explained

D, RANK, LAYERS = 16, 5, 4
WIDE = range(LAYERS)
FACTS = ModelFacts("m", "f", "llama", num_layers=LAYERS, d_model=D, num_heads=4, head_dim=4, d_ff=40, vocab_size=50,
                   context_length=64, sites={"resid_pre": WIDE, "resid_post": WIDE, "attn_out": WIDE, "mlp_out": WIDE,
                                             "head_out": WIDE, "mlp_act": WIDE})


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(n * 1000**i for i, n in enumerate(seed)))


@dataclass
class Toy:
    """Activations of every place lie near a plane of its own, round a mean of its own."""

    facts: ModelFacts = FACTS
    asked: list[Any] = field(default_factory=list)

    def encode(self, prompt: str) -> tuple[int, ...]:
        return tuple(ord(c) % 50 for c in prompt)

    def capture(self, texts: Sequence[Sequence[int]], site: Any, layers: Sequence[int],
                positions: Any = None) -> list[Mapping[int, torch.Tensor]]:
        self.asked.append((site, tuple(layers)))
        return [{layer: self.at(site, layer, text) for layer in layers} for text in texts]

    def at(self, site: str, layer: int, text: Sequence[int]) -> torch.Tensor:
        if site == "resid_pre" and layer > 0:
            site, layer = "resid_post", layer - 1
        mean, plane = self.shape(site, layer)
        z = torch.stack([torch.randn(RANK, generator=generator(token, n)) for n, token in enumerate(text)]) * 2
        noise = torch.stack([torch.randn(len(mean), generator=generator(token, n, 1)) for n, token in enumerate(text)])
        found = mean + z @ plane + 0.1 * noise
        # A sink, which the check must leave out.
        found[0] = 1000.0
        return found

    def shape(self, site: str, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = generator(len(site), layer, 7)
        width = self.facts.width(site)  # type: ignore[arg-type]
        mean = torch.randn(width, generator=drawn) * 2
        return mean, torch.linalg.qr(torch.randn(width, RANK, generator=drawn)).Q.T.contiguous()

    def sae(self, site: str = "resid_post", layer: int = 2) -> dict[str, torch.Tensor]:
        mean, plane = self.shape(site, layer)
        encoder = torch.cat([plane, -plane])
        return {"encoder": encoder, "encoder_bias": -encoder @ mean, "decoder": encoder.clone(), "decoder_bias": mean}


def check(numbers: Mapping[str, torch.Tensor], site: Any = "resid_post", layer: int = 2, least: float = 0.5,
          texts: list[str] | None = None) -> dict[str, Any]:
    return check_reconstruction(Payload.build("sae", {layer: numbers}), site, Toy(), texts, least)


@pytest.mark.parametrize(("site", "layer"), [("resid_post", 2), ("resid_post", 0), ("mlp_act", 3), ("resid_pre", 0)])
def test_the_right_one_passes(site: str, layer: int) -> None:
    found = check(Toy().sae(site, layer), site, layer)
    card = found["layers"][str(layer)]
    assert card["explained"] > 0.98 and card["l0"] == pytest.approx(RANK) and card["dead_on_these"] == 0
    assert found["texts"] == "the server's own" and card["tokens"] > 100


def shifted(sign: int) -> dict[str, torch.Tensor]:
    numbers = Toy().sae()
    return {**numbers, "encoder_bias": numbers["encoder_bias"] + sign * numbers["encoder"] @ numbers["decoder_bias"]}


def scaled(factor: float) -> dict[str, torch.Tensor]:
    numbers = Toy().sae()
    return {**numbers, "encoder": numbers["encoder"] * factor, "decoder": numbers["decoder"] / factor,
            "decoder_bias": numbers["decoder_bias"] / factor}


def length() -> float:
    """What the activations at the place are divided by to have the root of the width as their norm."""
    toy = Toy()
    h = torch.cat([toy.at("resid_post", 2, toy.encode("some text that is long enough"))[1:]])
    return float(h.norm(dim=1).mean()) / D**0.5


def square() -> dict[str, torch.Tensor]:
    """As many features as dims, so that a shape does not say which way a matrix lies."""
    numbers = Toy().sae()
    pad = torch.zeros(D - 2 * RANK, D)
    return {"encoder": torch.cat([numbers["encoder"], pad]), "decoder": torch.cat([numbers["decoder"], pad]),
            "encoder_bias": torch.cat([numbers["encoder_bias"], pad[:, 0]]), "decoder_bias": numbers["decoder_bias"]}


WRONG: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "the bias is not subtracted": (shifted(1), "with the decoder's bias subtracted"),
    "the bias is subtracted twice": (shifted(-1), "without subtracting the decoder's bias"),
    "a scale is lacking": (scaled(length()), "with activations scaled to the root of the width"),
    "the root of the width is lacking": (scaled(D**0.5), "divided by the root of the width"),
    "an input norm too many": ({**Toy().sae(), "input_norm": torch.tensor(1)}, 'with the input_norm "none"'),
    "the encoder lies the other way": ({**square(), "encoder": square()["encoder"].T.contiguous()},
                                       "with the encoder transposed"),
    "the decoder lies the other way": ({**square(), "decoder": square()["decoder"].T.contiguous()},
                                       "with the decoder transposed"),
    "the layer before": (Toy().sae(layer=1), "at resid_post of layer 1"),
    "the layer behind": (Toy().sae(layer=3), "at resid_post of layer 3"),
    "another site": (Toy().sae("mlp_out", 2), "at mlp_out of layer 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_convention_is_refused_with_the_one_that_fits(name: str) -> None:
    numbers, fits = WRONG[name]
    with pytest.raises(WrongConvention, match=f"{fits} it would explain 9[0-9]") as caught:
        check(numbers)
    assert caught.value.code == "wrong_convention" and caught.value.fix


def test_noise_is_refused_and_nothing_fits() -> None:
    numbers = {name: torch.randn(tensor.shape, generator=generator(5)) for name, tensor in Toy().sae().items()}
    with pytest.raises(WrongConvention, match="is the least that is taken"):
        check(numbers)
    turned = {**Toy().sae(), "decoder": Toy().sae()["decoder"].flip(0)}
    with pytest.raises(WrongConvention, match="is the least that is taken"):
        check(turned)


def test_a_poor_one_passes_where_that_is_said() -> None:
    numbers = Toy().sae()
    poor = {name: tensor[:2] if name != "decoder_bias" else tensor for name, tensor in numbers.items()}
    with pytest.raises(WrongConvention):
        check(poor)
    assert 0 < check(poor, least=0.05)["layers"]["2"]["explained"] < 0.5


def test_the_same_place_by_two_names_passes() -> None:
    assert check(Toy().sae("resid_post", 1), "resid_pre", 2)["layers"]["2"]["explained"] > 0.98


def test_given_texts_are_read() -> None:
    toy = Toy()
    found = check_reconstruction(Payload.build("sae", {2: toy.sae()}), "resid_post", toy, ["one two three"] * 20, 0.5)
    assert found["texts"] == "given" and found["layers"]["2"]["tokens"] == 20 * 12
    assert ("resid_post", (1, 2, 3)) in toy.asked and all(site != "mlp_act" for site, _ in toy.asked)


def test_a_layer_that_the_model_does_not_have() -> None:
    with pytest.raises(LayerOutOfRange):
        check(Toy().sae(), layer=9)


def test_explained_is_the_share_of_the_variance() -> None:
    h = torch.randn(50, 4, generator=generator(3))
    assert explained(h, h) == 1
    assert explained(h, h.mean(0).expand_as(h)) == pytest.approx(0, abs=1e-6)
    assert explained(h, h.mean(0) + 0.5 * (h - h.mean(0))) == pytest.approx(0.75, abs=1e-6)
    assert explained(h, torch.full_like(h, torch.nan)) == -torch.inf
