"""Gates, monitors and lenses through the client, on the bundled model."""

from collections.abc import Iterator
from typing import Any

import pytest
from trimtab_client import BadRequest, Client, NotFound

from lab.datasets import load
from tests.clients.test_client import WIDTH, numbers, vector

LAYERS = 6


@pytest.fixture(scope="module")
def client(lab_url: str) -> Iterator[Client]:
    with Client(lab_url) as made:
        yield made


@pytest.fixture(scope="module")
def harmful(client: Client) -> str:
    """A condition made from the committed prompts."""
    examples = [{"text": record["messages"], **{key: record[key] for key in ("label", "item", "split")}}
                for record in load("harmful_harmless")]
    found = client.extract(name="client-harmful", method="condition", examples=examples, target="harmful", pool="last")
    assert found.report["test"]["f1"] > found.report["controls"]["shuffled_labels"]["max"]
    assert found.report["test"]["f1"] > found.report["controls"]["bag_of_tokens"]["f1"]
    return found.artifact


def prompts(label: str) -> list[Any]:
    return [record["messages"] for record in load("harmful_harmless", "test") if record["label"] == label]


def test_a_gate_opens_for_the_prompts_of_its_kind(client: Client, harmful: str) -> None:
    client.create_artifact(vector("client-gated", strength={"value": 3.0, "unit": "raw"}), numbers(-9))
    gated = {"interventions": [{"artifact": "client-gated", "gate": {"probe": "client-harmful"}}]}
    right = 0
    for label in ("harmful", "harmless"):
        for messages in prompts(label)[:8]:
            plain = client.chat(messages, max_tokens=6, temperature=0)
            steered = client.chat(messages, steering="client-gated", max_tokens=6, temperature=0)
            answer = client.chat(messages, steering=gated, max_tokens=6, temperature=0)
            applied = answer.steering.applied[0]
            opened = applied.choices[0]["gate"]["open"]
            right += opened == (label == "harmful")
            assert answer.text == (steered.text if opened else plain.text)
            assert applied.tokens.prompt == (answer.usage.prompt_tokens if opened else 0)
            assert applied.gate is not None and applied.gate["conditions"][0]["probe"] == harmful
    assert right >= 14


def test_a_shut_gate_leaves_no_effect_and_an_open_one_is_measured(client: Client, harmful: str) -> None:
    client.create_artifact(vector("client-gated", strength={"value": 3.0, "unit": "raw"}), numbers(-9))
    messages = prompts("harmless")[0]

    def effects(direction: str) -> dict[str, Any]:
        gate = {"probe": harmful, "direction": direction}
        spec = {"interventions": [{"artifact": "client-gated", "gate": gate}], "report": "summary"}
        found = client.chat(messages, steering=spec, max_tokens=6, temperature=0).steering.effects
        assert found is not None
        return found

    assert effects("above")["status"] == "unsteered"
    opened = effects("below")
    assert opened["status"] == "measured" and opened["choices"][0]["total"]["kl"]["mean"] > 0.01


def test_monitors(client: Client, harmful: str) -> None:
    means = {}
    for label in ("harmful", "harmless"):
        messages = prompts(label)[1]
        plain = client.chat(messages, max_tokens=8, seed=3, logprobs=True)
        watched = client.chat(messages, max_tokens=8, seed=3, logprobs=True, steering={"monitor": [harmful]})
        assert plain.text == watched.text and plain.choices == watched.choices
        (report,) = watched.steering.monitor
        layer = str(report["layers"][0])
        choice = report["choices"][0]
        assert len(choice["prompt"][layer]) == watched.usage.prompt_tokens
        assert len(choice["generation"][layer]) == watched.usage.completion_tokens
        means[label] = choice["prompt"][layer][-1]
    assert means["harmful"] > 0 > means["harmless"]


def test_lens(client: Client) -> None:
    found = client.lens("cat -> cats , box -> boxes , dog ->", positions=[-1, 0], top_k=3,
                        groups={"answer": [" dogs", "dogs"]})
    assert [layer["layer"] for layer in found.layers] == list(range(LAYERS))
    last = found.layers[-1]["positions"][0]
    said = client.complete("cat -> cats , box -> boxes , dog ->", max_tokens=1, temperature=0, logprobs=3)
    assert last["top"][0]["text"] == said.text
    logprobs = said.choices[0].logprobs
    assert logprobs is not None
    assert last["top"][0]["logprob"] == pytest.approx(logprobs["token_logprobs"][0], abs=1e-3)
    assert last["groups"]["answer"]["rank"] <= found.layers[0]["positions"][0]["groups"]["answer"]["rank"]
    steered = client.lens("dog ->", layers=[1, 3], steering="client-lens-push") if client.create_artifact(
        vector("client-lens-push"), numbers(-9)) else None
    plain = client.lens("dog ->", layers=[1, 3])
    assert steered is not None and steered.layers[0] == plain.layers[0] and steered.layers[1] != plain.layers[1]
    assert steered.steering.applied[0].tokens.prompt == steered.tokens
    with pytest.raises(NotFound):
        client.lens("dog", lens="nobody")
    with pytest.raises(BadRequest):
        client.lens("dog", positions=[99])


def test_a_tuned_lens_foresees_more(client: Client) -> None:
    texts = [record["text"] for record in load("languages")][:60]
    found = client.extract(name="client-lens", method="tuned_lens", prompts=texts, max_tokens=4, max_eval=8)
    for layer in found.report["layers"].values():
        assert layer["explained"] > max(layer["explained_untuned"], layer["explained_other_tokens"])
    assert client.get_artifact("client-lens").kind == "diagonal"
    read = client.lens(texts[0], lens="client-lens", layers=[2])
    assert read.lens == "client-lens@1" and read.layers[0]["positions"][0]["top"]
    stored = {n: {"scale": [1.0] * WIDTH, "shift": [0.0] * WIDTH} for n in range(LAYERS)}
    identity = {"name": "client-identity", "kind": "diagonal", "op": "affine", "site": "resid_post"}
    client.create_artifact(identity, stored)
    assert client.lens(texts[0], lens="client-identity").layers == client.lens(texts[0]).layers


def test_a_direction_is_split_by_what_reads_it(client: Client) -> None:
    """Whole and parts on real weights: what the output projection does not see changes nothing."""
    ask = "What comes one day after {}? It is"
    days = ["Monday", "Tuesday", "Wednesday", "Thursday"]
    pairs = [{"base": ask.format(days[n]), "source": ask.format(days[n + 1]), "base_answer": f" {days[n + 1]}",
              "source_answer": f" {after}"} for n, after in ((0, "Wednesday"), (1, "Thursday"), (2, "Friday"))]
    width = client.capabilities()["sites"]["mlp_act"]["width"]
    vector = [(-1.0) ** n + n / width for n in range(width)]
    found = client.check_patch(pairs, site="mlp_act", layer=3, vector=vector)
    assert found.pairs == 3 and found.readers == ["output projection"] and found.seen == WIDTH
    assert found.row_norm ** 2 + found.null_norm ** 2 == pytest.approx(1) and found.null is not None
    assert abs(found.null["decrease"]) < 1e-3 and abs(found.null["kl"] - found.clean["kl"]) < 1e-3
    # In the residual stream before the unembedding, the whole activation makes the answer the source's.
    found = client.check_patch(pairs, site="resid_post", layer=4, artifact="weekdays",
                               readers=["unembedding", "attention.5", "mlp.5"])
    assert found.full["interchange"] == 1.0 and found.full["kl"] < 1e-3 and found.rank == 32
    with pytest.raises(BadRequest) as caught:
        client.check_patch(pairs, site="resid_post", layer=4, vector=[1.0] * WIDTH, readers=["attention.99"])
    assert caught.value.param == "readers"
    with pytest.raises(BadRequest) as caught:
        client.check_patch(pairs, site="mlp_act", layer=3, vector=[1.0] * 4)
    assert caught.value.param == "vector"


def test_a_stack_is_checked_with_its_preset(client: Client) -> None:
    client.create_artifact(vector("client-stacked", strength={"value": 3.0, "unit": "raw"}), numbers(-9))
    step = {"artifact": "client-stacked"}
    taken_out = {**step, "op": "ablate", "override": ["op"], "strength": 1}
    client.create_preset("client-stack", {"interventions": [step]})
    found = client.check_spec({"preset": "client-stack", "interventions": [taken_out]}, max_tokens=3)
    assert [(part["op"], part["origin"]) for part in found.interventions] == [("add", "preset"), ("ablate", "request")]
    assert found.pairs[0]["meetings"][0]["kept"] == pytest.approx(0.0, abs=1e-3) and found.tokens <= 48
    assert [one["do"] for one in found.advice][:1] == ["reorder"]
    with pytest.raises(BadRequest, match="a stack has at least two"):
        client.check_spec({"preset": "client-stack"})
