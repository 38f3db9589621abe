"""Orthogonal axes of whole sequences: which axis moves which skill, beside random bases of the same subspace
(Kang et al. 2026, arXiv 2604.17614)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from matplotlib.figure import Figure

from lab.datasets import load
from lab.replications.chart import OURS, spread, tidy
from lab.replications.common import DRAWS, Case, Document, Finding, Row, beats, figures, mean, numbers
from vectors.extract import Extraction
from vectors.extract.local import LocalSubject
from vectors.extract.programs import EVERYWHERE, adding
from vectors.extract.standing import standing
from vectors.extract.subject import Tokens

SKILLS = (("sentiment", "review"), ("tense", "story"), ("bandit", "bandit"), ("graph_walks", "walk"),
          ("languages", "french"))
RANK = 8
SIGMAS = 2.0
SEQUENCES, LONGEST = 12, 48


def sequences() -> list[dict[str, str]]:
    found = []
    for name, label in SKILLS:
        records = [r for r in load(name) if name != "languages" or r["label"] == label]
        found += [{"text": r.get("text", r.get("positive")), "label": label, "item": f"{label}:{r['item']}",
                   "split": r["split"]} for r in records[:90]]
    return found


def cases(model: LocalSubject) -> Iterator[Case]:
    yield Case("skills", "native_skills", {"sequences": sequences(), "rank": RANK})


def measure(model: LocalSubject, found: Mapping[str, Extraction]) -> Document:
    """Each axis added at the basis's layer, two sigma to either side: change of the mean log-probability of held-out
    sequences of each skill, half the difference of the two sides. A row less its mean says which skill an axis favours.
    """
    extraction = found["skills"]
    layer = extraction.report["layer"]
    basis = numbers(extraction, layer)["basis"].double()
    spread_of = torch.tensor(extraction.report["axis_std"], dtype=torch.float64)
    labels = [label for _, label in SKILLS]
    texts: dict[str, list[Tokens]] = {label: [] for label in labels}
    for one in sequences():
        if one["split"] == "test" and len(texts[one["label"]]) < SEQUENCES:
            texts[one["label"]].append(model.encode(one["text"])[:LONGEST])

    def moves(axes: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        rows = []
        for axis, size in zip(axes, sigma, strict=True):
            sides = [_scores(model, texts, layer, sign * SIGMAS * float(size) * axis) for sign in (1, -1)]
            rows.append((sides[0] - sides[1]) / 2)
        return torch.stack(rows)

    matrix = moves(basis, spread_of)
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for _ in range(DRAWS):
        turn = torch.linalg.qr(torch.randn(len(basis), len(basis), generator=generator, dtype=torch.float64)).Q
        # Axes are uncorrelated, so the variance along a turned one is the weighted sum of theirs.
        drawn.append(moves(turn @ basis, (turn.square() @ spread_of.square()).sqrt()))
    return {"layer": layer, "skills": labels, "moves": [[round(v, 4) for v in row] for row in matrix.tolist()],
            "selectivity": standing(_selectivity(matrix), [_selectivity(one) for one in drawn]),
            "strongest_axis": {label: standing(_strongest(matrix, n), [_strongest(one, n) for one in drawn])
                               for n, label in enumerate(labels)}}


def _scores(model: LocalSubject, texts: Mapping[str, Sequence[Tokens]], layer: int, vector: torch.Tensor
            ) -> torch.Tensor:
    """Mean log-probability of a token of each skill's sequences, `[skills]`."""
    program = adding(model.facts, "resid_post", layer, vector, EVERYWHERE)
    everything = [text for some in texts.values() for text in some]
    values = iter(float(found.mean()) for found in model.token_logprobs(everything, program))
    return torch.tensor([mean([next(values) for _ in some]) for some in texts.values()], dtype=torch.float64)


def _favoured(matrix: torch.Tensor) -> torch.Tensor:
    return matrix - matrix.mean(dim=1, keepdim=True)


def _selectivity(matrix: torch.Tensor) -> float:
    """Mean over axes of how much more the skill that an axis moves most is moved than skills are on average."""
    return float(_favoured(matrix).abs().max(dim=1).values.mean())


def _strongest(matrix: torch.Tensor, skill: int) -> float:
    return float(_favoured(matrix)[:, skill].abs().max())


def findings(document: Document) -> list[Finding]:
    report, measured = document["cases"]["skills"], document["measured"]
    labels, controls = report["labels"], report["controls"]
    rotated, dealt = controls["random_axes_of_the_subspace"], controls["shuffled_labels"]
    select, strongest = measured["selectivity"], measured["strongest_axis"]
    above = [label for label, entry in strongest.items() if entry["found"] > entry["max"]]
    stable = sum(c > 0.9 for c in report["split_half_cosines"])
    return [
        Finding(f"AUC of the best axis for each of {len(labels)} genres, mean",
                f"{mean([entry['auc'] for entry in labels.values()]):.3f}",
                f"random axes of the same subspace {figures(rotated, '.3f')}; shuffled labels {figures(dealt, '.2f')}",
                "The axes tell genres apart better than any turn of them." if rotated["found"] > rotated["max"] else
                "The subspace tells genres apart; its axes do so no better than others in it."),
        Finding("which skill an axis moves (nats per token at two sigma, over the mean of skills), mean of axes",
                f"{select['found']:.3f}", f"random axes of the same subspace {figures(select, '.3f')}",
                f"{beats(select).capitalize()}: " + ("the axes are more selective than turned ones."
                                                     if select["found"] > select["max"] else
                                                     "no clear advantage over turned axes.")),
        Finding("strongest axis for " + ", ".join(strongest),
                ", ".join(f"{entry['found']:.2f}" for entry in strongest.values()),
                "random axes, mean " + ", ".join(f"{entry['mean']:.2f}" for entry in strongest.values()),
                f"Above every draw for {', '.join(above)}." if above else "Above every draw for no skill."),
        Finding("axes that the two halves of the data share (cosine of principal angles over 0.9)",
                f"{stable} of {len(report['split_half_cosines'])}",
                f"random subspace, largest cosine {max(report['random_half_cosines']):.2f}",
                "Those are stable; the others are noise of the sample." if stable < RANK else "All are stable."),
    ]


def draw(document: Document, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    measured = document["measured"]
    matrix = _favoured(torch.tensor(measured["moves"]))
    most = float(matrix.abs().max())
    image = left.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    left.set_xticks(range(len(measured["skills"])), measured["skills"], fontsize=8)
    left.set_yticks(range(len(matrix)), [f"axis {n}" for n in range(len(matrix))], fontsize=8)
    left.set_title("what an axis favours (nats per token)", fontsize=10)
    figure.colorbar(image, ax=left)
    strongest = measured["strongest_axis"]
    at = list(range(len(strongest)))
    spread(right, at, list(strongest.values()), "random axes of the subspace")
    right.plot(at, [entry["found"] for entry in strongest.values()], "o", color=OURS, label="axes")
    right.set_xticks(at, list(strongest))
    tidy(right, title="strongest axis for a skill")


ROW = Row(
    "native-skills", "Native skills", "lab-dense",
    "Orthogonal axes of sequence-level activations are the model's own skills and steer it (arXiv 2604.17614).",
    cases, measure, findings, draw,
    judged="AUC is of texts that are read, and skills are log-probabilities of given texts. No text was written,"
           " so that nothing is claimed of what the axes make the model write.",
    notes="The paper selects fine-tuning data by the axes; here only their use at inference is looked at. Axes are "
          "taken at the middle layer, with length regressed out. Two sigma of the first axis is the longest step of "
          "all, and a turned axis makes a middling one, so part of what an axis gains over turned ones is length.")
