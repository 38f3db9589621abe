"""Why an extraction is refused or given up."""


from steering.language.errors import InvalidRequest, TrimtabError


class InvalidData(InvalidRequest):
    """Contrastive pairs that a direction cannot be taken from."""

    code = "invalid_extraction_data"


class TooFewPairs(InvalidData):
    code = "too_few_pairs"


class TooFewExamples(InvalidData):
    code = "too_few_examples"


class OneClass(InvalidData):
    """Every example has the same label, or a split lacks one."""

    code = "one_class"


class EmptyText(InvalidData):
    code = "empty_text"


class TextTooLong(InvalidData):
    code = "text_too_long"


class NoContrast(InvalidData):
    """Both sides of a pair are the same, so that there is only one class."""

    code = "no_contrast"


class LeakingSplit(InvalidData):
    """An item, or the same pair under another item's name, stands in more than one split."""

    code = "leaking_split"


class AnswerInPrompt(InvalidData):
    """A prompt ends with its own answer, so that what is read is the answer's word and not what the model works out."""

    code = "answer_in_prompt"


class ConstantActivations(InvalidData):
    """Every text has the same activation there, as at the embedding of a template's last token."""

    code = "constant_activations"


class FitFailed(InvalidData):
    """The method found no direction in these activations."""

    code = "fit_failed"


class ExtractionCancelled(TrimtabError):
    """The job was cancelled; nothing was stored."""

    code = "extraction_cancelled"
