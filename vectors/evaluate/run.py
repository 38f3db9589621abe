"""An evaluation: what the texts under a spec are, at several doses, beside the untouched model and random artifacts of
equal size. Completion i is drawn with the same seed in every arm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import exp
from statistics import mean, median
from typing import Literal

from steering.artifacts.source import Resolved
from steering.language.errors import InvalidSpec
from steering.programs.compiler import compile_program
from steering.programs.program import Program
from vectors.calibrate.bench import Bench, Trial
from vectors.calibrate.placebo import random_like
from vectors.evaluate.graders.choice import ChoiceGrader
from vectors.evaluate.graders.contract import BROKEN, Answer, Grader, Tools
from vectors.evaluate.graders.grade import grade
from vectors.evaluate.shares import Share
from vectors.extract.subject import Prompt, encoded

Step = Callable[[float, str], None]
Kind = Literal["untouched", "steered", "random"]


@dataclass(frozen=True)
class Asked:
    """A prompt, and the right answers to it for graders that need them."""

    prompt: Prompt
    expected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """doses: what every strength of the spec is multiplied with. draws: random counterparts at each dose. samples:
    texts that are kept of each arm, with their verdicts; those of the same prompts in all arms. controls: prompts on
    which nothing should change. tasks: unrelated questions with right answers. names_roles: scopes of the spec do.
    before: steps that act in front of the spec in every arm, also in the one without the spec, at their own strength.
    """

    names_roles: bool = False
    controls: tuple[Prompt, ...] = ()
    tasks: tuple[Asked, ...] = ()
    before: tuple[Resolved, ...] = ()

    doses: tuple[float, ...] = (1.0,)
    draws: int = 20
    max_tokens: int = 48
    temperature: float = 0.0
    seed: int = 0
    samples: int = 8


@dataclass(frozen=True)
class Graded:
    """What one grader found in one arm. outcomes: share of each, `broken` among them. success: of the wanted one."""

    grader: str
    outcomes: dict[str, Share]
    success: Share
    broken: Share


@dataclass(frozen=True)
class Arm:
    """kl: mean nats per token from the untouched model. perplexity: of the texts under the untouched model. samples:
    (number of the prompt, text, outcome by each grader). controls: what the first grader finds on the control prompts.
    tasks: unrelated questions answered rightly.
    """

    kind: Kind
    dose: float
    graded: tuple[Graded, ...]
    kl: float
    perplexity: float
    repetition: float
    samples: tuple[tuple[int, str, tuple[str, ...]], ...] = ()
    controls: Graded | None = None
    tasks: Share | None = None


@dataclass(frozen=True)
class Evaluation:
    """steered: one arm a dose, in order. random: the draws of each dose, in the same order."""

    untouched: Arm
    steered: tuple[Arm, ...]
    random: tuple[tuple[Arm, ...], ...] = field(default=())

    def chance(self, dose: int, grader: int = 0) -> float:
        """How often a random artifact of this size succeeds as often as the spec, its own draw counted: small values
        speak for the spec. 1 over (draws + 1) at best."""
        reached = self.steered[dose].graded[grader].success.count
        others = [arm.graded[grader].success.count for arm in self.random[dose]]
        return (1 + sum(count >= reached for count in others)) / (1 + len(others))


def evaluate(spec: Sequence[Resolved], asked: Sequence[Asked], graders: Sequence[Grader], bench: Bench,
             options: Options, tools: Tools | None = None, step: Step = lambda share, stage: None) -> Evaluation:
    """
    Args:
        tools: for graders; surprise is measured here and need not be given.
        step: called with the share done before each arm; it raises when the evaluation is cancelled.

    Raises:
        InvalidSpec: no intervention or prompt, or one without a stored artifact where draws are asked for.
        TrimtabError: the spec does not fit the model, a prompt is empty or too long, a grader or its judge fails.
    """
    if not spec or not asked or not graders or not options.doses:
        raise InvalidSpec("an evaluation needs interventions, prompts, graders and doses", param="evaluation")
    if options.draws and any(one.source is None for one in spec):
        raise InvalidSpec("numbers given inline have no random counterpart", param="draws",
                          fix="Store them as an artifact, or set draws to 0.")
    runner = _Runner(asked, graders, bench, options, tools or Tools())
    before = options.before
    programs = [_program(before, spec, bench, dose) for dose in options.doses]
    drawn = [_random(spec, programs[0], bench, options.seed + n) for n in range(options.draws)]
    total = 1 + len(options.doses) * (1 + options.draws)
    done = 0

    def arm(kind: Kind, dose: float, program: Program | None) -> Arm:
        nonlocal done
        step(done / total, kind)
        done += 1
        return runner.arm(kind, dose, program)

    untouched = arm("untouched", 0.0, compile_program(before, bench.facts) if before else None)
    steered = tuple(arm("steered", dose, program) for dose, program in zip(options.doses, programs, strict=True))
    random = tuple(tuple(arm("random", dose, _program(before, other, bench, dose)) for other in drawn)
                   for dose in options.doses)
    return Evaluation(untouched, steered, random if options.draws else ())


def _program(before: Sequence[Resolved], spec: Sequence[Resolved], bench: Bench, dose: float) -> Program:
    return compile_program([*before, *(replace(one, factor=one.factor * dose) for one in spec)], bench.facts)


def _random(spec: Sequence[Resolved], program: Program, bench: Bench, seed: int) -> list[Resolved]:
    """The spec with random numbers of equal size in each artifact's place; gates and scopes stay."""
    found = []
    own = program.compiled[len(program.compiled) - len(spec):]
    for number, (one, compiled) in enumerate(zip(spec, own, strict=True)):
        assert one.source is not None
        payload = random_like(one.source.payload, bench.facts, compiled.applied.sites[0], seed * len(spec) + number)
        found.append(replace(one, source=replace(one.source, ref=f"random@{seed + 1}", digest="", payload=payload)))
    return found


class _Runner:
    def __init__(self, asked: Sequence[Asked], graders: Sequence[Grader], bench: Bench, options: Options, tools: Tools
                 ) -> None:
        self._asked = asked
        self._graders = graders
        self._bench = bench
        self._options = options
        self._tools = tools
        self._controls = [Asked(prompt) for prompt in options.controls]
        self._tokens = {name: [encoded(bench, one.prompt, (name, n)) for n, one in enumerate(group)]
                        for name, group in (("prompts", asked), ("controls", self._controls), ("tasks", options.tasks))}
        self._roles = {} if not options.names_roles else {
            name: [bench.roles(one.prompt) for one in group]
            for name, group in (("prompts", asked), ("controls", self._controls), ("tasks", options.tasks))}
        # What is usual is what the untouched model has on the same prompts; its arm comes first.
        self._usual: dict[str, float] = {}

    def arm(self, kind: Kind, dose: float, program: Program | None) -> Arm:
        trials = self._trials("prompts", program)
        graded, verdicts = [], []
        for grader in self._graders:
            one, outcomes = self._graded(grader, "prompts", self._asked, trials)
            graded.append(one)
            verdicts.append(outcomes)
        samples = tuple((n, trials[n].text, tuple(outcomes[n] for outcomes in verdicts))
                        for n in range(min(self._options.samples, len(trials))))
        return Arm(kind, dose, tuple(graded), mean(trial.kl for trial in trials), _perplexity(trials),
                   mean(trial.repetition for trial in trials), samples, self._on_controls(program),
                   self._on_tasks(program))

    def _on_controls(self, program: Program | None) -> Graded | None:
        if not self._controls:
            return None
        trials = self._trials("controls", program)
        return self._graded(self._graders[0], "controls", self._controls, trials)[0]

    def _on_tasks(self, program: Program | None) -> Share | None:
        if not self._options.tasks:
            return None
        grader = ChoiceGrader(match="first")
        return self._graded(grader, "tasks", self._options.tasks, self._trials("tasks", program))[0].success

    def _trials(self, group: str, program: Program | None) -> list[Trial]:
        options = self._options
        sampling = options.max_tokens, options.temperature, options.seed
        trials = (self._bench.trials(self._tokens[group], program, *sampling, roles=self._roles[group])
                  if self._roles else self._bench.trials(self._tokens[group], program, *sampling))
        self._usual.setdefault(group, median(trial.surprise for trial in trials))
        return trials

    def _graded(self, grader: Grader, group: str, asked: Sequence[Asked], trials: Sequence[Trial]
                ) -> tuple[Graded, list[str]]:
        """What one grader finds in the answers to one group of prompts, and the outcome of each."""
        tools = replace(self._tools, usual_surprise=self._usual[group],
                        surprise=lambda answers: [trial.surprise for trial in trials])
        found = grade(grader, [Answer(trial.text, _shown(one.prompt), trial.ended, one.expected)
                               for trial, one in zip(trials, asked, strict=True)], tools)
        outcomes = [verdict.outcome for verdict in found]
        shares = {name: Share.of(outcomes.count(name), len(found))
                  for name in dict.fromkeys((*grader.outcomes, *outcomes, BROKEN))}
        success = Share.of(sum(verdict.success for verdict in found), len(found))
        return Graded(grader.model_dump()["kind"], shares, success, shares[BROKEN]), outcomes


def _perplexity(trials: Sequence[Trial]) -> float:
    tokens = sum(trial.length for trial in trials)
    return exp(min(sum(trial.surprise * trial.length for trial in trials) / max(tokens, 1), 80.0))


def _shown(prompt: Prompt) -> str:
    """A prompt as graders may read it: token ids are none."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(turn.content for turn in prompt if not isinstance(turn, int))
