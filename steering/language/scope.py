"""How a request names the tokens that an intervention touches."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from steering.language.fields import MAX_LIST, Index, Model, Position
from steering.language.vocabulary import SECTIONS, Section


class _Select(Model):
    """Tokens that at least one of the fields names."""

    token_ids: list[Index] | None = Field(default=None, min_length=1, max_length=MAX_LIST,
                                          description="Tokens with one of these ids.")


class PromptPick(_Select):
    """Prompt tokens that at least one of positions, windows, token ids and roles names."""

    positions: list[Position] | None = Field(default=None, min_length=1, max_length=MAX_LIST,
                                 description="Positions from the prompt's start; negative ones from its end.")
    windows: list[tuple[Position | None, Position | None]] | None = Field(
        default=None, min_length=1, max_length=MAX_LIST,
        description="Half-open windows [start, stop). A negative number counts from the prompt's end, null leaves "
        "that end open.")
    roles: list[Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,32}$")]] | None = Field(
        default=None, min_length=1, max_length=16,
        description="Chat turns of these roles, markers included (system, user, ...).")


class PromptSelection(PromptPick):
    """The prompt tokens that its fields pick (all, if no field is given), without those that `exclude` picks."""

    exclude: PromptPick | None = Field(
        default=None, description="Tokens that are left alone, even where another field picks them.")


class GenerationPick(_Select):
    """Generated tokens that at least one of positions, windows, token ids and sections names. Position 0 is the first
    one."""

    positions: list[Index] | None = Field(default=None, min_length=1, max_length=MAX_LIST,
                                   description="Positions from the first generated token (0).")
    windows: list[tuple[Index | None, Index | None]] | None = Field(
        default=None, min_length=1, max_length=MAX_LIST, description="Half-open windows [start, stop); null for open.")
    sections: list[Section] | None = Field(
        default=None, min_length=1, max_length=len(SECTIONS),
        description="What the model thinks before it answers (reasoning), tool calls (tool_call), JSON that it is "
        "held to or that stands in a ```json block (json), and the rest (answer).")


class GenerationSelection(GenerationPick):
    """The generated tokens that its fields pick (all, if no field is given), without those that `exclude` picks."""

    exclude: GenerationPick | None = Field(
        default=None, description="Tokens that are left alone, even where another field picks them.")


class Scope(Model):
    """Which tokens an intervention touches.

    A generated token is touched when it is fed back to the model. The first generated token is *predicted* by the last
    prompt token. To steer every prediction and nothing else,
    write `{"prompt": {"positions": [-1]}, "generation": "all"}`.
    """

    prompt: Literal["all", "none"] | PromptSelection = Field(default="all", description="Prompt tokens.")
    generation: Literal["all", "none"] | GenerationSelection = Field(default="all", description="Generated tokens.")

    @model_validator(mode="after")
    def _touches_something(self) -> Self:
        if self.prompt == "none" and self.generation == "none":
            raise ValueError("the scope touches no token; leave the intervention out instead")
        return self
