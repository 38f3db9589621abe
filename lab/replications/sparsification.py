"""What leaving out the small inputs of the MLPs' last map costs, by method: perplexity, and answers that stay right.

The first token of every text is left whole, as models keep massive activations there. Random channels, and norms that
were dealt to other channels, are the controls of what is looked at. `python -m lab.replications.sparsification FOLDER`
does the same on a SmolLM2, in ten minutes of a core; `--json` writes all figures.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab.datasets import load
from lab.paths import LAB_DIR
from lab.real.facts import relations
from lab.replications.common import Case, Document, Finding, Row, extracted, texts_of
from steering.artifacts.source import Resolved, Source
from steering.language.intervention import Intervention
from steering.models.describe import model_facts
from steering.models.fingerprints import fingerprint
from steering.programs.compiler import compile_program
from steering.programs.program import Program
from vectors.extract import Extraction
from vectors.extract.local import LocalSubject
from vectors.extract.subject import Tokens, Turn

CASE, SHARES, DRAWS = "sparse", (0.25, 0.5, 0.65), 20
METHODS = ("magnitude", "wina", "chess", "threshold")
TEXTS, ITEMS = 60, 60
BUT_FIRST = {"prompt": {"exclude": {"positions": [0]}}, "generation": "all"}
# Of each item what is asked and what the answer must begin with.
Asked = tuple[Tokens, str]
# Prose of this repository that changes no more.
PROSE = LAB_DIR.parent / "docs" / "decisions"
REAL_TEXTS, REAL_ITEMS, REAL_DRAWS = 16, 20, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with a SmolLM2")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measured_real(options.folder)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(table(found)))


def cases(model: LocalSubject) -> Iterator[Case]:
    texts = list(dict.fromkeys(record["text"] for record in load("neutral", "train")))
    yield Case(CASE, "sparsity", {"prompts": texts})


def measure(model: LocalSubject, found: Mapping[str, Extraction]) -> Document:
    skills = {name: [(model.encode(record["text"]), record["answer"]) for record in spread(load(data, "test"))]
              for name, data in (("facts", "relations"), ("calendar", "calendar"))}
    return compared(model, found[CASE], texts_of(model, "neutral", "test")[:TEXTS], skills, DRAWS)


def measured_real(path: Path) -> Document:
    """The same of a model in a folder, on prose and on facts that it is asked for."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    subject = LocalSubject(model, AutoTokenizer.from_pretrained(path),
                           model_facts(model, model_id=path.name, fingerprint=fingerprint(model)))
    paragraphs = [part.replace("\n", " ") for file in sorted(PROSE.glob("00[01]*.md"))
                  for part in file.read_text().split("\n\n") if len(part) > 200 and part[0].isalpha()]
    made = extracted(subject, Case(CASE, "sparsity", {"prompts": paragraphs[::2]}),
                     "lab.replications.sparsification")
    asked = [(subject.encode([Turn(role="user", content=record["text"])]) if record["text"].endswith("?")
              else subject.encode(record["text"]), record["answer"])
             for record in spread([one for one in relations() if one["split"] == "test"], REAL_ITEMS)]
    texts = [subject.encode(text)[:48] for text in paragraphs[1::2]][:REAL_TEXTS]
    return compared(subject, made, texts, {"facts": asked}, REAL_DRAWS)


def compared(model: LocalSubject, made: Extraction, texts: Sequence[Tokens], skills: Mapping[str, Sequence[Asked]],
             draws: int) -> Document:
    def cost(program: Program | None) -> dict[str, float]:
        return {"perplexity": perplexity(model, texts, program),
                **{name: right(model, asked, program) for name, asked in skills.items()}}

    norms = {layer: numbers["norm"] for layer, numbers in made.payload.layers.items()}
    arms: dict[str, dict[str, Any]] = {}
    for share in SHARES:
        own: dict[str, Any] = {method: cost(by_artifact(model, made, method, share)) for method in METHODS}
        own["random"] = [cost(program_of(model, {"method": "random", "share": share, "seed": seed}))
                         for seed in range(draws)]
        own["shuffled norms"] = [cost(program_of(model, {"method": "wina", "share": share}, dealt(norms, seed)))
                                 for seed in range(draws)]
        arms[f"{share:g}"] = own
    return {"model": model.facts.model_id, "texts": len(texts), "draws": draws,
            "items": {name: len(asked) for name, asked in skills.items()}, "untouched": cost(None), "arms": arms,
            "norm_variation": {layer: one["norm_variation"] for layer, one in made.report["layers"].items()}}


def program_of(model: LocalSubject, options: Mapping[str, Any], norms: Mapping[int, torch.Tensor] | None = None
               ) -> Program:
    spec: dict[str, Any] = {"op": "sparsify", "options": dict(options), "scope": BUT_FIRST}
    if norms is not None:
        spec["inline"] = {"norm": {str(layer): norm.tolist() for layer, norm in norms.items()}}
    return compile_program([Resolved(Intervention.model_validate(spec))], model.facts)


def by_artifact(model: LocalSubject, made: Extraction, method: str, share: float) -> Program:
    spec = {"artifact": CASE, "options": {"method": method, "share": share}, "scope": BUT_FIRST}
    source = Source(f"{CASE}@1", "digest", made.payload, made.metadata.op, made.metadata.site)
    return compile_program([Resolved(Intervention.model_validate(spec), source)], model.facts)


def dealt(norms: Mapping[int, torch.Tensor], seed: int) -> dict[int, torch.Tensor]:
    """The lengths of each layer's columns, given to other channels."""
    generator = torch.Generator().manual_seed(seed)
    return {layer: norm[torch.randperm(len(norm), generator=generator)] for layer, norm in norms.items()}


def perplexity(model: LocalSubject, texts: Sequence[Tokens], program: Program | None) -> float:
    """Of all tokens but the first of each text."""
    found = model.continuation_logprobs(texts, [1] * len(texts), program)
    counts = [len(text) - 1 for text in texts]
    return math.exp(-sum(mean * count for mean, count in zip(found, counts, strict=True)) / sum(counts))


def right(model: LocalSubject, asked: Sequence[Asked], program: Program | None) -> float:
    """Share of the items whose answer is written in the first tokens of what the model says."""
    longest = max(len(model.encode_continuation(answer)) for _, answer in asked)
    said = model.write([prompt for prompt, _ in asked], longest + 1, program)
    return sum(one.text.strip().startswith(answer.strip()) for one, (_, answer) in zip(said, asked, strict=True)
               ) / len(asked)


def spread(records: Sequence[dict[str, Any]], count: int = ITEMS) -> Sequence[dict[str, Any]]:
    """So many of them, at equal distances."""
    return records[::max(1, len(records) // count)][:count]


def spoken(values: Sequence[float], form: str) -> str:
    return f"mean {sum(values) / len(values):{form}}, range {min(values):{form}} to {max(values):{form}}"


def table(found: Document) -> list[str]:
    skills = list(found["items"])
    lines = [f"{found['model']}: {found['texts']} texts, " + ", ".join(f"{n} items of {name}" for name, n in
                                                                       found["items"].items()), "",
             "| left out | by | perplexity | " + " | ".join(skills) + " |", "|" + "---|" * (3 + len(skills))]
    base = found["untouched"]
    lines.append(f"| nothing | | {base['perplexity']:.2f} | " + " | ".join(f"{base[s]:.2f}" for s in skills) + " |")
    for share, arms in found["arms"].items():
        for name, one in arms.items():
            if isinstance(one, list):
                cells = [spoken([each["perplexity"] for each in one], ".3g"),
                         *(spoken([each[s] for each in one], ".2f") for s in skills)]
            else:
                cells = [f"{one['perplexity']:.2f}", *(f"{one[s]:.2f}" for s in skills)]
            lines.append(f"| {share} | {name} | " + " | ".join(cells) + " |")
    return lines


def findings(document: Document) -> list[Finding]:
    found, told = [], document["measured"]
    skills = list(told["items"])
    for share, arms in told["arms"].items():
        control = {name: [one["perplexity"] for one in arms[name]] for name in ("random", "shuffled norms")}
        ours = {method: arms[method]["perplexity"] for method in METHODS}
        below = sum(ours["wina"] < value for value in control["shuffled norms"])
        say = (f"Sizes beat random channels; the norms in their places beat {below} of {told['draws']} dealings of them"
               if max(ours[method] for method in ("magnitude", "wina")) < min(control["random"]) else
               "Sizes do not beat random channels")
        least = min(ours, key=lambda method: ours[method])
        found.append(Finding(
            f"perplexity of {told['texts']} texts, {share} of the channels left out",
            f"{'; '.join(f'{name} {value:.2f}' for name, value in ours.items())} "
            f"(untouched {told['untouched']['perplexity']:.2f})",
            "; ".join(f"{name} {spoken(values, '.3g')}" for name, values in control.items()),
            f"{say}. The least: {least}"))
        for skill in skills:
            own = {method: arms[method][skill] for method in METHODS}
            drawn = [one[skill] for one in arms["random"]]
            found.append(Finding(
                f"{skill} answered right, of {told['items'][skill]}, {share} left out",
                f"{'; '.join(f'{name} {value:.2f}' for name, value in own.items())} "
                f"(untouched {told['untouched'][skill]:.2f})",
                f"random {spoken(drawn, '.2f')}",
                "Every method keeps more than random channels do" if min(own.values()) > max(drawn) else
                "Not every method keeps more than the best of the random channels"))
    return found


def draw(document: Document, figure: Figure) -> None:
    told = document["measured"]
    axes = figure.subplots(1, 1 + len(told["items"]))
    shares = [float(share) for share in told["arms"]]

    def line(name: str, measure: str) -> list[float]:
        found = []
        for arms in told["arms"].values():
            one = arms[name]
            found.append(sum(each[measure] for each in one) / len(one) if isinstance(one, list) else one[measure])
        return found

    for place, measure in zip(axes, ("perplexity", *told["items"]), strict=True):
        for name in (*METHODS, "random", "shuffled norms"):
            place.plot([0.0, *shares], [told["untouched"][measure], *line(name, measure)], marker="o",
                       label=f"{name} (mean)" if name in ("random", "shuffled norms") else name)
        place.set_xlabel("share left out")
        place.set_title(measure)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=7)


ROW = Row(
    "sparsification", "Leaving out small inputs", "lab-dense",
    "The inputs of a linear map with the smallest |x| times the length of their column can be left out, token by "
    "token, at less cost than those with the smallest |x| (WINA, arXiv 2505.19427); one cut for a layer gives each "
    "channel a threshold of its own (CHESS, arXiv 2409.01366).",
    cases, measure, findings, draw,
    judged="Perplexity of whole texts, and whether the answer that the model writes begins with the right one.",
    notes="The masks are those of the MLPs' last map alone, at all layers, and the first token stays whole. WINA and "
    "CHESS are tried without their rotations, allocations of shares to layers and kernels: masked inputs of a dense "
    "product save no time here.")


if __name__ == "__main__":
    main()
