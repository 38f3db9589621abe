"""A prompt with its right answers, as evaluations and extractions take it."""

from typing import Annotated

from pydantic import Field, StringConstraints

from steering.language.fields import Model
from vectors.extract.subject import Prompt

Expected = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class Question(Model):
    """A prompt that brings its right answers along."""

    prompt: Prompt
    expected: list[Expected] = Field(min_length=1, max_length=64, description="Right answers, any of which will do.")
