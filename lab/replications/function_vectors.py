"""Function vectors by both extractions, and whether what they steer to can be read through a lens (Nadaf 2026, arXiv
2604.02608; Todd et al. 2024, arXiv 2310.15213)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from lab.datasets import load
from lab.replications.chart import CONTROL, OURS, PLAIN, SECOND, THIRD, bars, tidy
from lab.replications.common import DRAWS, Case, Document, Finding, Row, mean, numbers
from lab.replications.edits import SITE, read_out
from vectors.extract import Extraction
from vectors.extract.local import LocalSubject
from vectors.extract.prompts_icl import Task, TaskPair, make_task

TASKS = ("plural", "noun_to_french", "noun_to_german", "past", "gerund", "third_person", "opposite", "comparative")
METHODS = ("mean_difference", "causal_mediation")
TEMPLATE = "{x} ->"
SHOTS = 5
TOP = 10
# The paper calls a task steerable, or readable, above this share.
YES = 0.10
PROJECTED = 50
EPOCHS, PATIENCE, RATE, DECAY = 200, 15, 0.01, 0.01


def word_pairs(task: str) -> list[dict[str, Any]]:
    return [{"input": p["input"], "output": p["output"], "split": p["split"]} for p in load("task_pairs")
            if p["task"] == task]


def cases(model: LocalSubject) -> Iterator[Case]:
    for method in METHODS:
        for n, task in enumerate(TASKS):
            # The next task but one: a neighbour may have the same inputs, as the two languages do.
            yield Case(name(task, method), "function_vector", {
                "extraction": method, "shots": SHOTS, "num_prompts": 15 if method == "mean_difference" else 40,
                "pairs": word_pairs(task), "other_pairs": word_pairs(TASKS[(n + 2) % len(TASKS)])})


def name(task: str, method: str) -> str:
    return f"fv-{task.replace('_', '-')}" + ("-causal" if method == "causal_mediation" else "")


def measure(model: LocalSubject, found: Mapping[str, Extraction]) -> Document:
    """Per task: how often the answer is among the top 10 of a lens on the bare query, and where the task falls."""
    tasks = {task: make_task([TaskPair.model_validate(pair) for pair in word_pairs(task)], TEMPLATE, SHOTS, model, 0)
             for task in TASKS}
    layers = list(range(model.facts.num_layers - 1))
    states = {task: _states(model, made) for task, made in tasks.items()}
    lenses = {layer: _tuned(states, tasks, layer) for layer in layers}
    read: Document = {}
    for task, made in tasks.items():
        entry: Document = {}
        for lens in ("logit", "tuned"):
            for spelling in ("spaced", "bare", "better"):
                entry[f"{lens}_{spelling}"] = _readable(model, made, states[task], lenses if lens == "tuned" else None,
                                                        spelling, layers)
        report = found[name(task, "mean_difference")].report if name(task, "mean_difference") in found else None
        if report is not None:
            vector = numbers(found[name(task, "mean_difference")], report["best_layer"])["vector"]
            top = read_out(model, vector.unsqueeze(0)).topk(PROJECTED).indices[0].tolist()
            entry["projection"] = sum(token in set(made.answers) for token in top) / PROJECTED
            entry["steered"] = report["test"]["steered"]
            entry["steerable"] = report["test"]["steered"] > YES
            entry["steerable_over_controls"] = bool(
                report["test"]["steered"] >= report["controls"]["random_vectors"]["max"] + 0.2
                and report["test"]["steered"] >= report["controls"]["other_task"]["accuracy"] + 0.15)
            entry["readable"] = entry["logit_better"]["test"] > YES
            entry["readable_bare"] = entry["logit_bare"]["test"] > YES
            entry["readable_tuned"] = entry["tuned_better"]["test"] > YES
            entry["readable_over_control"] = entry["logit_better"]["test"] > entry["logit_better"]["control_max"] + YES
        read[task] = entry
    return {"lens": read, "cells": {rule: _cells(read, *keys) for rule, keys in {
        "paper": ("steerable", "readable"), "bare_spelling": ("steerable", "readable_bare"),
        "tuned_lens": ("steerable", "readable_tuned"),
        "over_controls": ("steerable_over_controls", "readable_over_control")}.items()}}


def _cells(read: Mapping[str, Document], steerable: str, readable: str) -> dict[str, int]:
    cells = dict.fromkeys(("both", "steerable only", "readable only", "neither"), 0)
    for entry in read.values():
        if steerable in entry:
            key = {(True, True): "both", (True, False): "steerable only", (False, True): "readable only",
                   (False, False): "neither"}[entry[steerable], entry[readable]]
            cells[key] += 1
    return cells


def _states(model: LocalSubject, task: Task) -> dict[int, torch.Tensor]:
    """Layer -> activation at the last token of every bare query, `[n, d]`."""
    captured = model.capture([task.zero_shot(n) for n in range(len(task.inputs))], SITE,
                             list(range(model.facts.num_layers)), [-1])
    return {layer: torch.stack([found[layer][0] for found in captured]) for layer in range(model.facts.num_layers)}


def _tuned(states: Mapping[str, Mapping[int, torch.Tensor]], tasks: Mapping[str, Task], layer: int
           ) -> tuple[torch.Tensor, torch.Tensor]:
    """Diagonal tuned lens: (1 + s) h + b with least squared error to the last layer's state, pooled over tasks; fitted
    on train items, stopped on dev items."""
    def pooled(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        last = max(next(iter(states.values())))
        return tuple(torch.cat([states[task][n][list(made.splits[split])] for task, made in tasks.items()])  # type: ignore[index,return-value]
                     for n in (layer, last))

    (x, y), (x_dev, y_dev) = pooled("train"), pooled("dev")
    s, b = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(x.shape[1], requires_grad=True)
    optimizer = torch.optim.AdamW([s, b], lr=RATE, weight_decay=DECAY)
    best, kept, since = float("inf"), (s.detach().clone(), b.detach().clone()), 0
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        ((1 + s) * x + b - y).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            loss = float(((1 + s) * x_dev + b - y_dev).square().mean())
        if loss < best:
            best, kept, since = loss, (s.detach().clone(), b.detach().clone()), 0
        else:
            since += 1
            if since > PATIENCE:
                break
    return kept


def _readable(model: LocalSubject, task: Task, states: Mapping[int, torch.Tensor],
              lenses: Mapping[int, tuple[torch.Tensor, torch.Tensor]] | None, spelling: str, layers: Sequence[int]
              ) -> Document:
    """Share of test items whose answer is in the lens's top 10, at the layer chosen on dev, and the same share for
    answers dealt to other items of the task."""
    spaced = torch.tensor(task.answers)
    bare = torch.tensor([model.encode_continuation(output.strip())[0] for output in task.outputs])
    spellings = {"spaced": [spaced], "bare": [bare], "better": [spaced, bare]}[spelling]
    hits: dict[int, torch.Tensor] = {}
    for layer in layers:
        h = states[layer]
        if lenses is not None:
            scale, shift = lenses[layer]
            h = (1 + scale) * h + shift
        top = read_out(model, h).topk(TOP).indices
        # [item, answer of item]: whether that answer is among the top ones of this item.
        hits[layer] = torch.stack([(top.unsqueeze(1) == tokens.view(1, -1, 1)).any(dim=2)
                                   for tokens in spellings]).any(dim=0)
    dev, test = list(task.splits["dev"]), list(task.splits["test"])
    own = {layer: hit.diagonal().double() for layer, hit in hits.items()}
    best = max(layers, key=lambda layer: (float(own[layer][dev].mean()), layer))
    chance = random.Random(0)
    dealt = [mean([float(hits[best][i, j]) for i, j in zip(test, chance.sample(test, len(test)), strict=True)])
             for _ in range(DRAWS)]
    share = {split: round(float(own[best][members].mean()), 4) for split, members in (("dev", dev), ("test", test))}
    return {"layer": best, **share,
            "control_mean": round(mean(dealt), 4), "control_max": round(max(dealt), 4)}


def findings(document: Document) -> list[Finding]:
    lines = []
    for method, what in zip(METHODS, ("few-shot minus zero-shot activations", "summed outputs of the causal heads"),
                            strict=True):
        reports = [document["cases"][name(task, method)] for task in TASKS]
        good = [r for r in reports if "failed" not in r]
        test = {key: mean([r["test"][key] for r in good]) for key in ("zero_shot", "few_shot", "steered")}
        control = {key: mean([r["controls"][key]["mean"] for r in good])
                   for key in ("random_vectors", "shuffled_demonstrations")}
        most = max(r["controls"]["random_vectors"]["max"] for r in good)
        other = mean([r["controls"]["other_task"]["accuracy"] for r in good])
        passed = sum(r["test"]["steered"] >= r["controls"]["random_vectors"]["max"] + 0.2
                     and r["test"]["steered"] >= r["controls"]["other_task"]["accuracy"] + 0.15 for r in good)
        shuffled_too = control["shuffled_demonstrations"] > test["steered"] - 0.15
        lines.append(Finding(
            f"accuracy on bare queries, {what}, mean of {len(good)} tasks",
            f"{test['steered']:.2f} (zero-shot {test['zero_shot']:.2f}, 5-shot {test['few_shot']:.2f})",
            f"random vectors {control['random_vectors']:.2f} (best draw {most:.2f}), another task's {other:.2f}, "
            f"shuffled demonstrations {control['shuffled_demonstrations']:.2f}",
            f"{passed} of {len(good)} tasks beat the best random vector by 20 points and the other task's by 15. "
            + ("Shuffled demonstrations steer nearly as well: their outputs alone show what kind of word is wanted, so "
               "they are no null for these tasks." if shuffled_too else "Shuffled demonstrations do not.")))
    read = document["measured"]["lens"]
    for lens in ("logit", "tuned"):
        share = {spelling: mean([entry[f"{lens}_{spelling}"]["test"] for entry in read.values()])
                 for spelling in ("spaced", "bare", "better")}
        dealt = mean([entry[f"{lens}_better"]["control_mean"] for entry in read.values()])
        lines.append(Finding(
            f"answer among the top {TOP} of the {'logit lens' if lens == 'logit' else 'diagonal tuned lens'} below the "
            "last layer, mean of tasks",
            f"{share['better']:.2f} (with the space {share['spaced']:.2f}, without {share['bare']:.2f})",
            f"answers dealt to other items {dealt:.2f}",
            "Readable beyond what other items' answers are." if share["better"] > dealt + YES
            else "What the lens shows is the kind of answer, if anything: other items' answers are there as often."))
    for rule, said in (("paper", f"logit lens, better of both spellings, each share over {YES:.2f}"),
                       ("bare_spelling", "logit lens, answers without the space before them"),
                       ("tuned_lens", "diagonal tuned lens, better of both spellings"),
                       ("over_controls", "logit lens, each share over its controls")):
        cells = document["measured"]["cells"][rule]
        artefact = rule == "bare_spelling" and cells["steerable only"] > document["measured"]["cells"]["paper"][
            "steerable only"]
        lines.append(Finding(
            f"tasks steerable x readable, {said}", ", ".join(f"{cell} {count}" for cell, count in cells.items()), "-",
            "An artefact of the spelling: the next token has the space, so this lens looks for tokens that never come."
            if artefact else "Steering without a readable answer occurs." if cells["steerable only"] else
            "No task steers without being readable."))
    projected = mean([entry["projection"] for entry in read.values() if "projection" in entry])
    lines.append(Finding(
        f"share of the {PROJECTED} tokens that the vector itself projects to which are answers of the task",
        f"{projected:.2f}", f"the task's answers are about {mean_share(document):.1%} of the vocabulary",
        "The vector is not simply the sum of the answers' unembeddings." if projected < 0.5 else
        "The vector points at the answers themselves."))
    return lines


def mean_share(document: Document) -> float:
    sizes = [sum(document["cases"][name(task, "mean_difference")].get("pairs", {}).values()) for task in TASKS]
    return mean(sizes) / 3200


def draw(document: Document, figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[3, 1.3])
    of = {method: [document["cases"][name(task, method)] for task in TASKS] for method in METHODS}
    first = of["mean_difference"]
    bars(left, [task.replace("_", " ") for task in TASKS], {
        "zero-shot": [r["test"]["zero_shot"] for r in first], "5-shot": [r["test"]["few_shot"] for r in first],
        "function vector": [r["test"]["steered"] for r in first],
        "causal heads": [r["test"]["steered"] if "test" in r else 0.0 for r in of["causal_mediation"]],
        "best random vector": [r["controls"]["random_vectors"]["max"] for r in first],
        "another task's": [r["controls"]["other_task"]["accuracy"] for r in first]},
        [PLAIN, THIRD, OURS, "#7fb2d9", CONTROL, SECOND])
    left.set_ylim(0, 1.35)
    tidy(left, title="accuracy on bare queries (test)")
    left.legend(fontsize=7, frameon=False, ncols=3, loc="upper center")
    read = document["measured"]["lens"]
    right.scatter([entry["logit_better"]["test"] for entry in read.values()],
                  [entry.get("steered", 0.0) for entry in read.values()], color=OURS, label="logit lens")
    right.scatter([entry["tuned_better"]["test"] for entry in read.values()],
                  [entry.get("steered", 0.0) for entry in read.values()], marker="x", color=SECOND, label="tuned lens")
    right.axvline(YES, color=CONTROL, linewidth=1)
    right.axhline(YES, color=CONTROL, linewidth=1)
    right.set_xlim(-0.05, 1.05)
    right.set_ylim(-0.05, 1.1)
    tidy(right, title="steerable x readable", x=f"answer in the lens's top {TOP}", y="steered accuracy")


ROW = Row(
    "function-vectors", "Function vectors", "lab-dense",
    "A vector from few-shot prompts makes the model do the task on bare queries, also where the answer cannot be read "
    "through the unembedding: 14 of 72 task-model pairs steer without being readable, 3 are readable only (arXiv "
    "2604.02608; the causal-head vector is that of arXiv 2310.15213).",
    cases, measure, findings, draw,
    judged="Accuracy over tasks is of the answer's first token, and lenses read the next one. The last rows are "
           "whole answers of six tokens with the artifacts that are bundled.",
    bundled=("plural", "to-french",),
    notes="6 to 14 test items a task. The lens is read below the last layer: there it is the model's own output. The "
          "tuned lens is fitted on the train items of all tasks together.")
