"""The check of a stack: figures are those of plain hooks on the model, planted erasures and orders are found, what does
not meet is told of nothing, and where log-probabilities add up the prediction is exact."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from lab.paths import LAB_DIR
from lab.replications.common import subject
from steering.artifacts.payload import Payload
from steering.artifacts.source import Resolved, Source
from steering.language.errors import InvalidRequest
from steering.language.intervention import Intervention
from steering.programs.compiler import compile_program
from steering.programs.program import Program
from tests.vectors.extract.toy import D_MODEL, VOCAB, Toy, noise, unit
from vectors.extract.local import LocalSubject
from vectors.stacks.report import Part, StackCheck
from vectors.stacks.run import Text, check

WIDTH, LAYER, TOKENS = 128, 2, 6
ASKED = ("Review: I received the jacket on Wednesday.", "There was a goose in the tower,", "All at once the waiter")


@pytest.fixture(scope="module")
def model() -> LocalSubject:
    assert LAB_DIR.is_dir()
    return subject("lab-dense")


def direction(*key: object, length: float = 1.0) -> torch.Tensor:
    return (length * unit("stack", *key, width=WIDTH)).float()


def step(op: str, vector: torch.Tensor, layer: int = LAYER, **fields: Any) -> Resolved:
    source = Source(ref=f"{op}@1", digest="", payload=Payload.build("vector", {layer: {"vector": vector}}), op="add",
                    site="resid_post")
    wanted = {"artifact": source.ref, "op": op, "override": ["op"], **fields}
    return Resolved(Intervention.model_validate(wanted), source)


def index_set(op: str, kind: Any, name: str, members: list[int], site: Any, layer: int = LAYER) -> Resolved:
    payload = Payload.build(kind, {layer: {name: torch.tensor(members)}})
    source = Source(ref=f"{op}@1", digest="", payload=payload, op=op, site=site)  # type: ignore[arg-type]
    return Resolved(Intervention(artifact=source.ref), source)


def checked(model: Any, *steps: Resolved, prompts: Sequence[str] = ASKED, **options: Any) -> StackCheck:
    program = compile_program(steps, model.facts)
    texts = [Text(model.encode(prompt)) for prompt in prompts]
    return check(program, parts_of(program), texts, TOKENS, model, **options)


def parts_of(program: Program) -> list[Part]:
    return [Part(op=one.op, artifact=one.applied.artifact, sites=list(one.applied.sites),
                 layers=list(one.applied.layers), kl=0.0) for one in program.compiled]


def plain_kl(model: LocalSubject, *hooks: tuple[int, Any]) -> float:
    """KL(steered || untouched) by hooks of torch on the layers, over the tokens that the model itself writes."""
    total, tokens = 0.0, 0
    for prompt in ASKED:
        ids = torch.tensor([model.encode(prompt)])
        with torch.no_grad():
            text = model.model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
            rows = []
            for steered in (True, False):
                with ExitStack() as stack:
                    for layer, edit in hooks if steered else ():
                        handle = model.model.model.layers[layer].register_forward_hook(
                            lambda module, given, output, edit=edit: (edit(output[0]), *output[1:])
                            if isinstance(output, tuple) else edit(output))
                        stack.callback(handle.remove)
                    logits = model.model(text).logits[0, ids.shape[1] - 1:-1]
                rows.append(logits.double().log_softmax(-1))
        total += float((rows[0].exp() * (rows[0] - rows[1])).sum())
        tokens += len(rows[0])
    return total / tokens


def test_what_each_does_alone_and_all_together_is_what_plain_hooks_do(model: LocalSubject) -> None:
    one, other = direction(1, length=40.0), direction(2, length=60.0)
    found = checked(model, step("add", one), step("add", other, LAYER + 2), step("ablate", direction(3), LAYER + 1))

    def taken(h: torch.Tensor) -> torch.Tensor:
        return h - (h @ direction(3))[..., None] * direction(3)

    hooks = [(LAYER, lambda h: h + one), (LAYER + 2, lambda h: h + other), (LAYER + 1, taken)]
    alone = [plain_kl(model, hook) for hook in hooks]
    assert [part.kl for part in found.interventions] == pytest.approx(alone, rel=1e-3)
    assert found.measured == pytest.approx(plain_kl(model, *hooks), rel=1e-3)
    assert found.measured_interference == pytest.approx(found.measured - sum(p.kl for p in found.interventions))
    assert found.tokens == TOKENS * len(ASKED) and found.texts == len(ASKED)


def test_an_ablation_behind_an_addition_of_the_same_direction_erases_it(model: LocalSubject) -> None:
    v = direction(1, length=4.0)
    found = checked(model, step("add", v), step("ablate", v))
    [pair], [advice] = found.pairs, found.advice
    meeting = pair.meetings[0]
    assert meeting.kept == pytest.approx(0.0, abs=1e-4) and meeting.exchanged == pytest.approx(1.0, abs=1e-4)
    assert meeting.cosine == pytest.approx(1.0, abs=1e-4) and meeting.order is not None and meeting.order > 0.3
    assert (advice.finding, advice.do, advice.interventions) == ("erased", "reorder", [0, 1])
    # The pair was run, so that the prediction is right though nothing adds up.
    assert pair.measured and found.predicted == pytest.approx(found.measured, rel=1e-4)
    assert found.measured == pytest.approx(found.interventions[1].kl, rel=1e-3)
    # In the order that is advised both act.
    other = checked(model, step("ablate", v), step("add", v))
    assert advice.kl == pytest.approx(other.measured, rel=1e-4) and advice.kl > 2 * found.measured
    assert not [one for one in other.advice if one.finding in ("erased", "reversed")]
    # The control: a direction at a right angle.
    across = direction(2) - (direction(2) @ direction(1)) * direction(1)
    beside = checked(model, step("add", v), step("ablate", across))
    assert beside.pairs[0].meetings[0].kept == pytest.approx(1.0, abs=1e-4)
    assert beside.pairs[0].meetings[0].order == pytest.approx(0.0, abs=1e-4) and not beside.pairs[0].measured
    assert not [one for one in beside.advice if one.finding == "erased"]


def test_a_later_layer_takes_out_what_an_earlier_one_added(model: LocalSubject) -> None:
    v = direction(1, length=4.0)
    for steps in ([step("add", v, 1), step("ablate", v, 3)], [step("ablate", v, 3), step("add", v, 1)]):
        found = checked(model, *steps)
        meeting = found.pairs[0].meetings[0]
        assert (meeting.layer, meeting.from_layer, meeting.exchanged) == (3, 1, None)
        assert meeting.kept == pytest.approx(0.0, abs=1e-4)
        [advice] = found.advice
        assert (advice.finding, advice.do) == ("erased", "drop")
        # The one that acts first is named first, whatever the order in the spec.
        assert found.interventions[advice.interventions[0]].op == "add"
    backwards = checked(model, step("ablate", v, 1), step("add", v, 3))
    assert backwards.pairs[0].meetings[0].kept == pytest.approx(1.0, abs=1e-4)


def test_two_alike_and_two_against_each_other(model: LocalSubject) -> None:
    v = direction(1, length=3.0)
    alike = checked(model, step("add", v), step("add", v))
    assert alike.pairs[0].correlation == pytest.approx(1.0, abs=1e-4)
    # Small steps: together four times what one does, so the sum of both again.
    assert alike.interference == pytest.approx(alike.sum_of_parts, rel=0.2)
    assert alike.measured_interference == pytest.approx(alike.sum_of_parts, rel=0.2)
    assert [one.finding for one in alike.advice] == ["together"]
    against = checked(model, step("add", v), step("add", v, strength=-1.0))
    assert against.pairs[0].correlation == pytest.approx(-1.0, abs=0.02)
    assert against.measured == pytest.approx(0.0, abs=1e-6) and [one.finding for one in against.advice] == ["against"]
    assert against.predicted < 0.1 * against.sum_of_parts


def test_tokens_that_only_one_touches_are_no_meeting(model: LocalSubject) -> None:
    v = direction(1, length=4.0)
    found = checked(model, step("add", v, scope={"prompt": "all", "generation": "none"}),
                    step("ablate", v, scope={"prompt": "none", "generation": "all"}))
    assert found.pairs[0].meetings == [] and not found.pairs[0].measured
    nothing = checked(model, step("add", v), step("add", v, scope={"prompt": {"token_ids": [0]}, "generation": "none"}))
    assert [(one.finding, one.interventions) for one in nothing.advice] == [("idle", [1])]


def test_shared_neurons_and_heads_are_named(model: LocalSubject) -> None:
    neurons = [index_set("neuron_mask", "neuron_set", "neurons", members, "mlp_act")
               for members in ([1, 5, 9], [5, 9, 30])]
    found = checked(model, *neurons)
    assert found.pairs[0].meetings[0].shared == [5, 9]
    heads = [index_set("head_mask", "head_set", "heads", members, "head_out") for members in ([0, 2], [2, 3])]
    assert checked(model, *heads).pairs[0].meetings[0].shared == [2]
    apart = [index_set("head_mask", "head_set", "heads", members, "head_out") for members in ([0], [3])]
    assert checked(model, *apart).pairs[0].meetings[0].shared == []


def test_fewer_than_two_that_act_are_no_stack(model: LocalSubject) -> None:
    v = direction(1)
    with pytest.raises(InvalidRequest, match="1 of the interventions act"):
        checked(model, step("add", v), step("add", v, strength=0.0))


class Linear(Toy):
    """Log-odds are a linear map of the residual stream."""

    def read(self, ids: Any, resid: torch.Tensor) -> torch.Tensor:
        return torch.stack([noise("read", n, width=VOCAB) for n in range(D_MODEL)], dim=1) @ resid / 8

    def continuation_rows(self, text: Sequence[int], start: int, program: Program | None = None,
                          roles: Any = None) -> torch.Tensor:
        return torch.stack([self.forward(text[:n], program, start, {}).log_softmax(-1) for n in range(start, len(text))]
                           ).float()


def test_where_log_odds_add_up_the_prediction_is_exact_without_running_a_pair() -> None:
    toy = Linear()
    steps = []
    for n, layer in enumerate((0, 1, 1)):
        payload = Payload.build("vector", {layer: {"vector": (1.5 * unit("toy", n)).float()}})
        source = Source(ref=f"toy-{n}", digest="", payload=payload, op="add", site="resid_post")
        steps.append(Resolved(Intervention(artifact=source.ref), source))
    found = checked(toy, *steps, prompts=["one two", "three"])
    assert not any(pair.measured for pair in found.pairs)
    assert found.predicted == pytest.approx(found.measured, rel=1e-4)
    assert abs(found.interference) > 0.01 * found.sum_of_parts
    # To second order what is beyond the sum is the sum of covariances.
    small = [Resolved(one.intervention, one.source, factor=0.02) for one in steps]
    found = checked(toy, *small, prompts=["one two", "three"])
    kl = [part.kl for part in found.interventions]
    second = sum(2 * pair.correlation * (kl[pair.first] * kl[pair.second]) ** 0.5 for pair in found.pairs)
    assert found.interference == pytest.approx(second, rel=0.1)
