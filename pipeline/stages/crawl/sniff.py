"""Refuse a body of another medium by its first bytes, before the rest is downloaded.

A separate module, so that the downloader loads no decoder.
"""

from pipeline.shards.media import Medium
from pipeline.stages.crawl.failure import Failure


def refuse_other_media(start: bytes, medium: Medium, http_status: int | None) -> None:
    """Raise the decoder's :class:`Failure` for a body that is not of ``medium``, with img2dataset's status."""
    if medium.starts(start):
        return
    page = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"<", b"{")
    what = f"a text page in place of {medium.noun}" if page else f"not {medium.noun} of a known kind"
    message = f"{medium.name.capitalize()} decoding error: {what}"
    raise Failure(medium.mismatch, message, http_status, status="failed_to_resize")
