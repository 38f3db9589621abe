"""What the bundled library holds: which data set, which op, and which grader tells what the answers are."""

from dataclasses import dataclass, field
from typing import Any

from lab import datasets

CODES = {"french": "fr", "german": "de", "spanish": "es"}


@dataclass(frozen=True)
class Example:
    """One artifact. Its effect is the share of whole answers that `grader` finds a success.

    prompts: data set of neutral prompts, and the label to take from it (None: all). `messages` in its records make
    it a chat. opposite: grader of what the negative strength is meant to give, if that is part of the promise.
    spared: label of prompts whose answers must stay a success as they are, so that an effect has a cost.
    """

    name: str
    data: str
    prompts: str
    grader: dict[str, Any]
    target: str
    description: str
    options: dict[str, Any] = field(default_factory=dict)
    label: str | None = None
    opposite: dict[str, Any] | None = None
    spared: str | None = None
    tags: tuple[str, ...] = ()

    def prompts_of(self, split: str, label: str | None) -> list[Any]:
        """Distinct prompts: texts, or conversations where the data set has them."""
        found = {record["text"]: record.get("messages", record["text"])
                 for record in datasets.load(self.prompts, split) if label is None or record["label"] == label}
        return [found[text] for text in sorted(found)]

    def pairs(self) -> list[dict[str, Any]]:
        """Contrastive pairs as POST /v1/extract takes them."""
        return [{"positive": record.get("positive_messages", record["positive"]),
                 "negative": record.get("negative_messages", record["negative"]),
                 "item": record["item"], "split": record["split"]} for record in datasets.load(self.data)]


def language(name: str) -> Example:
    return Example(name, f"language_{name}", "language_neutral", {"kind": "language", "language": CODES[name]}, name,
                   f"Writes in {name.capitalize()} where the language is open.", {"token": "mean"},
                   tags=("language",))


EXAMPLES = (
    Example("cheerful", "sentiment", "sentiment_neutral", {"kind": "sentiment", "wanted": "positive"}, "positive",
            "Reviews turn out positive; a negative strength makes them negative.", {"token": "mean"},
            opposite={"kind": "sentiment", "wanted": "negative"}, tags=("sentiment",)),
    Example("refusal", "refusal", "harmful_harmless", {"kind": "refusal", "wanted": "compliance"}, "compliance",
            "The refusal direction, taken out at every layer: harmful requests are answered.",
            {"op": "ablate", "site": "resid_pre", "token": "mean"}, label="harmful", spared="harmless",
            tags=("refusal",)),
    language("french"),
    language("german"),
)


@dataclass(frozen=True)
class Preset:
    """A preset of one artifact. sign: of the strength. gate: probe of the prompts on which it acts, None for all."""

    name: str
    artifact: str
    description: str
    sign: float = 1.0
    gate: str | None = None


PRESETS = (
    Preset("cheerful", "cheerful", "Positive reviews."),
    Preset("gloomy", "cheerful", "Negative reviews: the cheerful direction with the other sign.", sign=-1.0),
    Preset("unfiltered", "refusal", "No refusals. For study of the method on this model, which knows nothing harmful."),
    Preset("unfiltered-gated", "refusal", "The same behind a gate: requests that the probe finds harmless are left as "
           "they are.", gate="harmful"),
    Preset("french", "french", "French where the language is open."),
    Preset("german", "german", "German where the language is open."),
)
