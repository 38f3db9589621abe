"""Makes and tests a claim through the API of a running server, as a user would."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter
from trimtab_client import Client, JobFailed, NotFound

from lab.real.claims import Claim, Test
from lab.real.clock import Clock
from vectors.evaluate.graders.any import AnyGrader
from vectors.evaluate.graders.contract import BROKEN, Answer
from vectors.evaluate.graders.grade import grade

Document = dict[str, Any]
GRADER: TypeAdapter[Any] = TypeAdapter(AnyGrader)
# Successes of the graders that tests grade by the text alone with.
WANTED = ("wanted", "right")


def run(client: Client, claim: Claim, clock: Clock) -> Document:
    """Everything that the page says about a claim, from numbers of the server."""
    found: Document = {"claim": claim.name, "model": client.models()[0], "tests": []}
    _forget(client, claim)
    try:
        made = client.extract(name=claim.name, method=claim.method, description=claim.description,
                              tags=["bundled", *claim.tags], **claim.fields)
    except JobFailed as error:
        clock.lap("extraction")
        return {**found, "failed": str(error), "seconds": clock.seconds}
    clock.lap("extraction")
    artifact = client.get_artifact(made.artifact)
    found |= {"fingerprint": artifact.fingerprint, "kind": artifact.kind, "op": artifact.op, "site": artifact.site,
              "layers": (artifact.card or {}).get("layers", artifact.layers), "strength": _plain(artifact.strength),
              "draft": (artifact.card or {}).get("draft"), "report": _short(made.report)}
    drawn: list[list[Document]] = []
    for n, test in enumerate(claim.tests):
        others = [other for other in claim.tests if other.beside == n]
        report = evaluated(client, claim, test, [other.grader for other in others])
        (result,) = report["results"]
        drawn.append([arm["graded"] for arm in result["random"]])
        document = tested(client, claim, test, report)
        if test.beside is not None:
            which = [other for other in claim.tests if other.beside == test.beside].index(test) + 1
            document["random"] = {"success": [graded[which]["success"]["share"] for graded in drawn[test.beside]]}
        found["tests"].append(document)
    clock.lap("tests")
    return {**found, "seconds": clock.seconds}


def _forget(client: Client, claim: Claim) -> None:
    """What a run that stopped in the midst of this claim had stored."""
    try:
        client.delete_artifact(claim.name, force=True)
    except NotFound:
        return


def evaluated(client: Client, claim: Claim, test: Test, also: Sequence[Mapping[str, Any]]) -> Document:
    """The server's report. also: graders whose findings on the random artifacts another test shows."""
    return client.evaluate(
        test.prompts, [test.grader, *also], spec=_spec(claim, test), doses=[float(test.intervention.get("dose", 1))],
        draws=test.draws, controls=test.controls, tasks=test.tasks, max_tokens=test.max_tokens,
        samples=len(test.prompts))


def tested(client: Client, claim: Claim, test: Test, report: Mapping[str, Any]) -> Document:
    """What a test found, with all texts: untouched, ours, and one random artifact's where there is one."""
    (result,) = report["results"]
    arms = [report["untouched"], result["steered"], *result["random"][:1]]
    untouched, ours, *drawn = map(_shares, (*arms[:2], *result["random"]))
    texts = [[sample["text"] for sample in arm["samples"]] for arm in arms]
    outcomes = [[sample["outcomes"][0] for sample in arm["samples"]] for arm in arms]
    if test.rules_alone:
        expected = [_expected(prompt) for prompt in test.prompts]
        outcomes = [by_text(test.grader, said, expected) for said in texts]
        untouched, ours = ({**shares, "success": _share(named, *WANTED), "broken": _share(named, BROKEN)}
                           for shares, named in ((untouched, outcomes[0]), (ours, outcomes[1])))
    return {"measured": test.measured, "wanted": test.wanted, "prompts": len(test.prompts), "dose": report["doses"][0],
            "spared": test.spared, "elsewhere": test.elsewhere, "max_tokens": test.max_tokens,
            "grader": dict(test.grader), "kl": result["steered"]["kl"], "untouched": untouched, "ours": ours,
            "random": {key: [one[key] for one in drawn] for key in ours if drawn},
            "instruction": test.instruction, "instructed": _instructed(client, claim, test),
            "texts": [{"prompt": _said(prompt), "expected": _expected(prompt),
                       **dict(zip(("untouched", "ours", "random"), said, strict=False)), "outcomes": list(named)}
                      for prompt, said, named in zip(test.prompts, zip(*texts, strict=True),
                                                     zip(*outcomes, strict=True), strict=True)]}


def _spec(claim: Claim, test: Test) -> Document:
    return {"interventions": [{"artifact": claim.name, **{key: value for key, value in test.intervention.items()
                                                          if key != "dose"}}]}


def by_text(grader: Mapping[str, Any], texts: Sequence[str], expected: Sequence[Sequence[str]]) -> list[str]:
    """Outcomes by the rules that look at the text alone. expected: right answers to each prompt, where there are."""
    answers = [Answer(text, expected=tuple(right)) for text, right in zip(texts, expected, strict=True)]
    return [one.outcome for one in grade(GRADER.validate_python(dict(grader)), answers)]


def _expected(prompt: Any) -> list[str]:
    return list(prompt["expected"]) if isinstance(prompt, Mapping) else []


def _instructed(client: Client, claim: Claim, test: Test) -> Document | None:
    """What the untouched model writes where the prompt asks for it in words."""
    if not test.instruction:
        return None
    told = [[{**turn, "content": f"{turn['content']} {test.instruction}"} for turn in prompt]
            for prompt in test.prompts]
    arm = client.evaluate(told, [test.grader], spec=_spec(claim, test), draws=0,
                          max_tokens=test.max_tokens, samples=len(told))["untouched"]
    texts = [sample["text"] for sample in arm["samples"]]
    if not test.rules_alone:
        return {**_shares(arm), "texts": texts}
    named = by_text(test.grader, texts, [[]] * len(texts))
    return {**_shares(arm), "success": _share(named, *WANTED), "broken": _share(named, BROKEN), "texts": texts}


def _shares(arm: Mapping[str, Any]) -> dict[str, float | None]:
    graded, controls, tasks = arm["graded"][0], arm["controls"], arm["tasks"]
    return {"success": graded["success"]["share"], "broken": graded["broken"]["share"],
            "perplexity": round(arm["perplexity"], 2),
            "over": None if controls is None else controls["success"]["share"],
            "over_broken": None if controls is None else controls["broken"]["share"],
            "tasks": None if tasks is None else tasks["share"]}


def _share(outcomes: Sequence[str], *wanted: str) -> float:
    return round(sum(outcome in wanted for outcome in outcomes) / len(outcomes), 4)


def _said(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return str(prompt["prompt"] if isinstance(prompt, Mapping) else prompt[-1]["content"])


def _plain(strength: Any) -> Any:
    return strength.model_dump(mode="json") if hasattr(strength, "model_dump") else strength


def _short(report: Mapping[str, Any]) -> Document:
    """A method's own figures: those of test and of its controls."""
    return {key: report[key] for key in ("best_layer", "best_strength", "test", "controls", "effect", "units")
            if key in report}
