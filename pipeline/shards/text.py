"""Text from outside, made fit for storage: UTF-8 can hold it, and readers in C do not end it at a NUL."""

import re

_BYTE = re.compile("[\udc80-\udcff]")


def storable(text: str) -> str:
    """``text`` with ``?`` for each lone surrogate (half an emoji, a byte that was no UTF-8) and without NUL."""
    if text.isascii():
        return text.replace("\0", "") if "\0" in text else text
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def escaped(name: str) -> str:
    """``name``, read with ``surrogateescape``, with ``%E9`` for a byte E9 that was no UTF-8.

    Unlike :func:`storable` it keeps different names different.
    """
    return name if name.isascii() else _BYTE.sub(lambda found: f"%{ord(found[0]) - 0xDC00:02X}", name)


def decoded(content: bytes) -> str:
    """The text of ``content``: UTF-8, or UTF-16 or UTF-32 where it begins with their byte-order mark.

    Bytes that are not of the encoding become U+FFFD. The mark is left out.
    """
    return content.decode(encoding_of(content[:4]), "replace").replace("\0", "")


def encoding_of(start: bytes) -> str:
    """Name of the codec for a text that begins with the bytes ``start`` (four are enough)."""
    if start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    return "utf-8-sig"
