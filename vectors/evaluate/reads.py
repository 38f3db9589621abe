"""Scores of a stored probe on answers, as the probe grader asks for them."""

from collections.abc import Sequence

from steering.language.vocabulary import Pooling
from steering.programs.reading import Reader
from vectors.evaluate.graders.contract import Answer, Measure
from vectors.extract.subject import Subject, batches


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
