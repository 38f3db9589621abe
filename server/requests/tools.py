"""Tools that a chat request offers, and which of them the model may or must call."""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from server.requests.fields import Lenient, only

# Templates and grammars write names as they are: nothing in one can end what stands around it.
ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]


class OfferedFunction(Lenient):
    name: ToolName
    description: Annotated[str, Field(max_length=65_536)] | None = None
    parameters: dict[str, Any] = Field(default={"type": "object", "properties": {}},
                                       description="JSON schema of the arguments.")
    strict: bool = Field(default=False, description="Hold the arguments to the schema also where the model decides by "
                         "itself to call. Forced calls are held to it anyway.")


class OfferedTool(Lenient):
    type: Annotated[Literal["function"], only("function")] = "function"
    function: OfferedFunction
    cache_control: dict[str, Any] | None = Field(default=None, description="Accepted, not used.")

    def as_template(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = self.function.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        return {"type": "function", "function": function}


class NamedFunction(Lenient):
    name: ToolName


class NamedTool(Lenient):
    """One tool that must be called."""

    type: Annotated[Literal["function"], only("function")] = "function"
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool
Tools = Annotated[list[OfferedTool], Field(max_length=128)]
Effort = Annotated[str, StringConstraints(pattern=r"^[a-z]{1,16}$")]
