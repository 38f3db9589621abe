"""What is claimed of SmolLM2, and how each claim is made and tested.

A claim makes one artifact by a method of the server, from data of this folder. Its tests grade whole answers to prompts
that neither the method nor the choice of layer and strength has seen, each beside 20 random artifacts of equal size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lab.real.concise import DEV, TEST, concise
from lab.real.facts import MONTHS, TASKS, months, relations
from lab.real.pairs import FRENCH, PROMPTS, TONE, pairs
from lab.real.prompts import GREY_DEV, GREY_TEST
from lab.real.requests import caution, records, requests

Fields = dict[str, Any]
SENTIMENT = {wanted: {"kind": "sentiment", "wanted": wanted} for wanted in ("positive", "negative")}
REFUSAL = {"kind": "refusal", "wanted": "refusal"}
RIGHT = {"kind": "choice", "match": "first"}
# SmolLM2's tokenizer puts no mark at the beginning, so that the first token is its attention sink. Were that the word
# itself, nothing behind it could read it: with "{x} ->" no layer or strength gives a plural on dev, with this one all.
TEMPLATE = "- {x} ->"
# The month that is named first, of all of them.
MONTH = {**RIGHT, "options": list(MONTHS)}
SHORT = {"kind": "length", "most": 16}


READ = {
    "capital": "Where it is wrong it names another place, often one nearby: Örebro for Stockholm, Belorussia for "
               "Belgrade. Behind the word the model goes on as it likes: the vector acts on the next token alone.",
    "plural": "The one that is wrong is \"lady\" for \"ladies\". Behind the word the model goes on as it likes, "
              "because the vector acts on the next token alone."}


@dataclass(frozen=True)
class Test:
    """One evaluation. measured: what a success of the grader is, in words. intervention: fields beside the artifact.
    controls, spared: prompts on which a success is one too many, and what it is there. tasks, elsewhere: questions with
    right answers that should stay right, and what they are about. wanted: which way the successes should go.
    rules_alone: the grader looks at the text alone, because the untouched model finds any success unlikely, or because
    of few tokens one that it finds unlikely decides.
    instruction: asks for the same in words, as the ceiling. draws: random artifacts; none where `beside` says which
    test of this claim has them, on the same prompts.
    """

    measured: str
    prompts: Sequence[Any]
    grader: Mapping[str, Any]
    intervention: Mapping[str, Any] = field(default_factory=dict)
    controls: Sequence[Any] = ()
    spared: str = ""
    tasks: Sequence[Any] = ()
    elsewhere: str = ""
    wanted: Literal["more", "fewer"] = "more"
    rules_alone: bool = False
    instruction: str = ""
    max_tokens: int = 20
    draws: int = 20
    beside: int | None = None


@dataclass(frozen=True)
class Claim:
    """claim: what it says. fields: of the extraction. report: parts of the method's report that the page shows, because
    the method's own controls stand there. read: what whoever read the texts has to add."""

    name: str
    title: str
    claim: str
    description: str
    method: str
    fields: Mapping[str, Any]
    tests: Sequence[Test] = ()
    tags: tuple[str, ...] = ()
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    report: tuple[str, ...] = ()
    read: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """Claims whose artifacts it uses."""
        return tuple(str(test.intervention["artifact"]) for test in self.tests if "artifact" in test.intervention)


def asked(prompts: Sequence[str], behind: str = "") -> list[Any]:
    """Each as a conversation."""
    return [[{"role": "user", "content": f"{prompt} {behind}".strip()}] for prompt in prompts]


def questions(task: str, split: str = "test") -> list[Fields]:
    """Bare queries of a task, as its function vector was made for."""
    return [{"prompt": TEMPLATE.format(x=pair["input"]), "expected": [pair["output"]]} for pair in TASKS[task]
            if pair["split"] == split]


def facts(target: bool, relation: str) -> list[Fields]:
    """Test facts of a relation, or of all others."""
    return [{"prompt": fact["text"], "expected": [fact["answer"].strip()]} for fact in relations()
            if fact["split"] == "test" and (fact["label"] == relation) == target]


def later(steps: int) -> list[Fields]:
    """Test prompts whose answers are months, each with the month that comes `steps` after its own answer."""
    return [{"prompt": one["text"], "expected": [MONTHS[(MONTHS.index(one["label"]) + steps) % len(MONTHS)]]}
            for one in months("test")]


def instead(month: str) -> list[Fields]:
    """Test prompts whose answers are months, but for those whose own it is."""
    return [{"prompt": one["text"], "expected": [month]} for one in months("test") if one["label"] != month]


def tried(grader: Mapping[str, Any], prompts: Sequence[str], **more: Any) -> Fields:
    return {"trial": {"grader": dict(grader), "prompts": asked(prompts), **more}}


CLAIMS = (
    Claim(
        "cheerful", "A tone",
        "One vector from 40 pairs of cheerful and gloomy answers makes answers cheerful; with the other sign, gloomy.",
        "Answers cheerfully; a negative strength gloomily.", "mean_difference",
        # The effort `quick` sees so few texts that rounding decides between layers: two runs of it took 18 and 21.
        {"pairs": pairs(TONE), **tried(SENTIMENT["positive"], GREY_DEV, effort="normal")},
        (Test("positive answers", asked(GREY_TEST), SENTIMENT["positive"]),
         # A random vector turned round is as random as it was.
         Test("negative answers, with the strength times -1", asked(GREY_TEST), SENTIMENT["negative"],
              {"dose": -1}, draws=0, beside=0)),
        ("tone",), {"cheerful": {}, "gloomy": {"sign": -1, "description": "Answers gloomily, by `cheerful` reversed."}},
        read="Read by a person, the texts are whole, and plainly cheerful or gloomy; what they say is often silly, "
             "because the tone goes before the sense: \"A headache is a wonderful feeling\", \"A leaking roof is a "
             "beautiful and unexpected sight\". The grader misses some, because words like \"broken\" weigh with it. "
             "Two earlier runs, with the effort `quick`, took layers 18 and 21 and had 67 and 71 % cheerful and 71 and "
             "42 % gloomy answers: such figures change that much with what is chosen on 12 dev prompts."),
    Claim(
        "french", "A language",
        "One vector from 40 pairs of French and English answers makes the model answer in French.",
        "Answers in French. This model's French is poor.", "mean_difference",
        {"pairs": pairs(FRENCH), **tried({"kind": "language", "language": "fr"}, PROMPTS["dev"],
                                         instruction="Answer in French.")},
        (Test("whole French answers", asked(PROMPTS["test"][:16]), {"kind": "language", "language": "fr"},
              rules_alone=True, instruction="Answer in French."),),
        ("language",), {"french": {}},
        read="Read by a person, none of the steered texts is a sentence of French that means something, and of the "
             "instructed ones few are. \"La béché: La béché\" counts as whole because the rules on loops look at "
             "longer texts. What the vector shows is the language of the words, not that the model can speak it."),
    Claim(
        "concise", "A register: concise",
        "One vector from 36 pairs of short and long answers makes the model answer in at most 16 words and stop.",
        "Answers in a few words.", "mean_difference",
        {"pairs": concise(), **tried(SHORT, DEV, instruction="Answer in a few words.")},
        (Test("answers that end within 16 words", asked(TEST[:16]), SHORT, instruction="Answer in a few words.",
              max_tokens=24),),
        ("register",), {"concise": {}},
        read="Some texts are shorter (\"The best sport?\"), and capitals stray into most. The trial saw one on its "
             "few dev prompts that does not hold on others. The instruction does little, either."),
    Claim(
        "caution", "Caution",
        "One vector from pairs of refusals and consents, added, makes the model refuse what is harmful.",
        "Refuses. Behind the gate `harmful` it refuses harmful requests.", "mean_difference",
        {"pairs": caution(), **tried(REFUSAL, requests("harmful", "dev"))},
        (Test("harmful requests that are refused", asked(requests("harmful", "test")[:16]), REFUSAL,
              controls=asked(requests("harmless", "test")[:8]), spared="harmless requests that are refused"),),
        ("refusal",), read="Read by a person, most steered answers to harmful requests turn away or into a "
                           "warning, and about half say so as a refusal. Harmless requests are refused as readily, "
                           "which is what the gate below is for."),
    Claim(
        "harmful", "A gate",
        "A probe of the prompt tells harmful requests from harmless ones, so that caution acts on the former alone.",
        "Tells harmful requests from harmless ones: a condition for gates, guards and monitors.", "condition",
        {"examples": [{**one, "text": asked([one["text"]])[0]} for one in records()], "target": "harmful"},
        (Test("harmful requests that are refused, caution behind the gate", asked(requests("harmful", "test")[:16]),
              REFUSAL, {"artifact": "caution", "gate": {"probe": "harmful"}},
              controls=asked(requests("harmless", "test")), spared="harmless requests that are refused", draws=0),),
        ("refusal",), {"cautious": {"artifact": "caution", "gate": "harmful"}}, report=("f1",)),
    *(Claim(
        f"to-{task}", f"A function vector: {what}",
        f"One vector from five examples a prompt makes '- WORD ->' mean: give the {what}, with no example.",
        f"Answers '- WORD ->' with the {what}, as after five examples.", "function_vector",
        {"pairs": TASKS[task], "other_pairs": TASKS[other], "template": TEMPLATE, "max_eval": 16},
        (Test(f"right answers to '- WORD ->' ({what})", questions(task), RIGHT, rules_alone=True,
              max_tokens=6),),
        ("task",), report=("few_shot", "other_task"), read=READ[task])
      for task, other, what in (("capital", "plural", "capital"), ("plural", "opposite", "plural"))),
    Claim(
        "capital-neurons", "Relation neurons",
        "The one per cent of MLP units that respond most to capitals, switched off, cost that relation and no other.",
        "MLP units that respond to 'The capital of COUNTRY'; off, capitals are forgotten.", "relation_neurons",
        {"facts": relations(), "target": "capital", "share": 0.01},
        (Test("right capitals", facts(True, "capital"), RIGHT, tasks=facts(False, "capital")[::3],
              elsewhere="right answers of other relations", wanted="fewer",
              rules_alone=True, max_tokens=6),),
        ("facts",), read="Six of ten known capitals are gone, but other relations suffer as well, and one of the 20 "
                         "random sets does more, because it breaks the model. Other shares have not been tried."),
    Claim(
        "months", "A manifold: months",
        "The months lie on a ring; moved along it, what the model says of the next month moves as many months on.",
        "Where the months lie when the next one is asked for; `target` names one, `shift` goes on by so many.",
        "manifold",
        {"examples": months(), "layout": "cyclic", "order": list(MONTHS), "rank": 16},
        (Test("answers three months later, with a shift of 3", later(3), MONTH, {"options": {"shift": 3}},
              rules_alone=True, max_tokens=6),
         Test("answers 'June', with it as the target", instead("June"), MONTH, {"options": {"target": "June"}},
              rules_alone=True, max_tokens=6)),
        ("ring",), report=("swap",),
        read="Read by a person, the answers are months and the texts as plain as untouched. With June as the target "
             "most others say October or September. It is a draft because the twelve means do not come in their order "
             "at any layer; that a shift works all the same says that this order is a strict test."),
)
