"""Entropic activation steering: a vector that makes an agent's choice of action less, or more, certain (Rahn et al.
2024, arXiv 2406.00244).

What the paper leaves open is decided here: the distribution of actions is read exactly from the model's next-token
probabilities of the actions' first tokens, not sampled; Z is the sum of entropies. Activations are centred within an
episode, as in the paper; where every prompt is an episode of its own, `center: step` centres across episodes at equal
step (which also takes the confound of time out), and `all` over all prompts. The layer is the one that moves entropy
most on dev, at the strength that is chosen there, too.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from steering.language.fields import Model
from steering.language.strength import Strength
from steering.language.vocabulary import Site
from steering.programs.program import Program
from vectors.extract.answers import MOST_QUESTIONS, AnsweredOptions
from vectors.extract.contract import Split
from vectors.extract.contrasts import text_of
from vectors.extract.data import SPLITS
from vectors.extract.items import Item, Splits, digest_of, split_items
from vectors.extract.programs import LAST, adding
from vectors.extract.recipe import Made, Recipe, site_layers
from vectors.extract.refusals import FitFailed, LeakingSplit, NoContrast, OneClass, TooFewExamples
from vectors.extract.scratch import Scratch
from vectors.extract.standing import correlation, random_like, rounded, standing
from vectors.extract.subject import Prompt, Subject, Tokens, answer_logprobs, encoded, first_token, stream
from vectors.extract.trial.plan import Question
from vectors.extract.work import Span, Work

SITE: Site = "resid_post"
# Below this standard deviation of entropies, in nats, the vector would be numerical noise.
MIN_SPREAD = 0.01
# A strength that costs the actions more probability than this is not chosen: its gain counts as a loss.
MAX_LOST_MASS = 0.05


class AgentPrompt(Model):
    """What the agent saw before it chose."""

    text: Prompt = Field(description="The history, up to where the action is named.")
    episode: Item = Field(description="The episode; its prompts share a split.")
    step: int = Field(default=0, ge=0, le=1_000_000, description="How many steps came before.")
    split: Split | None = Field(default=None, description="Fixed split; for all prompts or for none.")


class EntropicSteeringRequest(AnsweredOptions):
    """Logged prompts of an agent, and its actions."""

    prompts: Annotated[list[AgentPrompt], Field(min_length=1, max_length=100_000)]
    actions: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(min_length=2, max_length=64)]
    center: Literal["episode", "step", "all"] = Field(default="episode", description="What activations are centred on.")
    min_mass: float = Field(default=0.5, gt=0, le=1, description="Least mean probability of the actions together.")
    strengths: Annotated[list[Annotated[float, Field(gt=0, le=10)]], Field(min_length=1, max_length=16)] = Field(
        default=[0.1, 0.2, 0.4, 0.8], description="Strengths tried on dev, as shares of the mean residual norm.")
    max_eval: int = Field(default=100, ge=5, le=10_000, description="Most prompts of dev and test to steer.")


Histories = tuple[list[Tokens], list[int], Splits, str]
"""Texts, first tokens of the actions, splits, digest."""


class EntropicSteering(Recipe):
    name = "entropic_steering"
    summary = "vector along which an agent's choice of action becomes less certain"
    request = EntropicSteeringRequest
    without_massive = True
    ops = ("add",)
    sites = (SITE,)
    scope = LAST
    effect = "random_percentile"

    def prepare(self, request: EntropicSteeringRequest, subject: Subject) -> Histories:
        site_layers(request, SITE, subject.facts)
        return _data(request, subject)

    def questions(self, request: EntropicSteeringRequest, data: Histories) -> list[Question]:
        """Held-out histories."""
        texts, _, splits, _ = data
        return [Question(texts[n], text_of(request.prompts[n].text) or "") for n in splits["test"][:MOST_QUESTIONS]]

    def make(self, request: EntropicSteeringRequest, data: Histories, work: Work) -> Made:
        layers = site_layers(request, SITE, work.facts)
        texts, actions, splits, digest = data
        before = _certainty(answer_logprobs(work.subject, texts, work.within(0.0, 0.1, "capture"), tokens=actions))
        self._check(request, before, splits)
        groups = [prompt.episode if request.center == "episode" else prompt.step if request.center == "step" else 0
                  for prompt in request.prompts]
        train, dev, test = (list(splits[split]) for split in ("train", "dev", "test"))
        dev, test_steered = dev[:request.max_eval], test[:request.max_eval]
        generator = request.generator(1)
        with Scratch(layers, len(texts), work.facts.width(SITE)) as store:
            norms = dict.fromkeys(layers, 0.0)
            for n, found in stream(work.subject, texts, SITE, layers, [-1],
                                   work.within(0.1, 0.35, "capture"), without_massive=True):
                for layer in layers:
                    store.put(layer, n, found[layer][0])
                    norms[layer] += float(found[layer][0].norm()) / len(texts)
            centred = {layer: _centred(store.rows(layer, train), [groups[n] for n in train]) for layer in layers}
            vectors = {layer: weighted(centred[layer], before.entropy[train]) for layer in layers}
            scales = {layer: norms[layer] / float(vectors[layer].norm()) for layer in layers}

            def entropy(members: Sequence[int], span: Span, program: Program | None) -> "Certainty":
                return _certainty(answer_logprobs(work.subject, [texts[n] for n in members], span, program,
                                               tokens=actions))

            grid = [(layer, strength) for layer in layers for strength in request.strengths]
            span = work.within(0.35, 0.6, "fit")
            gains: dict[tuple[int, float], float] = {}
            for n, (layer, strength) in enumerate(grid):
                moved = entropy(dev, span.part(n, len(grid)),
                                adding(work.facts, SITE, layer, strength * scales[layer] * vectors[layer]))
                # An output that no longer names an action is no exploration.
                lost = float((before.mass[dev] - moved.mass).mean())
                gained = float((moved.entropy - before.entropy[dev]).mean())
                gains[layer, strength] = gained if lost <= MAX_LOST_MASS else -gained
            layer, strength = max(grid, key=lambda point: (gains[point], -point[0], -point[1]))
            best = vectors[layer] * scales[layer]
            sigma = {n: float((store.rows(n, train) @ (v / v.norm())).std(correction=0)) for n, v in vectors.items()}

            held_out = _centred(store.rows(layer, test), [groups[n] for n in test])
            h = before.entropy[test] - before.entropy[test].mean()
            read = correlation(held_out @ best, h)
            reading = {"random_vectors": standing(read, [correlation(held_out @ random_like(best, generator), h)
                                                         for _ in range(request.draws)])}
            permuted = [weighted(centred[layer], before.entropy[train][torch.randperm(len(train), generator=generator)])
                        for _ in range(request.draws)]
            reading["permuted_entropies"] = standing(read, [correlation(held_out @ u, h) for u in permuted])

        strengths = sorted({*(-c for c in request.strengths), *request.strengths})
        span = work.within(0.6, 0.7, "control")
        steered: dict[float, Certainty] = {}
        for n, c in enumerate(strengths):
            steered[c] = entropy(test_steered, span.part(n, len(strengths)), adding(work.facts, SITE, layer, c * best))
        start = before.entropy[test_steered]

        def gain(found: "Certainty") -> float:
            return float((found.entropy - start).mean())

        span = work.within(0.7, 1.0, "control")
        draws = {"random_vectors": [random_like(best, generator) for _ in range(request.draws)],
                 "permuted_entropies": [u * (best.norm() / u.norm()) for u in permuted]}
        effect = {}
        for i, (name, others) in enumerate(draws.items()):
            gained_by = [gain(entropy(test_steered, span.part(i * request.draws + n, 2 * request.draws),
                                      adding(work.facts, SITE, layer, strength * u))) for n, u in enumerate(others)]
            effect[name] = standing(gain(steered[strength]), gained_by)
        report: dict[str, Any] = {
            "method": self.name, "site": SITE, "center": request.center, "best_layer": layer, "best_strength": strength,
            "prompts": {split: len(members) for split, members in splits.items()},
            "entropy": {"mean": rounded(float(before.entropy.mean())), "std": rounded(float(before.entropy.std()))},
            "mass": rounded(float(before.mass.mean())),
            "dev": {str(n): {str(c): rounded(gains[n, c]) for c in request.strengths} for n in layers},
            "test": {"correlation": rounded(read),
                     "entropy_by_strength": {str(c): {"entropy": rounded(float(found.entropy.mean())),
                                                      "mass": rounded(float(found.mass.mean()))}
                                             for c, found in {0.0: Certainty(start, before.mass[test_steered]),
                                                              **steered}.items()}},
            "controls": {"reading": reading, "entropy_gain": effect}}
        return Made(
            kind="vector", op="add", site=SITE, numbers={n: {"vector": vectors[n] * scales[n]} for n in layers},
            default_layers=[layer], strength=Strength(value=strength, unit="rel"), residual_norm=norms,
            sigma={n: value for n, value in sigma.items() if value > 0}, report=report,
            sign_convention="positive strength makes the choice of action less certain",
            dev={"entropy_gain": rounded(gains[layer, strength])},
            test={"entropy_gain": effect["random_vectors"]["found"], "correlation": rounded(read)},
            card={"random_percentile": effect["random_vectors"]["percentile"],
                  "shuffled_percentile": effect["permuted_entropies"]["percentile"]},
            data={"data_hash": digest, "num_prompts": len(texts), "actions": list(request.actions)})

    def _check(self, request: EntropicSteeringRequest, before: "Certainty", splits: Splits) -> None:
        if float(before.mass.mean()) < request.min_mass:
            raise FitFailed(f"the actions together have probability {float(before.mass.mean()):.3f}, "
                            f"less than {request.min_mass}", param="actions",
                            fix="Spell the actions as they follow the prompts, or lower min_mass.")
        if float(before.entropy[list(splits["train"])].std(correction=0)) < MIN_SPREAD:
            raise OneClass("the model's entropy is the same after every prompt", param="prompts",
                           fix="Give histories of different length and outcome.")
        if request.center == "episode" and len({p.episode for p in request.prompts}) == len(request.prompts):
            raise NoContrast("every prompt is an episode of its own, so centring by episode leaves nothing",
                             param="center", fix='Use center "step" or "all".')


@dataclass(frozen=True)
class Certainty:
    """entropy: nats among the actions; mass: their probability together. Both `[num_prompts]`."""

    entropy: torch.Tensor
    mass: torch.Tensor


def weighted(centred: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """Sum of centred activations weighted by entropy, over the sum of entropies.

    Raises:
        FitFailed: it is zero.
    """
    u = entropy @ centred / entropy.sum()
    if not float(u.norm()) > 0:
        raise FitFailed("activations do not vary with entropy at all", param="prompts",
                        fix="Give episodes of several steps, or center all.")
    return u


def _certainty(logprobs: torch.Tensor) -> Certainty:
    mass = logprobs.logsumexp(dim=1)
    among = logprobs - mass.unsqueeze(1)
    return Certainty(-(among.exp() * among).sum(dim=1), mass.exp())


def _centred(rows: torch.Tensor, groups: Sequence[Hashable]) -> torch.Tensor:
    out = rows.clone()
    for group in set(groups):
        members = [n for n, other in enumerate(groups) if other == group]
        out[members] -= rows[members].mean(dim=0)
    return out


def _data(request: EntropicSteeringRequest, subject: Subject) -> Histories:
    """Histories, first tokens of the actions, splits and digest."""
    actions = [first_token(subject, action, ("actions", n)) for n, action in enumerate(request.actions)]
    if len(set(actions)) < len(actions):
        raise NoContrast("two actions begin with the same token", param="actions",
                         fix="Name actions whose first tokens differ.")
    texts = [encoded(subject, prompt.text, ("prompts", n, "text")) for n, prompt in enumerate(request.prompts)]
    episodes = [prompt.episode for prompt in request.prompts]
    seen: dict[Tokens, int] = {}
    for n, text in enumerate(texts):
        first = seen.setdefault(text, n)
        # Short histories recur in many episodes; only across given splits would one be a leak.
        if first != n and request.prompts[first].split != request.prompts[n].split:
            raise LeakingSplit(f"the text repeats prompts[{first}], in another split", param=("prompts", n),
                               fix="Leave it out.")
    splits = split_items(episodes, [prompt.split for prompt in request.prompts], request.seed, "prompts")
    # A recurring history stays in train, or else in dev, so that no score rests on a text seen in fitting.
    home: dict[Tokens, Split] = {}
    for split in reversed(SPLITS):
        home.update(dict.fromkeys((texts[n] for n in splits[split]), split))
    kept = {split: tuple(n for n in members if home[texts[n]] == split) for split, members in splits.items()}
    if min(map(len, kept.values())) < 2:
        raise TooFewExamples("a split is left without prompts of its own", param="prompts", fix="Give more episodes.")
    return texts, actions, kept, digest_of([texts, actions, episodes, {s: list(m) for s, m in kept.items()}])


METHOD = EntropicSteering()
