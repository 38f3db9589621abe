"""The sweep over a toy model whose KL is known in closed form: the square of the distance that a program moves."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steering.artifacts.payload import Payload
from steering.artifacts.source import Source
from steering.language.errors import SteeringLimit, SteeringOverflow, TrimtabError
from steering.models.facts import ModelFacts
from steering.programs.program import Program
from tests.vectors.making import metadata, open_library, vector_payload
from vectors.artifact import InvalidMetadata, Metadata, Patch
from vectors.calibrate.bench import Trial
from vectors.calibrate.known import Known
from vectors.calibrate.options import CalibrateOptions
from vectors.calibrate.placebo import random_like
from vectors.calibrate.plot import draw
from vectors.calibrate.refusals import CalibrationCancelled, CalibrationFailed
from vectors.calibrate.run import calibrate
from vectors.calibrate.scorer import WordsScorer
from vectors.calibrate.seek import LOOSE, Seeker
from vectors.calibration import KEY, calibration_of, with_settings
from vectors.extract.refusals import EmptyText
from vectors.extract.subject import Programs, one_each

FACTS = ModelFacts("toy", "f" * 64, "qwen3", 4, 8, 2, 4, 16, 50, 128,
                   sites={"resid_post": (0, 1, 2, 3), "resid_pre": (0, 1, 2, 3), "mlp_act": (0, 1, 2, 3)})
ALONG = torch.nn.functional.one_hot(torch.tensor(0), 8).float()
PROMPTS = [[i + 1, 2, 3] for i in range(12)]


class Toy:
    """KL is |delta|^2 along the first axis and a quarter of that across it; "good" is said from a delta of 1 on."""

    facts = FACTS

    def __init__(self) -> None:
        self.asked: list[tuple[int, Program | None]] = []
        self.batches: list[int] = []
        self.noise = 0.5

    def encode(self, prompt: Any) -> tuple[int, ...]:
        return tuple(prompt) if isinstance(prompt, list) else tuple(ord(letter) % 50 for letter in prompt)

    def trials(self, prompts: Sequence[Sequence[int]], program: Programs, max_tokens: int, temperature: float,
               seed: int | Sequence[int]) -> list[Trial]:
        programs = one_each(program, len(prompts))
        assert not isinstance(seed, int)
        self.batches.append(len(prompts))
        return [self.trial(own, own_seed) for own, own_seed in zip(programs, seed, strict=True)]

    def trial(self, program: Program | None, seed: int) -> Trial:
        self.asked.append((seed, program))
        moved = torch.zeros(8)
        for item in program.compiled if program is not None else ():
            for row in item.rows.values():
                moved += row.tensors["delta"] if "delta" in row.tensors else row.tensors["up"][0]
        along = float(moved[0])
        kl = along**2 + 0.25 * (float(moved.norm()) ** 2 - along**2)
        text = "so good" if along >= 1 else "so bad" if along <= -1 else "so so"
        return Trial(kl=kl * (1 + self.noise * (-1) ** seed), surprise=1.0 + kl, repetition=min(kl / 10, 1.0),
                     compression=1.0, length=4, ended=False, text=text)


def source(**fields: Any) -> Source:
    payload = Payload.build("vector", {n: {"vector": ALONG * 2} for n in (1, 2)})
    return Source("cheerful@1", "d" * 64, payload, **{"op": "add", "site": "resid_post", "layers": [2], **fields})


def options(**fields: Any) -> CalibrateOptions:
    return CalibrateOptions.model_validate({"prompts": PROMPTS, "draws": 20, **fields})


def run(given: Source, wanted: CalibrateOptions, bench: Any = None) -> Any:
    return calibrate(given, wanted, bench or Toy(), lambda share, stage: None, lambda: False)


TARGET = {"prompts": PROMPTS, "scorer": {"kind": "words", "any": ["good"], "none": ["bad"]}}


def test_curves_equal_the_closed_form_and_cover_the_reach() -> None:
    [setting] = run(source(), options(target=TARGET))
    for side in (setting.up, setting.down):
        assert len(side) == 5
        assert [p.kl for p in side] == pytest.approx([4 * p.strength**2 for p in side], rel=1e-5, abs=1e-6)
        assert 0.02 / LOOSE <= side[0].kl <= 0.02 and 2 <= side[-1].kl <= 2 * LOOSE
        assert [p.repetition for p in side] == sorted(p.repetition for p in side)
    assert [p.target for p in setting.up] == [float(2 * p.strength >= 1) for p in setting.up]
    assert all(p.target == 0 for p in setting.down) and setting.base.target == 0
    calibrated = setting.calibrated()
    for dose in (0.1, 0.5, 1.0):
        assert 4 * calibrated.strength(dose) ** 2 == pytest.approx(dose, rel=1e-3)
        assert calibrated.strength(-dose) == pytest.approx(-calibrated.strength(dose))


class Bounded(Toy):
    """Values stop being finite, or a step goes over the server's limit, from a delta of `bears` on."""

    def __init__(self, bears: float, error: type[TrimtabError]) -> None:
        super().__init__()
        self.bears, self.error = bears, error

    def trial(self, program: Program | None, seed: int) -> Trial:
        for item in program.compiled if program is not None else ():
            if any(float(row.tensors["delta"].norm()) > self.bears for row in item.rows.values()):
                raise self.error("intervention 0 makes values that are not finite", param="steering.interventions[0]")
        return super().trial(program, seed)


@pytest.mark.parametrize("error", [SteeringOverflow, SteeringLimit])
def test_a_range_ends_below_what_the_model_bears(error: type[TrimtabError]) -> None:
    """Doubling steps over it long before the KL that was asked for: the curve ends there, and is right up to there."""
    [setting] = run(source(), options(reach=[0.02, 50.0]), Bounded(3.0, error))
    assert max(p.strength for p in setting.up) <= 1.5
    assert max(p.strength for p in setting.up) > 0.75, "half of it at least is looked at"
    assert [p.kl for p in setting.up] == pytest.approx([4 * p.strength**2 for p in setting.up], rel=1e-4)
    [free] = run(source(), options(reach=[0.02, 50.0]))
    assert max(p.strength for p in free.up) > 3.0


def test_a_rung_that_the_model_does_not_bear_is_named() -> None:
    with pytest.raises(CalibrationFailed, match="strength 2 is more") as found:
        run(source(), options(strengths=[0.5, 1.0, 2.0]), Bounded(3.0, SteeringOverflow))
    assert found.value.param == "strengths" and "not finite" in found.value.message
    with pytest.raises(CalibrationFailed):
        run(source(), options(), Bounded(1e-9, SteeringOverflow))


def test_the_floor_is_of_random_directions_of_equal_norm() -> None:
    bench = Toy()
    [setting] = run(source(), options(), bench)
    assert setting.draws == 20 and len(setting.floor) == 2
    for row in setting.floor:
        # In eight dimensions a direction of length 2 has an eighth of its square along one axis, on average.
        expected = 4 * row.strength**2 * (0.25 + 0.75 / 8)
        assert row.kl.low < expected < row.kl.high and row.kl.median == pytest.approx(expected, rel=0.35)
        assert row.kl.high < 4 * row.strength**2
    directions = {float(program.compiled[0].rows["resid_post", 2].tensors["delta"][0] / setting.floor[-1].strength)
                  for _, program in bench.asked[-20 * 4:] if program is not None}
    assert len(directions) == 20


def test_each_layer_set_is_a_setting_and_only_the_first_has_a_floor() -> None:
    found = run(source(), options(layers=[[1], [1, 2]], strengths=[0.1, 0.2, 0.4]))
    assert [(s.layers, bool(s.floor), len(s.up)) for s in found] == [((1,), True, 3), ((1, 2), False, 3)]
    assert found[1].up[0].kl == pytest.approx(4 * found[0].up[0].kl)


def test_ops_without_a_direction_have_shares_and_one_sign() -> None:
    [setting] = run(source(op="ablate", site="resid_pre"), options())
    assert setting.down == () and setting.up[0].strength == 0.2 and setting.up[-1].strength == 1.0
    assert setting.calibrated().down is None


def test_what_does_nothing_is_refused() -> None:
    class Deaf(Toy):
        def trial(self, program: Program | None, seed: int) -> Trial:
            return super().trial(None, seed)

    with pytest.raises(CalibrationFailed):
        run(source(), options(strengths=[0.5, 1.0]), Deaf())
    with pytest.raises(CalibrationFailed):
        run(source(op="ablate", site="resid_pre"), options(), Deaf())


def test_cancelling_and_bad_prompts() -> None:
    with pytest.raises(CalibrationCancelled):
        calibrate(source(), options(), Toy(), lambda share, stage: None, lambda: True)  # type: ignore[arg-type]
    with pytest.raises(EmptyText) as caught:
        run(source(), options(prompts=["fine"] * 8 + [" "]))
    assert caught.value.param == "prompts[8]"


@pytest.mark.parametrize("start", [1e-4, 0.05, 1.0, 300.0])
@pytest.mark.parametrize("curve", [lambda s: 4 * s**2, lambda s: 4 * s**2 / (1 + s**2), lambda s: 0.3 * s,
                                   lambda s: s**4])
def test_roots_are_found_in_few_tries_from_anywhere(curve: Any, start: float) -> None:
    seen: list[float] = []

    def measure(strength: float) -> float:
        seen.append(strength)
        return float(curve(strength))

    seeker = Seeker(measure, start)
    low, high = seeker.below(0.02), seeker.above(2.0)
    assert low is not None and high is not None
    assert 0.02 / LOOSE <= curve(low) <= 0.02 and 2 <= curve(high) <= 2 * LOOSE
    assert len(seen) == len(set(seen)) <= 10


def test_a_curve_that_comes_to_its_end_is_not_followed_for_ever() -> None:
    seen: list[float] = []

    def measure(strength: float) -> float:
        seen.append(strength)
        return strength**2 / (1 + strength**2)

    seeker = Seeker(measure, 1.0)
    above = seeker.above(2.0)
    assert above == max(seen) and measure(above) > 0.9 and len(seen) <= 6


def test_a_root_beyond_what_the_model_bears_is_the_last_strength_that_it_does() -> None:
    seeker = Seeker(lambda strength: float("inf") if strength > 3 else strength**2, 0.5)
    above = seeker.above(100.0)
    assert above is not None and 2 < above <= 3
    assert Seeker(lambda strength: float("inf"), 1.0).above(1.0) is None


def test_draws_run_in_whole_batches_on_no_more_prompts_than_their_precision_asks_for() -> None:
    even, uneven = Toy(), Toy()
    even.noise, uneven.noise = 0.0, 0.9
    prompts = [[i + 1, 2, 3] for i in range(16)]
    [quiet], [loud] = run(source(), options(prompts=prompts), even), run(source(), options(prompts=prompts), uneven)
    assert [row.prompts for row in quiet.floor] == [4, 4] and loud.floor[-1].prompts == 16
    # 20 draws on 4 prompts: two batches, not twenty.
    assert even.batches[-2:] == [64, 16]
    assert [point.completions for point in quiet.up] == [8] * 5 and quiet.up[0].kl_error == 0
    assert [point.completions for point in loud.up] == [None] * 5
    # With a target every prompt counts for its score.
    [scored] = run(source(), options(prompts=prompts, target=TARGET), Toy())
    assert [point.completions for point in scored.up] == [None] * 5


class Dies(Toy):
    """Its process ends after so many batches."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def trials(self, *given: Any) -> list[Trial]:
        if len(self.batches) == self.after:
            raise KeyboardInterrupt
        return super().trials(*given)


def test_a_calibration_that_was_cut_off_goes_on_from_there(tmp_path: Any) -> None:
    path, whole = tmp_path / "kept.jsonl", Toy()
    expected = run(source(), options(), whole)
    first = Dies(6)
    with pytest.raises(KeyboardInterrupt):
        calibrate(source(), options(), first, lambda share, stage: None, lambda: False, known=Known(path))  # type: ignore[arg-type]
    with path.open("a") as file:
        file.write('["a line that was cut')
    rest, known = Toy(), Known(path)
    found = calibrate(source(), options(), rest, lambda share, stage: None, lambda: False, known=known)  # type: ignore[arg-type]
    assert found == expected
    assert len(rest.asked) == len(whole.asked) - len(first.asked) > 0
    known.forget()
    assert not path.exists()


def test_a_curve_is_extended_to_doses_beyond_it_and_only_they_are_measured() -> None:
    [former] = run(source(), options(reach=[0.05, 0.5]))

    def extended(**fields: Any) -> Any:
        bench = Toy()
        wanted = options(extend=True, **{"reach": [0.05, 8.0], **fields})
        return bench, calibrate(source(), wanted, bench, lambda share, stage: None, lambda: False, [former])  # type: ignore[arg-type]

    bench, [found] = extended()
    assert found.up[:5] == former.up and found.down[:5] == former.down and found.base == former.base
    assert found.up[-1].kl >= 8 and len(found.up) == len(found.down) > 5
    assert [p.kl for p in found.up] == pytest.approx([4 * p.strength**2 for p in found.up], rel=1e-5, abs=1e-6)
    assert found.floor[:2] == former.floor and found.floor[-1].strength == found.up[-1].strength
    assert found.calibrated().strength(5.0) == pytest.approx((5 / 4) ** 0.5, rel=1e-2)
    assert all(program is None or abs(float(program.compiled[0].rows["resid_post", 2].tensors["delta"].norm()))
               > 2 * former.up[-1].strength for _, program in bench.asked)
    for fields, param in (({"seed": 3}, "seed"), ({"prompts": PROMPTS[:9]}, "prompts"),
                          ({"reach": [0.06, 0.4]}, "reach"), ({"layers": [[1]]}, "extend")):
        with pytest.raises(CalibrationFailed) as refused:
            extended(**fields)
        assert refused.value.param == param


def test_progress_rises_to_the_end() -> None:
    seen: list[float] = []
    calibrate(source(), options(layers=[[1], [2]]), Toy(), lambda share, stage: seen.append(share),  # type: ignore[arg-type]
              lambda: False)
    assert max(seen) <= 1 and seen[-1] > 0.5 and seen[0] == 0


@pytest.mark.parametrize("fields", [
    {"prompts": PROMPTS[:3]}, {"reach": [2.0, 0.1]}, {"strengths": [1.0]}, {"strengths": [2.0, 1.0]},
    {"strengths": [0.0, 1.0]}, {"draws": 0}, {"temperature": 0}, {"surprise": 1},
    {"target": {"prompts": PROMPTS, "scorer": {"kind": "judge"}}}, {"target": {"prompts": PROMPTS}},
])
def test_malformed_options(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        options(**fields)


def test_words_are_whole_and_any_case() -> None:
    def said(*texts: str) -> list[Trial]:
        return [Trial(0, 0, 0, 0, 1, False, text) for text in texts]

    scorer = WordsScorer(any=["good", "very nice", "c++"], none=["bad"])
    assert scorer.score(said("Good!", "goodness", "it is VERY nice", "good but bad", "c++", "")) == 0.5


@pytest.mark.parametrize("kind", ["vector", "subspace", "sign_pattern", "dim_mask", "neuron_set", "affine", "probe",
                                  "manifold", "diagonal"])
def test_placebos_keep_shape_norm_and_count_and_nothing_else(kind: str) -> None:
    from tests.vectors.making import every_kind

    given, payload = every_kind()[kind]
    facts = ModelFacts("toy", "f" * 64, "qwen3", 8, 32, 4, 8, 64, 50, 128)
    if kind not in ("vector", "subspace", "affine", "probe", "manifold", "diagonal"):
        drawn = random_like(payload, facts, given.site, 1)
    else:
        drawn = random_like(payload, ModelFacts("toy", "f" * 64, "qwen3", 8, 16, 4, 4, 64, 50, 128), given.site, 1)
    again = random_like(payload, facts, given.site, 2)
    assert drawn.kind == kind and list(drawn.layers) == list(payload.layers)
    changed = 0
    for layer, tensors in payload.layers.items():
        for name, tensor in tensors.items():
            other = drawn.layers[layer][name]
            assert other.shape == tensor.shape and other.dtype == tensor.dtype
            if tensor.is_floating_point() and name in ("vector", "weight", "up", "down"):
                assert torch.allclose(other.norm(dim=-1), tensor.norm(dim=-1), rtol=1e-4)
            elif name in ("polarity", "value"):
                assert torch.equal(other.sort().values, tensor.sort().values)
            changed += not torch.equal(other, tensor) and not torch.equal(other, again.layers[layer][name])
    assert changed


def test_cards_keep_other_settings_of_the_same_weights_and_what_else_they_hold() -> None:
    first, second = run(source(), options(layers=[[1], [2]], strengths=[0.1, 0.2, 0.4]))
    card = with_settings({"layer": 2}, [first])
    card = with_settings(card, [second])
    found = calibration_of(card)
    assert card["layer"] == 2 and found is not None and [s.layers for s in found.settings] == [(2,), (1,)]
    renewed = first.model_copy(update={"seed": 7})
    found = calibration_of(with_settings(card, [renewed]))
    assert found is not None and [(s.layers, s.seed) for s in found.settings] == [((1,), 7), ((2,), 0)]
    elsewhere = first.model_copy(update={"fingerprint": "e" * 64})
    found = calibration_of(with_settings(card, [elsewhere]))
    assert found is not None and len(found.settings) == 1


def test_the_library_reads_doses_from_the_card_as_it_is_now(tmp_path: Any) -> None:
    library = open_library(tmp_path)
    artifact = library.create(metadata(layers=[1]), vector_payload(1))
    assert library.source("cheerful").calibrated == ()
    settings = run(library.source("cheerful"), options(strengths=[0.1, 0.2, 0.4]))
    library.add_calibration(artifact.ref, settings)
    assert library.source("cheerful").calibrated == (settings[0].calibrated(),)
    other = open_library(tmp_path)
    assert other.source("cheerful").calibrated
    library.patch("cheerful", Patch(card=None))
    assert library.source("cheerful").calibrated == other.source("cheerful").calibrated == ()
    library.close()
    other.close()


@pytest.mark.parametrize("card", [{KEY: 3}, {KEY: {"settings": []}}, {KEY: {"version": 2, "settings": []}}])
def test_a_card_that_is_no_calibration_is_refused(card: Any) -> None:
    with pytest.raises(InvalidMetadata, match="calibration"):
        Metadata.parse({"name": "a", "kind": "vector", "op": "add", "site": "resid_post", "card": card})


def test_a_dose_is_no_default_strength() -> None:
    with pytest.raises(InvalidMetadata, match="default strength"):
        metadata(strength={"value": 0.5, "unit": "kl"})


@pytest.mark.parametrize("format, start", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_picture_has_every_panel_and_the_floor(format: Any, start: bytes) -> None:
    [setting] = run(source(), options(target=TARGET))
    picture = draw(setting, "cheerful@1", format)
    assert picture.startswith(start) and len(picture) > 10_000
    assert draw(setting, "cheerful@1", "png") == draw(setting, "cheerful@1", "png")
    bare = setting.model_copy(update={"floor": ()})
    assert draw(bare, "cheerful@1", format) != picture
