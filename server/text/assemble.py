"""From the text of a completion, as it comes, to the deltas of a message."""

from server.text.formats.base import Called, CallReader, ToolFormat
from server.text.message import CallDelta, Delta
from steering.programs.sections import SPACE, Sections, Segment


class Assembler:
    """
    Marks are taken out; white space around thoughts and in front of calls is, too. All other text comes out again, also
    what began like a mark or a call and is none.

    Attributes:
        calls: how many tools have been called. within: whether the last call is not complete.
    """

    def __init__(self, sections: Sections, tools: ToolFormat | None) -> None:
        """tools: the form of calls; None where sections of calls are not told."""
        self._sections, self._tools = sections, tools
        self._at = sections.start
        self._reader: CallReader | None = None
        # Text of the section of calls as it was written, while nothing in it has become a call.
        self._raw = ""
        self._begun = 0
        # White space that is told only if something follows it.
        self._thought_space = self._answer_space = ""
        # Behind a thought, and at its begin, white space is not told at all.
        self._drop_answer = self._drop_thought = sections.marks.section(sections.start) == "reasoning"
        self.calls = 0

    @property
    def within(self) -> bool:
        return self._reader is not None and self._reader.within

    def push(self, text: str) -> Delta:
        self._at, segments = self._sections.marks.read(self._at, text)
        found = Delta()
        for segment in segments:
            found = found.then(self._told(segment))
        return found

    def end(self) -> Delta:
        """What was held back. The completion is over."""
        section = self._sections.marks.section(self._at)
        found = Delta() if not self._at.held else self._told(Segment("text", section, self._at.held))
        if self._reader is not None:
            found = found.then(self._call_section_ends(""))
        # Without a call behind it, and where the text was cut off, white space is text like any other.
        thought = Delta(reasoning=self._thought_space if section == "reasoning" else "")
        return found.then(thought).then(Delta("" if self.calls else self._answer_space))

    def _told(self, segment: Segment) -> Delta:
        if segment.section == "reasoning":
            return self._thought(segment)
        if segment.section == "tool_call" and self._tools is not None:
            return self._called(segment)
        # The marks around a block of JSON belong to the text.
        return self._answered(segment.text)

    def _thought(self, segment: Segment) -> Delta:
        if segment.kind == "begin":
            self._drop_thought = True
            # A second thought is told as a paragraph of the first.
            return Delta()
        if segment.kind == "end":
            self._thought_space, self._drop_answer = "", True
            return Delta()
        text = self._thought_space + segment.text
        if self._drop_thought:
            text = text.lstrip(SPACE)
        told = text.rstrip(SPACE)
        self._thought_space = text[len(told):]
        self._drop_thought = self._drop_thought and not told
        return Delta(reasoning=told)

    def _answered(self, text: str) -> Delta:
        text = self._answer_space + text
        if self._drop_answer:
            text = text.lstrip(SPACE)
        self._drop_answer = self._drop_answer and not text
        # A call may follow.
        told = text.rstrip(SPACE) if self._tools is not None else text
        self._answer_space = text[len(told):]
        return Delta(told)

    def _called(self, segment: Segment) -> Delta:
        assert self._tools is not None
        if segment.kind == "begin":
            self._reader, self._raw, self._begun = self._tools.reader(), segment.text, self.calls
            return Delta()
        if segment.kind == "end":
            return self._call_section_ends(segment.text)
        if self.calls == self._begun:
            self._raw += segment.text
        assert self._reader is not None
        return self._deltas(self._reader.push(segment.text))

    def _call_section_ends(self, mark: str) -> Delta:
        assert self._reader is not None
        called, rest = self._reader.end()
        found = self._deltas(called)
        if self.calls == self._begun:
            # There was no call: all of it is text, marks included.
            rest = self._raw + mark
        if mark or not self._reader.within:
            self._reader = None
        return found.then(self._answered(rest)) if rest else found

    def _deltas(self, called: list[Called]) -> Delta:
        assert self._tools is not None
        parts = []
        for one in called:
            if one.name is not None:
                parts.append(CallDelta(self.calls, self._tools.new_id(), one.name, one.arguments))
                self.calls += 1
            else:
                parts.append(CallDelta(self.calls - 1, arguments=one.arguments))
        if parts:
            # What stood in front of the call was white space.
            self._answer_space = ""
        return Delta(calls=tuple(parts))
