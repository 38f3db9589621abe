"""Do monitors of normality tell text that is not normal, better than entropy, surprise and repetition do?

`python -m lab.replications.not_normal lab-dense`, or with the folder of a SmolLM2: an artifact is made from what the
model says to one half of the prompts. What it says to the other half is normal text; beside it stands text of equal
length that is not. All of it is read by the untouched model, and the score of a text is the mean over LENGTH tokens.
`--json` writes all figures. Two minutes of a core for lab-dense, a quarter of an hour for SmolLM2.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab.datasets import load
from lab.paths import LAB_DIR, MODEL_NAMES, model_path
from steering.artifacts.normality import NORMAL_FORMS, WINDOWED, normal_scores
from steering.models.describe import model_facts
from steering.models.fingerprints import fingerprint
from vectors.artifact import Limits
from vectors.extract import parse_request, prepare
from vectors.extract.local import LocalSubject
from vectors.extract.standing import auc, auc_error
from vectors.extract.subject import Tokens, Turn
from vectors.formats import get_format

LENGTH, BATCH = 32, 16
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
    parser.add_argument("model", help="lab-dense, or the folder of a SmolLM2")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    found = measured(options.model)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(table(found)))


def measured(name: str) -> dict[str, Any]:
    bundled = name in MODEL_NAMES
    path = model_path(name) if bundled else Path(name)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    subject = LocalSubject(model, tokenizer, model_facts(model, model_id=path.name, fingerprint=fingerprint(model)))
    prompts = lab_prompts(subject) if bundled else [subject.encode(ask(form.format(one)))
                                                    for form in ASKED for one in SUBJECTS]
    said = continued(model, tokenizer, prompts)
    fit, held_out = said[::2], [text for text in said[1::2] if text[1] >= LENGTH]
    request = parse_request("normality", {"name": "normal", "prompts": [list(text) for text, _ in fit],
                                          "max_tokens": 0})
    made = prepare("normality", request, subject, "lab.replications.not_normal").run(
        lambda share, stage: None, lambda: False)
    [layer] = made.metadata.layers  # type: ignore[misc]
    numbers = made.payload.layers[layer]
    seen = lru_cache(maxsize=None)(lambda text: subject.capture([text], "resid_post", [layer], None)[0][layer])
    ways: dict[str, Score] = {form: of_form(seen, form, numbers) for form in NORMAL_FORMS}
    ways |= {"entropy of the next token": of_logits(model, entropy), "surprise": of_logits(model, surprise),
             "repetition": repetition}
    arms = others(model, tokenizer, subject, [text for text, _ in held_out], [text[:-n] for text, n in held_out],
                  path.name)
    normal = {way: torch.tensor([score(text, len(text) - n) for text, n in held_out]) for way, score in ways.items()}
    figures: dict[str, dict[str, Any]] = {}
    for arm, texts in arms.items():
        figures[arm] = {"texts": len(texts), "sample": tokenizer.decode(texts[0][0][-texts[0][1]:])}
        for way, score in ways.items():
            scores = torch.tensor([score(text, len(text) - n) for text, n in texts])
            figures[arm][way] = {"auc": auc(scores, normal[way]), "error": auc_error(scores, normal[way])}
    return {"model": path.name, "layer": layer, "texts": len(held_out), "arms": figures,
            "sample": tokenizer.decode(held_out[0][0][-held_out[0][1]:]),
            "false_alarms": alarms(seen, numbers, held_out)}


def ask(question: str) -> list[Turn]:
    return [Turn(role="user", content=question)]


def lab_prompts(subject: LocalSubject) -> list[Tokens]:
    """How neutral texts begin, each beginning once."""
    return list(dict.fromkeys(subject.encode(record["text"])[:8] for record in load("neutral")))


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


def others(model: Any, tokenizer: Any, subject: LocalSubject, normal: Sequence[Tokens], prompts: Sequence[Tokens],
           name: str) -> dict[str, list[tuple[Tokens, int]]]:
    """Texts that are not normal, by what they are. All have LENGTH tokens behind the prompt, or are left out."""
    generator = torch.Generator().manual_seed(1)
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


if __name__ == "__main__":
    main()
