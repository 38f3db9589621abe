"""What a trial takes from contrastive pairs: their texts, where they begin to differ, and the questions they answer."""

from collections.abc import Sequence

from steering.language.errors import InvalidRequest, Path
from vectors.extract.data import Dataset
from vectors.extract.spans import differing
from vectors.extract.subject import Prompt, Subject, Turn, encoded
from vectors.extract.text_pairs import TextPair
from vectors.extract.trial.plan import Continuation, Question, TrialOptions

# Asked where the pairs answer no questions of their own, or too few: everyday ones, that nothing is decided about.
NEUTRAL = ("Tell me about a day at work.", "What do you think about the weather?", "Describe a small town.",
           "How was the journey?", "Write a sentence about a dog.", "What is it like to live by a river?",
           "Tell me about a friend.", "Describe a room.", "What happened this morning?",
           "How do people spend an evening?", "Write a short note to a neighbour.",
           "What should I know about trains?", "Describe a meal.", "Tell me about a school.",
           "What do you see from the window?", "How does a market work?")
OPENINGS = ("I think that", "The weather today", "Yesterday we went to", "My friend said that",
            "The house on the corner", "When I came home,", "The people in the town", "It was a day like",
            "The book is about", "In the evening", "She looked at him and", "The food was")


def text_of(prompt: Prompt) -> str | None:
    """What a text says: of a conversation its last message. None for token ids, which nobody can read."""
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1]
    return last.content if isinstance(last, Turn) else None


def texts_of(pairs: Sequence[TextPair], data: Dataset) -> tuple[list[str], list[str]] | None:
    """Positive and negative texts of the pairs that were fitted on or chosen with; None if one cannot be read."""
    sides: tuple[list[str], list[str]] = ([], [])
    for n in (*data.splits["train"], *data.splits["dev"]):
        for side, prompt in zip(sides, (pairs[n].positive, pairs[n].negative), strict=True):
            text = text_of(prompt)
            if text is None:
                return None
            side.append(text)
    return sides


def continuations_of(data: Dataset) -> list[Continuation]:
    """Of dev, then of train. Where both texts begin alike, the beginning is what they continue."""
    found = []
    for n in (*data.splits["dev"], *data.splits["train"]):
        pair = data.pairs[n]
        found.append(Continuation(pair.positive, pair.negative, differing(pair.positive, pair.negative)[0].start))
    return found


def given_questions(options: TrialOptions, pairs: Sequence[TextPair], subject: Subject) -> list[Question]:
    """Those of the request. Where the pairs answer what a user says, a plain line is what a user says.

    Raises:
        InvalidData: a prompt is empty or too long. InvalidRequest: no instruction can be put behind token ids.
    """
    chats = bool(pairs) and all(_asked(pair) is not None for pair in pairs)
    given = [[Turn(role="user", content=prompt)] if chats and isinstance(prompt, str) else prompt
             for prompt in options.prompts]
    return [_question(prompt, options, subject, n) for n, prompt in enumerate(given)]


def default_questions(options: TrialOptions, pairs: Sequence[TextPair], data: Dataset, subject: Subject
                      ) -> list[Question]:
    """What the dev pairs answer, and everyday questions behind them; for texts that answer nothing, openings."""
    asked: list[Prompt] = list(OPENINGS)
    if pairs and _conversations(pairs):
        asked = [turns for n in data.splits["dev"] if (turns := _asked(pairs[n])) is not None]
        asked += [[Turn(role="user", content=text)] for text in NEUTRAL]
    questions = [_question(prompt, options, subject, n) for n, prompt in enumerate(asked)]
    return list({question.tokens: question for question in reversed(questions)}.values())[::-1]


def _question(prompt: Prompt, options: TrialOptions, subject: Subject, number: int) -> Question:
    where = ("trial", "prompts", number)
    instructed = () if options.instruction is None else encoded(
        subject, _instructed(prompt, options.instruction, where), where)
    return Question(encoded(subject, prompt, where), text_of(prompt) or "", instructed=instructed)


def _instructed(prompt: Prompt, instruction: str, where: Path) -> Prompt:
    if isinstance(prompt, str):
        return f"{prompt} {instruction}"
    turns = [turn for turn in prompt if isinstance(turn, Turn)]
    if not turns or len(turns) != len(prompt):
        raise InvalidRequest("no instruction can be put behind token ids", param=where, fix="Give the prompt as text.")
    return [*turns[:-1], turns[-1].model_copy(update={"content": f"{turns[-1].content} {instruction}"})]


def _asked(pair: TextPair) -> list[Turn] | None:
    """The turns before the answer, where both sides are answers to the same."""
    sides = []
    for prompt in (pair.positive, pair.negative):
        if isinstance(prompt, str) or len(prompt) < 2:
            return None
        turns = [turn for turn in prompt if isinstance(turn, Turn)]
        if len(turns) != len(prompt) or turns[-1].role != "assistant":
            return None
        sides.append(turns[:-1])
    return sides[0] if sides[0] == sides[1] else None


def _conversations(pairs: Sequence[TextPair]) -> bool:
    return all(not isinstance(pair.positive, str) and isinstance(pair.positive[0], Turn) for pair in pairs)
