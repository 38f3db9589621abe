"""Do monitors of normality tell text that is not normal, better than entropy, surprise and repetition do?

An artifact is made from normal texts. What the model says to other prompts is normal text; beside it stands text of
equal length that is not. All of it is read by the untouched model, and the score of a text is the mean over LENGTH
tokens. `python -m lab.replications.not_normal FOLDER` does the same on a SmolLM2, in a quarter of an hour of a core;
`--json` writes all figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab.datasets import load
from lab.paths import LAB_DIR, MODEL_NAMES, model_path
from lab.replications.common import Case, Document, Finding, Row, extracted
from steering.artifacts.normality import NORMAL_FORMS, WINDOWED, normal_scores
from steering.models.describe import model_facts
from steering.models.fingerprints import fingerprint
from vectors.artifact import Limits
from vectors.extract import Extraction
from vectors.extract.local import LocalSubject
from vectors.extract.standing import auc, auc_error
from vectors.extract.subject import Tokens, Turn
from vectors.formats import get_format

CASE, LENGTH, BATCH = "normal", 32, 16
PLAINER = ("entropy", "surprise", "repetition")
# Times the strength at which the bundled tone is visible and whole.
DOSES = (1.0, 4.0)
SUBJECTS = ("a bridge", "the harbour", "winter", "a teacher", "bread", "the moon", "a train", "honey", "a hospital",
            "the desert", "a violin", "paper", "a garden", "the brain", "a storm", "coffee", "a museum", "glass",
            "the city", "an engine", "sleep", "a forest", "money", "the law", "a lighthouse", "wool", "a farmer",
            "the river", "a map", "salt")
ASKED = ("What is {}?", "Tell me about {}.", "Why does {} matter?", "Describe {}.", "Write a sentence about {}.",
         "What do people say about {}?")
# "It is raining." and other plain things, for a model that speaks no other language well.
FRENCH = LAB_DIR / "real" / "data" / "french_pairs.jsonl"
Score = Callable[[Tokens, int], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with a SmolLM2")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measured(options.folder)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(table(found)))


def cases(model: LocalSubject) -> Iterator[Case]:
    yield Case(CASE, "normality", {"prompts": [record["text"] for record in load("neutral")[::2]]})


def measure(model: LocalSubject, found: Mapping[str, Extraction]) -> Document:
    """Beginnings of texts that the artifact was not made from, gone on with by the model."""
    tokenizer = AutoTokenizer.from_pretrained(model_path(model.facts.model_id), padding_side="left")
    torch.manual_seed(0)
    said = continued(model.model, tokenizer, beginnings(model, load("neutral")[1::2]))
    return compared(model, tokenizer, found[CASE], said)


def measured(path: Path) -> Document:
    """The same of a model in a folder that answers questions, to one half of which the artifact is made."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    subject = LocalSubject(model, tokenizer, model_facts(model, model_id=path.name, fingerprint=fingerprint(model)))
    torch.manual_seed(0)
    said = continued(model, tokenizer, [subject.encode([Turn(role="user", content=form.format(one))])
                                        for form in ASKED for one in SUBJECTS])
    made = extracted(subject, Case(CASE, "normality", {"prompts": [list(text) for text, _ in said[::2]],
                                                       "max_tokens": 0}), "lab.replications.not_normal")
    return compared(subject, tokenizer, made, said[1::2])


def compared(subject: LocalSubject, tokenizer: Any, made: Extraction, said: Sequence[tuple[Tokens, int]]) -> Document:
    """said: held-out prompts with what the model says to them, and how many tokens that is."""
    model = subject.model
    held_out = [text for text in said if text[1] >= LENGTH]
    [layer] = made.metadata.layers  # type: ignore[misc]
    numbers = made.payload.layers[layer]
    seen = lru_cache(maxsize=None)(lambda text: subject.capture([text], "resid_post", [layer], None)[0][layer])
    ways: dict[str, Score] = {form: of_form(seen, form, numbers) for form in NORMAL_FORMS}
    ways |= {"entropy": of_logits(model, entropy), "surprise": of_logits(model, surprise), "repetition": repetition}
    arms = others(model, tokenizer, subject, [text for text, _ in held_out], [text[:-n] for text, n in held_out])
    normal = {way: torch.tensor([score(text, len(text) - n) for text, n in held_out]) for way, score in ways.items()}
    figures: dict[str, dict[str, Any]] = {}
    for arm, texts in arms.items():
        figures[arm] = {"texts": len(texts), "sample": tokenizer.decode(texts[0][0][-texts[0][1]:])}
        for way, score in ways.items():
            scores = torch.tensor([score(text, len(text) - n) for text, n in texts])
            figures[arm][way] = {"auc": auc(scores, normal[way]), "error": auc_error(scores, normal[way])}
    return {"model": subject.facts.model_id, "layer": layer, "texts": len(held_out), "arms": figures,
            "sample": tokenizer.decode(held_out[0][0][-held_out[0][1]:]),
            "false_alarms": alarms(seen, numbers, held_out)}


def beginnings(subject: LocalSubject, records: Sequence[Mapping[str, str]]) -> list[Tokens]:
    """How texts begin, each beginning once."""
    return list(dict.fromkeys(subject.encode(record["text"])[:8] for record in records))


def continued(model: Any, tokenizer: Any, prompts: Sequence[Tokens], **how: Any) -> list[tuple[Tokens, int]]:
    """Each prompt with what the model says after it, and how many tokens that is."""
    found = []
    for start in range(0, len(prompts), BATCH):
        part = [list(prompt) for prompt in prompts[start:start + BATCH]]
        ids = tokenizer.pad({"input_ids": part}, return_tensors="pt")
        with torch.no_grad():
            answers = model.generate(**ids, max_new_tokens=LENGTH, **{"do_sample": False, **how},
                                     pad_token_id=tokenizer.pad_token_id)[:, ids["input_ids"].shape[1]:].tolist()
        for prompt, answer in zip(part, answers, strict=True):
            ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
            length = next((n for n, token in enumerate(answer) if token in ends), len(answer))
            found.append(((*prompt, *answer[:length]), length))
    return found


def others(model: Any, tokenizer: Any, subject: LocalSubject, normal: Sequence[Tokens], prompts: Sequence[Tokens]
           ) -> dict[str, list[tuple[Tokens, int]]]:
    """Texts that are not normal, by what they are. All have LENGTH tokens behind the prompt, or are left out."""
    generator, name = torch.Generator().manual_seed(1), subject.facts.model_id
    vocabulary = sorted({token for text in normal for token in text})
    tails = [text[len(prompt):] for text, prompt in zip(normal, prompts, strict=True)]
    french = ([record["positive"] for record in load("language_french")] if name in MODEL_NAMES else
              [json.loads(line)["positive"][1]["content"] for line in FRENCH.read_text().splitlines()])
    words = [token for text in french for token in subject.encode_continuation(text)]
    found = {
        "shuffled": [(*prompt, *(tail[n] for n in torch.randperm(len(tail), generator=generator).tolist()))
                     for prompt, tail in zip(prompts, tails, strict=True)],
        "random tokens": [(*prompt, *(vocabulary[n] for n in torch.randint(
            len(vocabulary), (LENGTH,), generator=generator).tolist())) for prompt in prompts],
        "French": [(*prompt, *words[n * LENGTH:(n + 1) * LENGTH]) for n, prompt in enumerate(prompts)
                   if len(words) >= (n + 1) * LENGTH],
        "sampled at temperature 2": [text for text, _ in continued(model, tokenizer, prompts, do_sample=True,
                                                                   temperature=2.0, top_k=0)]}
    for dose in DOSES:
        with adding(model, name, dose):
            found[f"steered, {dose:g} times its strength"] = [text for text, _ in continued(model, tokenizer, prompts)]
    return {arm: [(text, LENGTH) for text, prompt in zip(texts, prompts, strict=False)
                  if len(text) == len(prompt) + LENGTH] for arm, texts in found.items()}


class adding:  # noqa: N801
    """While it is entered, the bundled tone is added by plain hooks to what its layers leave."""

    def __init__(self, model: Any, name: str, dose: float) -> None:
        data = (LAB_DIR / "artifacts" / ("smollm2" if name not in MODEL_NAMES else name) / "cheerful.safetensors")
        metadata, payload = get_format("safetensors").read(data.read_bytes(), {}, Limits())
        self._layers = model.model.layers
        strength = dose * metadata.strength.value
        self._adds = {layer: strength * payload.layers[layer]["vector"]
                      for layer in (metadata.layers if isinstance(metadata.layers, list) else payload.layers)}
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        for layer, vector in self._adds.items():
            self._hooks.append(self._layers[layer].register_forward_hook(
                lambda module, given, output, vector=vector: (output[0] + vector, *output[1:])
                if isinstance(output, tuple) else output + vector))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def of_form(seen: Callable[[Tokens], torch.Tensor], form: Any, numbers: Any) -> Score:
    def score(text: Tokens, start: int) -> float:
        scores = normal_scores(form, seen(text), numbers)[start:]
        return float(scores[~scores.isnan()].mean())

    return score


def of_logits(model: Any, measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Score:
    def score(text: Tokens, start: int) -> float:
        ids = torch.tensor([text])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, start - 1:-1].float().log_softmax(dim=-1)
        return float(measure(logprobs, ids[0, start:]).mean())

    return score


def entropy(logprobs: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return -(logprobs.exp() * logprobs).sum(dim=-1)


def surprise(logprobs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return -logprobs.gather(1, ids[:, None])


def repetition(text: Tokens, start: int) -> float:
    """Share of the 3-grams from `start` on that occurred before in them."""
    grams = list(zip(text[start:], text[start + 1:], text[start + 2:], strict=False))
    return 1 - len(set(grams)) / len(grams)


def alarms(seen: Callable[[Tokens], torch.Tensor], numbers: Any, texts: Sequence[tuple[Tokens, int]]
           ) -> dict[str, Any]:
    """Per form how many of the tokens of normal texts pass the threshold, as a share of a million."""
    found = {}
    for n, form in enumerate(NORMAL_FORMS):
        first = int(numbers["window"]) if form in WINDOWED else 1
        scores = torch.cat([normal_scores(form, seen(text), numbers)[first:] for text, _ in texts])
        over = int((scores > numbers["thresholds"][n]).sum())
        found[form] = {"tokens": len(scores), "alarms": over, "of_a_million": round(over / len(scores) * 1e6)}
    return found


def table(found: dict[str, Any]) -> list[str]:
    ways = [way for way in next(iter(found["arms"].values())) if way not in ("texts", "sample")]
    lines = [f"{found['model']}, layer {found['layer']}, {found['texts']} normal texts of {LENGTH} tokens", "",
             "| | " + " | ".join(ways) + " |", "|" + "---|" * (len(ways) + 1)]
    for arm, figures in found["arms"].items():
        lines.append(f"| {arm} ({figures['texts']}) | " + " | ".join(
            f"{figures[way]['auc']:.2f} ± {1.96 * figures[way]['error']:.2f}" for way in ways) + " |")
    lines.append("")
    lines += [f"{form}: {one['alarms']} alarms in {one['tokens']} normal tokens, {one['of_a_million']} of a million"
              for form, one in found["false_alarms"].items()]
    return lines


def findings(document: Document) -> list[Finding]:
    found = []
    for arm, figures in document["measured"]["arms"].items():
        told = {way: f"{figures[way]['auc']:.2f} ± {1.96 * figures[way]['error']:.2f}"
                for way in (*NORMAL_FORMS, *PLAINER)}
        best = max(NORMAL_FORMS, key=lambda form, figures=figures: figures[form]["auc"])
        other = max(figures["entropy"]["auc"], figures["repetition"]["auc"])
        say = (f"{best} tells it better than entropy and repetition" if figures[best]["auc"] > other else
               "No form tells it better than entropy and repetition")
        also = ("surprise as well as that." if figures["surprise"]["auc"] >= figures[best]["auc"] else
                "and than surprise.")
        found.append(Finding(
            f"AUC of {figures['texts']} texts, {arm}, against {document['measured']['texts']} normal ones",
            "; ".join(f"{form} {told[form]}" for form in NORMAL_FORMS),
            "; ".join(f"{way} {told[way]}" for way in PLAINER), f"{say[0].upper()}{say[1:]}, {also}"))
    return found


def draw(document: Document, figure: Figure) -> None:
    axes = figure.subplots()
    arms = document["measured"]["arms"]
    ways = (*NORMAL_FORMS, *PLAINER)
    axes.imshow([[figures[way]["auc"] for way in ways] for figures in arms.values()], vmin=-0.6, vmax=1.6, cmap="RdBu",
                aspect="auto")
    for y, figures in enumerate(arms.values()):
        for x, way in enumerate(ways):
            axes.text(x, y, f"{figures[way]['auc']:.2f}", ha="center", va="center")
    axes.set_xticks(range(len(ways)), ways, rotation=20)
    axes.set_yticks(range(len(arms)), list(arms))
    axes.set_title("area under the curve against normal text of equal length")


ROW = Row(
    "not-normal", "What is not normal", "lab-dense",
    "Statistics of hidden states tell text that is not normal: their spectrum (EigenTrack, arXiv 2509.15735), what "
    "lies outside of leading directions (SubspaceAD), patterns of signs (arXiv 1809.06573).",
    cases, measure, findings, draw,
    judged="Monitors read texts: this is no claim about what steering does. A score of a text is the mean over its "
    "last 32 tokens.",
    notes="No labels are used, where EigenTrack trains a classifier on them.")


if __name__ == "__main__":
    main()
