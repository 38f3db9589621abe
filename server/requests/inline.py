"""Numbers that a request itself brings: who may give some, and how many."""

from typing import Any

from server.identity.principal import CURRENT
from server.requests.plan import Planned, own_numbers
from steering.language.errors import PayloadTooLarge

NUMBERS = {int, float}


def check_inline(item: Planned, most_bytes: int) -> None:
    """Raises MissingRole, PayloadTooLarge: at the place in the request."""
    intervention = item.intervention
    if item.origin == "request" and item.preset is None:
        # Who may name captured activations could send their numbers as well.
        for field in own_numbers(intervention):
            CURRENT.get().check("infer_raw", "steering with numbers that the request itself gives",
                                (*item.path, *field))
    if intervention.inline is not None and inline_bytes(intervention.inline) > most_bytes:
        raise item.place(PayloadTooLarge(f"the inline numbers take more than {most_bytes} bytes",
                                         fix="Upload them once to /v1/artifacts and name them."), ("inline",))


def inline_bytes(inline: Any) -> int:
    """Bytes that inline numbers take as float32, base64 text by its length."""
    if isinstance(inline, str):
        return 3 * len(inline) // 4
    if isinstance(inline, dict):
        return sum(map(inline_bytes, inline.values()))
    if isinstance(inline, list):
        # Numbers come by the thousand, so they are not looked at one by one.
        return 4 * len(inline) if set(map(type, inline)) <= NUMBERS else sum(map(inline_bytes, inline))
    return 4
