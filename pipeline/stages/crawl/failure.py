"""Why a row has no image: the classes that the downloader and the decoder give, and which of them may pass.

The class goes into the parquet column ``error_class`` and into the counts of ``_stats.json``; ``docs/operations.md``
has the table for readers.
"""

import http.client
from typing import Literal

ERROR_CLASSES = (
    "bad_url",  # not a url
    "policy",  # another scheme, an address that is not public, or a file outside the named root
    "dns",  # the name does not resolve
    "dns_again",  # the name server did not answer, or asked to come back
    "connect",  # refused or unreachable
    "tls",  # no valid certificate, or no common protocol
    "timeout",  # the attempt took longer than allowed
    "reset",  # the connection broke
    "protocol",  # the answer is not HTTP
    "http_3xx",  # a redirect to nowhere
    "http_4xx",
    "http_429",
    "http_5xx",
    "too_many_redirects",
    "optout",  # the publisher's X-Robots-Tag forbids this use
    "robots",  # the host's robots.txt forbids the url
    "robots_unreachable",  # robots.txt could not be read, which forbids everything for a while
    "not_a_picture",  # told from the first bytes, before the rest was fetched
    "too_large",
    "short_read",  # the body ended before its announced end
    "encoding",  # a content encoding that was not asked for and is not understood
    "missing",  # no such local file
    "empty",
    "hash_mismatch",  # not the bytes that the table says
    "store",  # an object store or a disk failed in another way
    "unexpected",  # an exception that nobody foresaw; it is logged
)
"""Classes of failed downloads; those of images are listed at ``pipeline.stages.crawl.images.transform``."""

TRANSIENT = frozenset(
    {
        "connect",
        "dns_again",
        "http_429",
        "http_5xx",
        "reset",
        "robots_unreachable",
        "short_read",
        "store",
        "timeout",
    }
)
"""Classes of failures that may pass: they are tried again at once where ``retries`` says so, and by a later run."""


class Failure(Exception):
    """One attempt's failure, before it is known whether another attempt follows.

    ``retry_after`` is how many seconds the server asks to wait; ``status`` is img2dataset's.
    """

    def __init__(
        self,
        error_class: str,
        message: str,
        http_status: int | None = None,
        retry_after: float = 0.0,
        status: Literal["failed_to_download", "failed_to_resize"] = "failed_to_download",
    ) -> None:
        super().__init__(message)
        self.error_class = error_class
        self.message = message
        self.http_status = http_status
        self.retry_after = retry_after
        self.status = status

    @property
    def may_pass(self) -> bool:
        """Whether another attempt is worth making."""
        return self.error_class in TRANSIENT


def http_failure(status: int, retry_after: float = 0.0) -> Failure:
    """The failure that an HTTP status other than 2xx is, in urllib's words (which img2dataset's tables have)."""
    phrase = http.client.responses.get(status, "Unknown")
    error_class = "http_429" if status == 429 else f"http_{min(max(status // 100, 3), 5)}xx"
    return Failure(error_class, f"HTTP Error {status}: {phrase}", status, retry_after)
