"""Error classes of rows without an image, from downloader and decoder, and which of them are transient.

The class is stored in the parquet column ``error_class`` and counted in ``_stats.json``; ``docs/operations.md`` has the
table for users.
"""

import http.client
from typing import Literal

ERROR_CLASSES = (
    "bad_url",  # not a url
    "policy",  # another scheme, a non-public address, or a file outside the allowed root
    "dns",  # the name does not resolve
    "dns_again",  # the name server did not answer, or reported a temporary failure
    "connect",  # refused or unreachable
    "tls",  # no valid certificate, or no common protocol
    "timeout",  # the attempt exceeded its time limit
    "reset",  # the connection broke
    "protocol",  # the answer is not HTTP
    "http_3xx",  # a redirect to nowhere
    "http_4xx",
    "http_429",
    "http_5xx",
    "too_many_redirects",
    "optout",  # the publisher's X-Robots-Tag forbids this use
    "robots",  # the host's robots.txt forbids the url
    "robots_unreachable",  # robots.txt was unreadable, which forbids all urls of the host for a while
    "not_a_picture",  # by the first bytes, before the rest was downloaded
    "not_a_sound",
    "too_large",
    "short_read",  # the body ended before its announced end
    "encoding",  # an unsupported content encoding that was not requested
    "missing",  # no such local file
    "empty",
    "hash_mismatch",  # the body does not match the digest in the table
    "store",  # an object store or a disk failed in another way
    "unexpected",  # an unexpected exception; it is logged
)
"""Classes of failed downloads; those of images are listed at ``pipeline.codecs.image_encoding.transform``."""

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
"""Classes of transient failures: retried at once, according to ``retries``, and by a later run."""


class Failure(Exception):
    """The failure of one attempt, before the decision about a retry.

    ``retry_after`` is the wait in seconds requested by the server; ``status`` is img2dataset's.
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
        """Whether a retry makes sense."""
        return self.error_class in TRANSIENT


def http_failure(status: int, retry_after: float = 0.0) -> Failure:
    """The failure for an HTTP status other than 2xx, with urllib's message, as in img2dataset's tables."""
    phrase = http.client.responses.get(status, "Unknown")
    error_class = "http_429" if status == 429 else f"http_{min(max(status // 100, 3), 5)}xx"
    return Failure(error_class, f"HTTP Error {status}: {phrase}", status, retry_after)
