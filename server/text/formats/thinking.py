"""Marks around what a model thinks, by the template that names them."""

from steering.programs.sections import Mark

THOUGHTS = {
    "think": Mark("reasoning", "<think>", "</think>"),
    "mistral": Mark("reasoning", "[THINK]", "[/THINK]"),
}


def of_template(template: str) -> Mark | None:
    return next((mark for mark in THOUGHTS.values() if mark.end is not None and mark.end in template), None)
