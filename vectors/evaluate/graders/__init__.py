"""Graders of whole answers: one a file, one contract."""

from vectors.evaluate.graders.choice import ChoiceGrader
from vectors.evaluate.graders.contract import BROKEN, Answer, Grader, Measure, Tools, Verdict
from vectors.evaluate.graders.grade import grade
from vectors.evaluate.graders.json_schema import JsonSchemaGrader
from vectors.evaluate.graders.language import LanguageGrader
from vectors.evaluate.graders.length import LengthGrader
from vectors.evaluate.graders.llm_judge import LlmJudge
from vectors.evaluate.graders.pattern import RegexGrader
from vectors.evaluate.graders.probe import ProbeGrader
from vectors.evaluate.graders.refusal import RefusalGrader
from vectors.evaluate.graders.sentiment import SentimentGrader
from vectors.evaluate.graders.whole import WholeGrader

__all__ = ["BROKEN", "Answer", "ChoiceGrader", "Grader", "JsonSchemaGrader", "LanguageGrader", "LengthGrader",
           "LlmJudge", "Measure", "ProbeGrader", "RefusalGrader", "RegexGrader", "SentimentGrader", "Tools", "Verdict",
           "WholeGrader", "grade"]
