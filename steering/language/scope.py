"""How a request names the tokens that an intervention touches."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from steering.language.fields import MAX_LIST, Index, Model, Position


class _Select(Model):
    """Tokens, as the union of what its fields name."""

    token_ids: list[Index] | None = Field(default=None, min_length=1, max_length=MAX_LIST,
                                          description="Tokens with one of these ids.")


class PromptPick(_Select):
    """Prompt tokens: the union of positions, windows, token ids and roles."""

    positions: list[Position] | None = Field(default=None, min_length=1, max_length=MAX_LIST,
                                 description="Positions from the prompt's start; negative ones from its end.")
    windows: list[tuple[Position | None, Position | None]] | None = Field(
        default=None, min_length=1, max_length=MAX_LIST,
        description="Half-open windows [start, stop); negative from the prompt's end, null for open.")
    roles: list[Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,32}$")]] | None = Field(
        default=None, min_length=1, max_length=16,
        description="Chat turns of these roles, markers included (system, user, ...).")


class PromptSelection(PromptPick):
    """Prompt tokens picked by its fields (all, if none is given), less those that `exclude` picks."""

    exclude: PromptPick | None = Field(default=None, description="Tokens to leave alone whatever else picks them.")


class GenerationPick(_Select):
    """Generated tokens: the union of positions, windows and token ids. Position 0 is the first generated token."""

    positions: list[Index] | None = Field(default=None, min_length=1, max_length=MAX_LIST,
                                   description="Positions from the first generated token (0).")
    windows: list[tuple[Index | None, Index | None]] | None = Field(
        default=None, min_length=1, max_length=MAX_LIST, description="Half-open windows [start, stop); null for open.")


class GenerationSelection(GenerationPick):
    """Generated tokens picked by its fields (all, if none is given), less those that `exclude` picks."""

    exclude: GenerationPick | None = Field(default=None, description="Tokens to leave alone whatever else picks them.")


class Scope(Model):
    """Which tokens an intervention touches.

    A generated token is touched when it is fed back: the first generated token is *predicted* by the last prompt
    token, so "steer every prediction" is `{"prompt": {"positions": [-1]}, "generation": "all"}`.
    """

    prompt: Literal["all", "none"] | PromptSelection = Field(default="all", description="Prompt tokens.")
    generation: Literal["all", "none"] | GenerationSelection = Field(default="all", description="Generated tokens.")

    @model_validator(mode="after")
    def _touches_something(self) -> Self:
        if self.prompt == "none" and self.generation == "none":
            raise ValueError("the scope touches no token; leave the intervention out instead")
        return self
