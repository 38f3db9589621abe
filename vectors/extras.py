"""Some work needs a library that an extra installs. Without it that work is refused, and the extra is named."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from steering.language.errors import TrimtabError


class ExtraMissing(TrimtabError):
    """The work needs a library that an extra of the package installs, and it is not installed here."""

    code: ClassVar[str] = "extra_missing"


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the imports of what the extra `name` installs.

    Raises:
        ExtraMissing: naming the library and the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ExtraMissing(f"this needs {error.name}, which is not installed on the server",
                           fix=f"Install it there: pip install 'trimtab[{name}]'.") from error
