"""Names in addresses, `/v1/artifacts/team/calm/versions` say: with one slash or none, written as it is or as %2F."""

from starlette.convertors import Convertor, register_url_convertor

from vectors.library.naming import RESERVED


class _Ref(Convertor[str]):
    """What stands behind a name in other addresses is no second part of one."""

    regex = rf"[^/]+(?:/(?!(?:{RESERVED.pattern})(?:/|$))[^/]+)?"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("ref", _Ref())
REF, NAME = "{ref:ref}", "{name:ref}"
