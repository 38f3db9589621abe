"""A trained probe as a grader: what the untouched model makes of the answer, read at one layer."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from steering.language.fields import NAME_PATTERN
from steering.language.vocabulary import Pooling
from steering.programs.reading import Reader
from vectors.evaluate.graders.contract import Answer, Grader, Measure, Tools, Verdict
from vectors.evaluate.graders.refusals import GraderUnusable
from vectors.extract.subject import Subject, batches


class ProbeGrader(Grader):
    """`above` or `below` a threshold of the probe's score of the answer."""

    kind: Literal["probe"] = "probe"
    probe: str = Field(pattern=NAME_PATTERN, description="Artifact of the library that can be read.")
    threshold: float = Field(description="The score that parts the two.")
    wanted: Literal["above", "below"] = Field(default="above", description="The outcome that is a success.")
    outcomes: ClassVar[tuple[str, ...]] = ("above", "below")

    def judge(self, answers: Sequence[Answer], tools: Tools) -> list[Verdict]:
        if self.probe not in tools.probes:
            raise GraderUnusable(f"the probe {self.probe} is not loaded", param=("grader", "probe"),
                                 fix="Name a probe of the library that was made on the served model.")
        return [self._one(score) for score in tools.probes[self.probe](answers)]

    def _one(self, score: float) -> Verdict:
        outcome = "above" if score > self.threshold else "below"
        return Verdict(outcome, outcome == self.wanted, (f"score {score:.3f}",))


def reads(reader: Reader, subject: Subject, pool: Pooling = "mean") -> Measure:
    """The tool that `ProbeGrader` asks for: scores of answers, read in the untouched model at the last of the layers
    that the reader has numbers for.

    The text is read alone, without its prompt: a probe must not see what was asked.
    """
    layer = max(reader.layers)

    def scores(answers: Sequence[Answer]) -> list[float]:
        texts = [subject.encode(answer.text) for answer in answers]
        found: list[float] = []
        for part in batches(texts):
            captured = subject.capture([texts[n] for n in part], reader.site, [layer], None)
            found += [reader.pooled(layer, one[layer], pool) for one in captured]
        return found

    return scores
