"""Graders as requests name them: `{"kind": "language", "language": "fr"}`."""

from typing import Annotated

from pydantic import Field

from vectors.evaluate.graders.choice import ChoiceGrader
from vectors.evaluate.graders.json_schema import JsonSchemaGrader
from vectors.evaluate.graders.language import LanguageGrader
from vectors.evaluate.graders.length import LengthGrader
from vectors.evaluate.graders.pattern import RegexGrader
from vectors.evaluate.graders.refusal import RefusalGrader
from vectors.evaluate.graders.sentiment import SentimentGrader
from vectors.evaluate.graders.whole import WholeGrader

AnyGrader = Annotated[ChoiceGrader | JsonSchemaGrader | LanguageGrader | LengthGrader | RegexGrader | RefusalGrader
                      | SentimentGrader | WholeGrader, Field(discriminator="kind")]
