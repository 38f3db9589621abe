"""Bodies that came compressed, bounded by what they inflate to."""

import zlib

from starlette.datastructures import Headers

from server.errors import InvalidJson, UnsupportedMediaType
from steering.language.errors import PayloadTooLarge

# zlib reads the head and the check sum of gzip with this many bits.
GZIP_BITS = 16 + zlib.MAX_WBITS


def compressed(headers: Headers) -> bool:
    """Whether the body is compressed. Raises UnsupportedMediaType for a form other than gzip."""
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return False
    if encoding not in ("gzip", "x-gzip"):
        raise UnsupportedMediaType(f"the body is encoded as {encoding[:80]}", param="Content-Encoding",
                                   fix="Send it as it is, or with gzip.")
    return True


def inflated(body: bytes, most: int) -> bytes:
    """What a gzip text of one member or several stands for. No more than `most` bytes and one are ever made.

    Raises:
        PayloadTooLarge: it is longer than `most`.
        InvalidJson: it is no gzip text, or not a whole one.
    """
    found = bytearray()
    while body:
        member = zlib.decompressobj(GZIP_BITS)
        try:
            found += member.decompress(body, most + 1 - len(found))
        except zlib.error:
            raise InvalidJson("the body is no gzip text", param="body",
                              fix="Send it without Content-Encoding.") from None
        if len(found) > most:
            raise PayloadTooLarge(f"the body inflates to more than {most} bytes", param="body",
                                  fix="Upload numbers once as a file to /v1/artifacts/import, and name them.")
        if not member.eof:
            raise InvalidJson("the body is a gzip text that is cut short", param="body")
        body = member.unused_data
    return bytes(found)
