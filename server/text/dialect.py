"""How the model that is served writes tool calls and thoughts, and what its chat template can be told."""

from collections.abc import Mapping
from functools import cached_property
from typing import Literal, TypeVar

from jinja2 import Environment, TemplateError, meta

from server.errors import InvalidSettings
from server.text.formats.base import ToolFormat
from server.text.formats.hermes import Hermes
from server.text.formats.llama3_json import Llama3Json
from server.text.formats.mistral import Mistral
from server.text.formats.pythonic import Pythonic
from server.text.formats.thinking import THOUGHTS, of_template
from server.text.vocabulary import Vocabulary
from steering.programs.sections import At, Mark, Marks, Sections

FORMATS: Mapping[str, ToolFormat] = {form.name: form for form in (Hermes(), Mistral(), Pythonic(), Llama3Json())}
T = TypeVar("T")
# JSON that a model writes by itself stands in such a block.
BLOCK = Mark("json", "```json", "```")


class Dialect:
    """
    Attributes:
        tools: the form of its calls, None where none is known.
        thought: the marks around its thoughts, None where it has none.
    """

    def __init__(self, vocabulary: Vocabulary, *, tools: str = "auto", thoughts: str = "auto") -> None:
        """
        Args:
            tools, thoughts: names of forms; "auto" for what the chat template shows, "none" for none.

        Raises:
            InvalidSettings: there is no form of that name.
        """
        self._vocabulary = vocabulary
        template = vocabulary.tokenizer.chat_template
        self.template = template if isinstance(template, str) else "\n".join((template or {}).values())
        fitting = next((form for form in FORMATS.values() if form.fits(self.template)), None)
        self.tools: ToolFormat | None = fitting if tools == "auto" else _named(FORMATS, tools, "tool_parser")
        self.thought: Mark | None = of_template(self.template) if thoughts == "auto" else _named(
            THOUGHTS, thoughts, "reasoning_parser")

    @cached_property
    def shown(self) -> frozenset[int]:
        """Special tokens that are marks, so they are a part of the text that is read."""
        marks = [self.thought] if self.thought is not None else []
        marks += self.tools.marks if self.tools is not None else ()
        return self._vocabulary.special_ids({text for mark in marks for text in (mark.begin, mark.end) if text})

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the chat template knows, those that it is always given included."""
        try:
            return frozenset(meta.find_undeclared_variables(Environment(
                extensions=["jinja2.ext.loopcontrols"]).parse(self.template)))
        except TemplateError:
            # It has a tag that transformers adds. Names are seen where they are written.
            return frozenset(name for name in ("tools", "enable_thinking", "reasoning_effort", "documents")
                             if name in self.template)

    def sections(self, *, tools: bool, answer: Literal["answer", "json"] = "answer", opening: str = "") -> Sections:
        """How the sections of a completion are told.

        Args:
            tools: whether the completion may call some.
            answer: "json" where the answer is held to JSON.
            opening: what of the assistant's turn the prompt holds already.
        """
        marks = [self.thought] if self.thought is not None else []
        if answer == "answer":
            if tools and self.tools is not None:
                marks += self.tools.marks
            marks.append(BLOCK)
        found = Marks(tuple(marks), answer)
        at, _ = found.read(At(), opening)
        return Sections(found, at, self._spell)

    def _spell(self, token: int) -> str:
        return self._vocabulary.spelled(token, self.shown)


def _named(forms: Mapping[str, T], name: str, setting: str) -> T | None:
    if name != "none" and name not in forms:
        raise InvalidSettings(f"there is no form {name!r}", param=setting,
                              fix=f"Use auto, none or one of {', '.join(forms)}.")
    return forms.get(name)
