"""Texts without labels: read once each, split by text, and continued by the model where it is to say more."""

from collections.abc import Sequence

from vectors.extract.items import Splits, split_items
from vectors.extract.refusals import LeakingSplit
from vectors.extract.subject import Prompt, Subject, Tokens, batches, encoded
from vectors.extract.work import Span, Work


def split_prompts(subject: Subject, prompts: Sequence[Prompt], seed: int) -> tuple[list[Tokens], Splits]:
    """The prompts as tokens, and which of them are train, dev and test.

    Raises:
        LeakingSplit: two are the same.
    """
    texts = [encoded(subject, prompt, ("prompts", n)) for n, prompt in enumerate(prompts)]
    seen: dict[Tokens, int] = {}
    for n, text in enumerate(texts):
        if seen.setdefault(text, n) != n:
            raise LeakingSplit(f"the prompt is the same as prompts[{seen[text]}]", param=("prompts", n),
                               fix="Leave it out.")
    return texts, split_items([f"#{n}" for n in range(len(texts))], [None] * len(texts), seed, "prompts")


def continued(work: Work, prompts: Sequence[Tokens], max_tokens: int, span: Span) -> list[Tokens]:
    """The prompts with what the model says after them, within its context."""
    if not max_tokens:
        return list(prompts)
    found = []
    for batch in batches(prompts):
        span(batch.start / len(prompts))
        said = work.subject.generate([prompts[n] for n in batch], max_tokens)
        for n, text in zip(batch, said, strict=True):
            whole = (*prompts[n], *work.subject.encode_continuation(text))
            found.append(whole[:work.facts.context_length])
    return found
