"""What was applied, in the headers of a response, for clients that drop fields of the body they do not know.

The value is a list of RFC 9651 (structured fields): a string per intervention, with parameters.
"""

from collections.abc import Iterator, Mapping, Sequence

from server.requests.plan import Plan
from server.requests.receipt import Receipt

APPLIED = "X-Trimtab-Applied"
# Together with the rest of a response's head this stays below what clients take (16 KiB in Node).
LONGEST = 4096


def told_of(receipt: Receipt) -> dict[str, str]:
    """Of a whole response: `"cheerful@3";op=add;prompt=12;generation=31`; `none` or `disabled` where nothing was."""
    return {APPLIED: _listed([_item(item.artifact, {"op": item.op, "prompt": item.tokens.prompt,
                                                    "generation": item.tokens.generation})
                              for item in receipt.applied], receipt.disabled)}


def told_ahead(plan: Plan) -> dict[str, str]:
    """At the start of a stream, whose tokens are not known yet: `"cheerful@3";op=add`."""
    compiled = () if plan.program is None else plan.program.compiled
    return {APPLIED: _listed([_item(item.applied.artifact or "inline", {"op": item.applied.op}) for item in compiled],
                             plan.disabled is not None)}


def _item(name: str, parameters: Mapping[str, str | int]) -> str:
    return f'"{name}"' + "".join(f";{key}={value}" for key, value in parameters.items())


def _listed(items: Sequence[str], disabled: bool) -> str:
    if not items:
        return "disabled" if disabled else "none"
    return ", ".join(_fitting(items))


def _fitting(items: Sequence[str]) -> Iterator[str]:
    """As many as fit, and then how many more there were."""
    left = LONGEST
    for n, item in enumerate(items):
        left -= len(item) + 2
        if left < 0:
            yield f"more;count={len(items) - n}"
            return
        yield item
