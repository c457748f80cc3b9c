"""Detect images by the first bytes of a body, before the rest is downloaded.

Consistent with ``pipeline.stages.crawl.images.read_header``, which checks the complete body. A separate module, so that
the downloader loads no image library.
"""

from pipeline.stages.crawl.failure import Failure

ENOUGH = 16
"""Number of first bytes that identify every known format."""

_STARTS = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
    b"\xff\x4f\xff\x51",
    b"\0\0\0\x0cjP  ",
)


def starts_like_an_image(start: bytes) -> bool:
    """Whether a body that starts with ``start`` (at least ``ENOUGH`` bytes) may be an image of a known format."""
    if start.startswith(_STARTS):
        return True
    if start.startswith(b"RIFF"):
        return start[8:12] == b"WEBP"
    if start[4:8] == b"ftyp":
        return start[8:12] in (b"avif", b"avis", b"mif1")
    return start[:1] == b"P" and start[1:2] in (b"1", b"2", b"3", b"4", b"5", b"6") and start[2:3].isspace()


def refuse_non_images(start: bytes, http_status: int | None) -> None:
    """Raise the decoder's :class:`Failure` for a body that is not an image, with img2dataset's status."""
    if starts_like_an_image(start):
        return
    page = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"<", b"{")
    what = "a text page in place of an image" if page else "not an image of a known kind"
    raise Failure("not_a_picture", f"Image decoding error: {what}", http_status, status="failed_to_resize")
