"""docs/real-model.md, from the results that are stored."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lab.real.claims import CLAIMS, Claim

RESULTS = Path(__file__).parent / "results"
PATH = Path(__file__).parents[2] / "docs" / "real-model.md"
PICTURE = "real-model.png"
Document = Mapping[str, Any]
# What is called an effect is this much over untouched, and beyond every random draw; damage is this many more broken
# texts than untouched.
VISIBLE, MORE_BROKEN = 0.3, 0.05
NOTHING = "Does not work: "
SHOWN = 4
HEAD = """# On a real model: what steering does to SmolLM2-135M-Instruct

Written by `make replications-real`; do not edit by hand. SmolLM2-135M-Instruct is a small instruct model that nobody
here made ([where it comes from](models.md)). Each claim is tried on a server as a user would try it: a method of the
server makes an artifact from data of `lab/real`, whole answers to test prompts are [graded](graders.md), and 20 random
artifacts of equal size are tried the same way. What does not beat all of them is said not to work. The server runs in
bfloat16, which is twice as fast on such a CPU as the default. Answers are greedy and cut at 20 to 24 tokens, six where
one word is asked for. A text that is cut off is not broken; one that cannot be read is, and never counts as a success.
French and single words are graded by rules that look at the text alone; of random artifacts also by how unlikely it is.
No layer, strength or threshold was chosen on a test prompt. There are 15 to 24 of those, so that one prompt is 4 to 7
points and small differences mean nothing. A tone, a language, concise and caution were made and tested before
[trials](concepts.md#the-trial) tried a wide band of layers; the gate stands with the caution that it was tested with.

The artifacts that do something come with `trimtab serve smollm2` under the names below (`{"artifact": "cheerful"}`),
the presets as `smollm2:cheerful` and so on.
"""
NOT_TRIED = """Not tried on this model: angular and entropic steering, sign patterns, native skills, heads.
[Replications](replications.md) has them on the lab's models, where less computing tells more."""


@dataclass(frozen=True)
class Finding:
    """One line of the page's table."""

    measured: str
    untouched: str
    ours: str
    placebo: str
    damage: str
    verdict: str


def stored(claim: Claim) -> Document | None:
    path = RESULTS / f"{claim.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def store(claim: Claim, result: Document) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{claim.name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n",
                                                encoding="utf-8")


def document() -> str:
    found = [(claim, result) for claim in CLAIMS if (result := stored(claim)) is not None]
    lines = [HEAD, f"![Shares of successes, untouched, steered and under random artifacts]({PICTURE})", "",
             "| claim | measured | untouched | ours | verdict |", "|---|---|---|---|---|"]
    for claim, result in found:
        lines += [f"| [{claim.title}](#{_anchor(claim.title)}) | {one.measured} | {one.untouched} | {one.ours} | "
                  f"{one.verdict} |" for one in findings(result)]
    missing = [claim.title for claim in CLAIMS if stored(claim) is None]
    if missing:
        lines += ["", f"Written and not measured yet: {', '.join(missing)}. `make replications-real` does it, or one "
                  "by one with `CLAIMS=`."]
    lines += ["", NOT_TRIED]
    return "\n".join([*lines, "", *(_section(claim, result) for claim, result in found)])


def findings(result: Document) -> list[Finding]:
    """What the tests of a claim say, or why there are none."""
    if "failed" in result:
        return [Finding("the method's own selection", "-", "-", "-", "-", f"Nothing was made: {result['failed']}.")]
    return [_finding(test) for test in result["tests"]]


def _finding(test: Document) -> Finding:
    plain, ours, random = test["untouched"], test["ours"], test["random"]
    damage = [f"broken {_p(ours['broken'])}, untouched {_p(plain['broken'])}" + _beside(random, "broken"),
              f"perplexity {ours['perplexity']:.1f}, untouched {plain['perplexity']:.1f}" + (
                  f", random {fmean(random['perplexity']):.1f}" if "perplexity" in random else "")]
    if ours["over"] is not None:
        damage.append(f"{test['spared']} {_p(ours['over'])}, untouched {_p(plain['over'])}" + _beside(random, "over")
                      + f"; broken there {_p(ours['over_broken'])}")
    if ours["tasks"] is not None:
        damage.append(f"{test['elsewhere']} {_p(ours['tasks'])}, untouched {_p(plain['tasks'])}"
                      + _beside(random, "tasks"))
    placebo = (f"{_range(random['success'])} ({len(random['success'])} draws)" if random else
               "of the probe, above")
    if test["instructed"] is not None:
        placebo += f"; \"{test['instruction']}\" in the prompt: {_p(test['instructed']['success'])}"
    return Finding(f"{test['measured']}, of {test['prompts']}", _p(plain["success"]), _p(ours["success"]), placebo,
                   "; ".join(damage), verdict(test))


def verdict(test: Document) -> str:
    """In plain words, by the same rules for every line."""
    sign = 1 if test["wanted"] == "more" else -1
    plain, ours, random = test["untouched"], test["ours"], test["random"]
    gained = sign * (ours["success"] - plain["success"])
    beyond = min((sign * (ours["success"] - draw) for draw in random.get("success", ())), default=None)
    broken = ours["broken"] - plain["broken"]
    if gained <= 0 or (beyond is not None and beyond <= 0):
        said = NOTHING + ("nothing is gained." if gained <= 0 else "a random artifact does as much.")
    elif sign < 0 and broken > gained / 2:
        said = NOTHING + "the answers are not gone but broken."
    elif broken > gained:
        said = f"Visible and not usable: {100 * gained:.0f} points, and more than that break."
    else:
        said = f"{'Works' if gained >= VISIBLE else 'Weak'}: {100 * gained:.0f} points" + (
            "." if beyond is None else f", {100 * beyond:.0f} beyond every random draw.")
    if broken > MORE_BROKEN:
        said += f" It breaks {100 * broken:.0f} % of the texts."
    if ours["over"] is not None and ours["over"] > plain["over"] + MORE_BROKEN:
        said += f" It also acts where it should not: {_p(ours['over'])}."
    if ours["tasks"] is not None and ours["tasks"] < plain["tasks"] - VISIBLE / 2:
        said += f" Others suffer, too: {_p(ours['tasks'])} instead of {_p(plain['tasks'])}."
    return said


def _section(claim: Claim, result: Document) -> str:
    lines = [f"## {claim.title}", "", f"**The claim.** {claim.claim}", "", _made(claim, result), "",
             "| measured | untouched | ours | placebo: min / mean / max | damage | verdict |",
             "|---|---|---|---|---|---|"]
    lines += [f"| {one.measured} | {one.untouched} | {one.ours} | {one.placebo} | {one.damage} | {one.verdict} |"
              for one in findings(result)]
    if claim.read:
        lines += ["", claim.read]
    for test in result.get("tests", ()):
        arms = ("untouched", "ours", "one random")[:len(test["texts"][0]["outcomes"])]
        lines += ["", f"Texts, {test['measured']}:", "", f"| prompt | {' | '.join(arms)} |",
                  "|---" * (1 + len(arms)) + "|"]
        lines += [f"| {' | '.join([_cell(one['prompt']), *_graded(one)])} |" for one in test["texts"][:SHOWN]]
    return "\n".join([*lines, ""])


def _made(claim: Claim, result: Document) -> str:
    if "failed" in result:
        return f"Method `{claim.method}`."
    layers = result["layers"]
    where = f"layer {', '.join(map(str, layers))}" if isinstance(layers, Sequence) else "all its layers"
    strength = result["strength"]
    made, tested = (_took(result["seconds"][part]) for part in ("extraction", "tests"))
    said = (f"`{claim.name}`: a {result['kind'].replace('_', ' ')} by `{claim.method}`, on {where}, strength "
            f"{strength['value']:g} ({strength['unit']}). Made in {made}, tested in {tested}. "
            f"[All figures and texts](../lab/real/results/{claim.name}.json).")
    if result["draft"]:
        said += f" The server stored it as a draft: {result['draft']}"
    own = [_own(key, result["report"]) for key in claim.report]
    return " ".join([said, *filter(None, own)])


def _took(step: Document) -> str:
    """In seconds of a core, where they are known."""
    return f"{step['wall']:.0f} s" if step["cpu"] is None else f"{step['cpu']:.0f} s of a core"


def _own(key: str, report: Document) -> str:
    """A figure of the method's own report, with its controls."""
    test, controls = report["test"], report["controls"]
    if key == "f1":
        drawn = [f"{name} {one['min']:.2f} / {one['mean']:.2f} / {one['max']:.2f}" for name, one in (
            ("random directions", controls["random_directions"]),
            ("probes of shuffled labels", controls["shuffled_labels"]))]
        return (f"F1 on test requests {test['f1']:.2f} (AUC {test['auc']:.2f}); {', '.join(drawn)}, which tokens occur "
                f"{controls['bag_of_tokens']['f1']:.2f}.")
    if key == "few_shot":
        return (f"First tokens, by the method itself: with five examples {test['few_shot']:.2f} right, with none "
                f"{test['zero_shot']:.2f}, steered {test['steered']:.2f}.")
    if key == "swap":
        drawn = [f"{name} {one['min']:.2f} / {one['mean']:.2f} / {one['max']:.2f}" for name, one in (
            ("centroids of dealt labels", controls["shuffled_labels"]),
            ("random subspaces", controls["random_subspaces"]))]
        return (f"First tokens, by the method itself: swaps onto another month that make the answer most like that "
                f"month's own {test['swap']:.2f} of {test['swaps']}; {', '.join(drawn)}.")
    dealt = controls["shuffled_demonstrations"]
    return (f"The vector of another task, as long: {controls['other_task']['accuracy']:.2f}; of shuffled examples "
            f"{dealt['min']:.2f} / {dealt['mean']:.2f} / {dealt['max']:.2f}.")


def _graded(one: Document) -> list[str]:
    return [f"{_cell(one[arm])} ({outcome})"
            for arm, outcome in zip(("untouched", "ours", "random"), one["outcomes"], strict=False)]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _p(share: float) -> str:
    return f"{share:.0%}"


def _beside(random: Document, key: str) -> str:
    return f", random {_range(random[key])}" if key in random else ""


def _range(shares: Sequence[float]) -> str:
    return f"{_p(min(shares))} / {_p(fmean(shares))} / {_p(max(shares))}"


def _anchor(title: str) -> str:
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c == "-")
