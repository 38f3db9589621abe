"""What an evaluation takes: prompts, graders, doses and random counterparts, each bounded."""

from typing import Annotated

from pydantic import Field, model_validator

from steering.language.fields import Model
from vectors.evaluate.graders.any import AnyGrader
from vectors.extract.asked import Question
from vectors.extract.subject import Prompt

# Tokens that all completions of one evaluation may have together: some hours on a CPU with a small model.
MOST_TOKENS = 4_000_000
Dose = Annotated[float, Field(strict=True, gt=-1000, lt=1000)]


class EvaluateOptions(Model):
    """How a spec is evaluated. Completion i has the same seed in every arm."""

    prompts: list[Question | Prompt] = Field(min_length=1, max_length=2048, description="What is asked: text, "
                                             "conversations, token ids, or any of them with right answers.")
    graders: list[AnyGrader] = Field(min_length=1, max_length=8, description="What the answers are graded by.")
    controls: list[Prompt] = Field(default=[], max_length=1024, description="Prompts on which nothing should change; "
                                   "success of the first grader there is over-effect.")
    tasks: list[Question] = Field(default=[], max_length=1024, description="Unrelated questions with right answers, "
                                  "which show what the spec costs elsewhere.")
    doses: list[Dose] = Field(default=[1.0], min_length=1, max_length=16, description="What every strength is "
                              "multiplied with, an arm each.")
    draws: int = Field(default=20, strict=True, ge=0, le=200, description="Random artifacts of equal size a dose.")
    max_tokens: int = Field(default=48, strict=True, ge=1, le=2048, description="Tokens of a completion.")
    temperature: float = Field(default=0.0, strict=True, ge=0, le=2, description="Of the completions.")
    seed: int = Field(default=0, strict=True, ge=0, le=2**32 - 1, description="Seed of completions and draws.")
    samples: int = Field(default=8, strict=True, ge=0, le=64, description="Texts kept of each arm.")

    @model_validator(mode="after")
    def _bounded(self) -> "EvaluateOptions":
        if len(set(self.doses)) != len(self.doses) or 0 in self.doses:
            raise ValueError("doses must differ, and 0 is the untouched model that is measured anyway")
        if self.most_tokens > MOST_TOKENS:
            raise ValueError(f"{self.completions} completions of {self.max_tokens} tokens are more than {MOST_TOKENS} "
                             "tokens; take fewer prompts, draws or doses")
        return self

    @property
    def completions(self) -> int:
        """How many completions all arms have together."""
        arms = 1 + len(self.doses) * (1 + self.draws)
        return arms * (len(self.prompts) + len(self.controls) + len(self.tasks))

    @property
    def most_tokens(self) -> int:
        return self.completions * self.max_tokens
