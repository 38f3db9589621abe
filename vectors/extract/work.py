"""One run of a recipe: the model it works on, and who is told of progress and asked about cancelling."""

from dataclasses import dataclass
from pathlib import Path

from steering.models.facts import ModelFacts
from vectors.extract.contract import Cancelled, Progress
from vectors.extract.refusals import ExtractionCancelled
from vectors.extract.subject import Subject


@dataclass(frozen=True)
class Work:
    """checkpoint: a file in which a long run may keep what it has, to go on from there when the same is asked for
    again; None where nothing is kept."""

    subject: Subject
    progress: Progress
    cancelled: Cancelled
    created_by: str
    checkpoint: Path | None = None

    @property
    def facts(self) -> ModelFacts:
        return self.subject.facts

    def at(self, share: float, stage: str) -> None:
        """Tell of progress.

        Raises:
            ExtractionCancelled: the work is no longer wanted.
        """
        if self.cancelled():
            raise ExtractionCancelled("the extraction was cancelled")
        self.progress(share, stage)

    def within(self, start: float, stop: float, stage: str) -> "Span":
        return Span(self, start, stop, stage)


@dataclass(frozen=True)
class Span:
    """A part of the work: its own share from 0 to 1 is told as one of the whole."""

    work: Work
    start: float
    stop: float
    stage: str

    def __call__(self, share: float) -> None:
        self.work.at(self.start + (self.stop - self.start) * share, self.stage)

    def part(self, done: int, count: int) -> "Span":
        """Number `done` of `count` equal parts."""
        width = (self.stop - self.start) / count
        return Span(self.work, self.start + done * width, self.start + (done + 1) * width, self.stage)
