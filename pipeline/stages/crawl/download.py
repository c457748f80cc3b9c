"""Concurrent downloads, in one thread beside the decoding thread.

One event loop holds all connections of a worker (aiohttp); one verified TLS context and one DNS cache serve the whole
process, and connections are kept alive. Options of img2dataset keep their names and meanings. Differences:

* ``timeout`` limits a whole attempt, with redirects and body, not one socket operation. Waiting for a free connection
  does not count.
* Only http and https are fetched, and only from public addresses (see ``addresses.py``) and ``allow_hosts``.
* Body size is limited during the download, after decompression. A body shorter than announced is a failure.
* Retries wait, and are made only for transient failures. ``X-Robots-Tag`` is obeyed before the body is read, and
  robots.txt, where enabled, before the first request.
* A body that is not an image (or another requested medium) by its first bytes is rejected before the rest arrives.
* Stores (``s3://bucket/a.jpg``) and local files are read only where the options allow it.

Every failure is a :class:`SampleError` with a class of ``ERROR_CLASSES``. Its status is "failed_to_download", or
"failed_to_resize" for a body of another medium, as in img2dataset's tables.
"""

import asyncio
import contextlib
import email.utils
import functools
import hashlib
import logging
import math
import queue
import random
import re
import resource
import socket
import ssl
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal, Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from pipeline.config import require
from pipeline.errors import SampleError
from pipeline.shards.media import ENOUGH, IMAGE, Medium
from pipeline.stages.crawl.addresses import AddressPolicy, AddressRefused, GuardedResolver, parse_address
from pipeline.stages.crawl.failure import ERROR_CLASSES as ERROR_CLASSES
from pipeline.stages.crawl.failure import TRANSIENT as TRANSIENT
from pipeline.stages.crawl.failure import Failure, http_failure
from pipeline.stages.crawl.fetch_store import Stores, store_threads
from pipeline.stages.crawl.robots import MAX_BYTES as ROBOTS_BYTES
from pipeline.stages.crawl.robots import Robots
from pipeline.stages.crawl.sniff import refuse_other_media
from pipeline.stages.crawl.turns import Turns

logger = logging.getLogger(__name__)

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_URL = 16_384
_ROBOTS_REDIRECTS = 5
# Characters that may stand in a url as they are (RFC 3986); such urls are sent exactly as given, signatures included.
_WELL_FORMED = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]*")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):")

_DNS_SECONDS = 300.0
_DNS_FAILURE_SECONDS = 60.0
_DNS_ENTRIES = 100_000
_DNS_THREADS = 64
# Bytes of downloaded bodies in the queue; above it no new request starts.
_MAX_WAITING_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """Download options; names and defaults are img2dataset's where it has the option."""

    timeout: float = 10.0
    """Time limit of one attempt in seconds, from the connection to the last byte."""
    retries: int = 0
    """Number of further attempts after a transient failure."""
    retry_delay: float = 0.5
    """Wait in seconds before the first retry; doubles each time, with jitter of up to half."""
    max_retry_delay: float = 30.0
    """Longest wait in seconds, also for a server's Retry-After."""
    thread_count: int = 256
    """Concurrent requests per worker (connections, not threads)."""
    retry_for: float = 300.0
    """Time limit for retries: none starts later than this many seconds after the first failure."""
    connections_per_host: int = 16
    """Concurrent requests per host, in each worker."""
    host_pause: float = 0.0
    """Minimum time in seconds between the starts of two requests to one host, in each worker."""
    max_bytes: int = 32 * 2**20
    """Largest body in bytes, after decompression; larger ones fail."""
    max_redirects: int = 5
    """Largest number of redirects to follow."""
    user_agent_token: str | None = None
    """Name of the crawler, sent in User-Agent and matched in X-Robots-Tag and robots.txt."""
    disallowed_header_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """X-Robots-Tag directives that forbid the download; empty = ignore the header."""
    robots_txt: bool = False
    """Fetch and obey each host's robots.txt, with Crawl-delay."""
    max_crawl_delay: float = 5.0
    """Upper limit in seconds for the Crawl-delay to obey."""
    pictures_only: bool = True
    """Reject bodies whose first bytes are no known format of their medium, before the rest is downloaded."""
    allow_hosts: tuple[str, ...] = ()
    """Host names, addresses or networks to allow besides public addresses, optionally with a port."""
    allow_stores: tuple[str, ...] = ()
    """Stores to allow in urls, read with this machine's credentials: s3 (every bucket), or s3://bucket/prefix."""
    allow_local_root: str | None = None
    """Folder of local files to allow in urls (file:///… or a path); None = no local files."""
    compute_hash: Literal["sha256", "md5", "sha512"] | None = "sha256"
    """Digest to store for the body as received."""

    def __post_init__(self) -> None:
        require(0 < self.timeout <= 3600, "timeout", self.timeout, "more than 0, at most 3600 seconds")
        require(0 <= self.retries <= 100, "retries", self.retries, "0 to 100")
        require(self.retry_delay >= 0, "retry_delay", self.retry_delay, "0 or more seconds")
        require(self.max_retry_delay >= 0, "max_retry_delay", self.max_retry_delay, "0 or more seconds")
        require(1 <= self.thread_count <= 10_000, "thread_count", self.thread_count, "1 to 10000")
        require(self.connections_per_host >= 1, "connections_per_host", self.connections_per_host, "1 or more")
        require(self.max_bytes >= 1, "max_bytes", self.max_bytes, "1 or more bytes")
        require(self.max_redirects >= 0, "max_redirects", self.max_redirects, "0 or more")
        token = self.user_agent_token
        plain = token is None or re.fullmatch(r"[\x21-\x7e]+", token) is not None
        require(plain, "user_agent_token", token, "one word of printable ASCII, or none")
        names = (None, "sha256", "md5", "sha512")
        require(self.compute_hash in names, "compute_hash", self.compute_hash, "sha256, md5, sha512 or none")
        require(self.retry_for >= 0, "retry_for", self.retry_for, "0 or more seconds")
        require(0 <= self.host_pause <= 3600, "host_pause", self.host_pause, "0 to 3600 seconds")
        require(0 <= self.max_crawl_delay <= 3600, "max_crawl_delay", self.max_crawl_delay, "0 to 3600 seconds")
        AddressPolicy(self.allow_hosts)
        Stores(self.allow_stores, self.allow_local_root, self.max_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownBody:
    """Known facts about a body before the request.

    With ``etag`` or ``last_modified`` of an earlier response, an unchanged body is not sent again. ``expected`` is its
    required digest, as "sha256:0123…" (sha256, md5 or sha512, in either case). A body of another ``medium`` is refused
    with ``pictures_only``, unless ``any_kind`` is said.
    """

    etag: str | None = None
    last_modified: str | None = None
    expected: str | None = None
    medium: Medium = IMAGE
    any_kind: bool = False


@dataclass(frozen=True, slots=True)
class Download:
    """A complete body. ``url`` is the final url after redirects, ``digest`` the hex digest of ``body``.

    ``etag`` and ``last_modified`` are the server's validators of this version, for the next refresh. If the validators
    of :class:`KnownBody` still match, ``not_modified`` is true, ``http_status`` is 304 and ``body`` is empty.
    """

    body: bytes
    url: str
    http_status: int
    content_type: str
    attempts: int
    digest: str | None
    etag: str | None = None
    last_modified: str | None = None

    @property
    def not_modified(self) -> bool:
        """Whether the known body is unchanged, and was not sent."""
        return self.http_status == 304


Request = tuple[int, str] | tuple[int, str, KnownBody]


def download_all(
    urls: Iterable[Request], options: DownloadOptions, resolver: AbstractResolver | None = None
) -> Iterator[tuple[int, Download | SampleError]]:
    """Fetch ``(number, url)`` pairs or ``(number, url, known)``; yield ``(number, outcome)`` in order of completion.

    The network runs in its own thread while the caller processes results. ``urls`` is read lazily, in the caller's
    thread, at most four times ``thread_count`` ahead of the results taken. Requests pause while 256 MiB of bodies are
    in the queue. Closing the generator early cancels running requests.
    """
    with _Pump(options, resolver) as pump:
        yield from pump.run(urls)


class Downloader:
    """The asynchronous API: ``async with Downloader(options) as downloader: await downloader.fetch(url)``.

    ``resolver`` resolves names (default: the system's, cached per process); its answers are checked, too. While
    ``paused()`` is true no new request starts.
    """

    def __init__(
        self,
        options: DownloadOptions,
        resolver: AbstractResolver | None = None,
        paused: Callable[[], bool] | None = None,
    ) -> None:
        self._options = options
        self._policy = AddressPolicy(options.allow_hosts)
        self._resolver = GuardedResolver(self._policy, resolver or SystemResolver())
        self._turns = Turns(
            options.thread_count, options.connections_per_host, options.host_pause, paused or (lambda: False)
        )
        self._stores = Stores(options.allow_stores, options.allow_local_root, options.max_bytes)
        self._robots: Robots | None = None
        if options.robots_txt:
            self._robots = Robots(self._get_robots, options.user_agent_token, options.max_crawl_delay)
        self._token = (options.user_agent_token or "").strip().lower() or None
        self._directives = frozenset(word.strip().lower() for word in options.disallowed_header_directives)

    async def __aenter__(self) -> Self:
        _raise_file_limit()
        connector = aiohttp.TCPConnector(
            limit=0,
            resolver=self._resolver,
            socket_factory=self._resolver.open_socket,
            ssl=_tls_context(),
            ttl_dns_cache=int(_DNS_SECONDS),
            keepalive_timeout=5,
        )
        token = self._options.user_agent_token
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={
                "User-Agent": f"Mozilla/5.0 (compatible; clipmill{'; ' + token if token else ''})",
                "Accept-Encoding": "identity",
            },
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            read_bufsize=2**18,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._robots is not None:
            await self._robots.close()
        await self._session.close()
        await self._hang_up()

    async def _hang_up(self) -> None:
        """Abort TLS connections whose other side does not close them, so that the loop can close."""
        alive = [one for one in self._resolver.sockets if one.fileno() != -1]
        for one in alive:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        patience = time.monotonic() + 1
        while any(one.fileno() != -1 for one in alive) and time.monotonic() < patience:
            await asyncio.sleep(0.002)

    async def fetch(self, url: str, known: KnownBody | None = None) -> Download:
        """Fetch one url, with retries.

        Raises:
            SampleError: status "failed_to_download"; error classes in ``ERROR_CLASSES``.
        """
        known, give_up = known or KnownBody(), math.inf
        for attempt in range(1, self._options.retries + 2):
            try:
                return await self._attempt(url, known, attempt)
            except Failure as failure:
                now = time.monotonic()
                give_up = min(give_up, now + self._options.retry_for)
                pause = _pause(attempt, failure.retry_after, self._options)
                if attempt > self._options.retries or not failure.may_pass or now + pause > give_up:
                    raise SampleError(
                        failure.status, failure.error_class, failure.message, failure.http_status, attempt
                    ) from failure
            await asyncio.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _attempt(self, text: str, known: KnownBody, attempt: int) -> Download:
        try:
            async with asyncio.timeout(self._options.timeout) as deadline:
                if isinstance(text, str) and self._stores.serve(text):
                    return await self._read_store(text, known, attempt, deadline)
                return await self._follow(parse_url(text), known, attempt, deadline)
        except TimeoutError as error:
            raise Failure("timeout", "timed out") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _classify(error) from error

    async def _read_store(self, text: str, known: KnownBody, attempt: int, deadline: asyncio.Timeout) -> Download:
        host = self._stores.host(text)
        await self._wait_for_turn(host, deadline)
        try:
            call = functools.partial(self._stores.read, text, self._options.timeout)
            stored = await asyncio.get_running_loop().run_in_executor(store_threads(), call)
        finally:
            self._turns.release(host)
        etag, changed = _validator(stored.etag), _validator(stored.last_modified)
        if etag is not None and etag == known.etag:
            return Download(b"", text, 304, "", attempt, None, etag, changed)
        if stored.body and self._options.pictures_only and not known.any_kind:
            refuse_other_media(stored.body[:ENOUGH], known.medium, None)
        return self._finished(stored.body, known, Download(b"", text, 200, "", attempt, None, etag, changed))

    async def _follow(self, url: URL, known: KnownBody, attempt: int, deadline: asyncio.Timeout) -> Download:
        """Redirects are followed here, so that every hop's scheme and address pass the same checks."""
        headers = _conditions(known)
        for _ in range(self._options.max_redirects + 1):
            host = self._checked_host(url)
            if self._robots is not None:
                await self._obey_robots(self._robots, url, host, deadline)
            await self._wait_for_turn(host, deadline)
            try:
                async with self._session.get(url, allow_redirects=False, headers=headers) as response:
                    location = response.headers.get("Location") if response.status in _REDIRECTS else None
                    if location is None:
                        return await self._receive(response, attempt, known)
            finally:
                self._turns.release(host)
            url = _join(url, location)
        raise Failure("too_many_redirects", "too many redirects")

    async def _obey_robots(self, robots: Robots, url: URL, host: str, deadline: asyncio.Timeout) -> None:
        with _stopped(deadline):
            pause = await robots.check(url)
        if pause:
            self._turns.slow_down(host, pause)

    async def _get_robots(self, url: URL) -> tuple[int, bytes]:
        """Status and first bytes of a robots.txt, with the same checks as for images."""
        try:
            async with asyncio.timeout(self._options.timeout) as deadline:
                for _ in range(_ROBOTS_REDIRECTS + 1):
                    host = self._checked_host(url)
                    await self._wait_for_turn(host, deadline)
                    try:
                        async with self._session.get(url, allow_redirects=False) as response:
                            location = response.headers.get("Location") if response.status in _REDIRECTS else None
                            if location is None:
                                return response.status, await _read_start(response, ROBOTS_BYTES)
                    finally:
                        self._turns.release(host)
                    url = _join(url, location)
        except TimeoutError as error:
            raise Failure("timeout", "timed out") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _classify(error) from error
        raise Failure("too_many_redirects", "too many redirects")

    def _checked_host(self, url: URL) -> str:
        host, port = url.host or "", url.port or 0
        # No name ends in a number (WHATWG URL, "ends in a number"): what does is an address, perhaps an odd spelling
        # of one, and connectors take addresses past the resolver.
        last = host.rstrip(".").rpartition(".")[2]
        if ":" in host or last.isdigit() or re.fullmatch(r"0x[0-9a-f]*", last, re.IGNORECASE):
            literal = host.partition("%")[0]
            if parse_address(literal) is None or not self._policy.allows_address(host, port):
                raise Failure("policy", "refused: not a public address")
        return host

    async def _wait_for_turn(self, host: str, deadline: asyncio.Timeout) -> None:
        """Take a turn at the host; the waiting time does not count for the attempt."""
        with _stopped(deadline):
            await self._turns.take(host)

    async def _receive(self, response: aiohttp.ClientResponse, attempt: int, known: KnownBody) -> Download:
        status, headers = response.status, response.headers
        unchanged = status == 304 and bool(known.etag or known.last_modified)
        if not 200 <= status < 300 and not unchanged:
            raise http_failure(status, _retry_after(headers.get("Retry-After", "")))
        if self._directives and self._opted_out(headers.getall("X-Robots-Tag", ())):
            raise Failure("optout", "Use of image disallowed by X-Robots-Tag directive", status)
        about = Download(
            b"",
            str(response.url),
            status,
            headers.get("Content-Type", "").encode("ascii", "replace").decode(),
            attempt,
            None,
            _validator(headers.get("ETag")) or (known.etag if unchanged else None),
            _validator(headers.get("Last-Modified")) or (known.last_modified if unchanged else None),
        )
        return about if unchanged else self._finished(await self._read(response, known), known, about)

    def _finished(self, body: bytes, known: KnownBody, about: Download) -> Download:
        if not body:
            raise Failure("empty", "empty body", about.http_status)
        if known.expected is not None:
            algorithm, _, expected = known.expected.partition(":")
            if digest(body, algorithm) != expected.strip().lower():
                raise Failure("hash_mismatch", "hash mismatch", about.http_status)
        return replace(about, body=body, digest=digest(body, self._options.compute_hash))

    def _opted_out(self, values: Iterable[str]) -> bool:
        """img2dataset's parsing: ``[token:] directive, directive``; directives for another token are ignored."""
        for value in values:
            token, colon, rest = value.partition(":")
            directives = {word.strip().lower() for word in (rest if colon else token).split(",")}
            if directives & self._directives and (not colon or token.strip().lower() == self._token):
                return True
        return False

    async def _read(self, response: aiohttp.ClientResponse, known: KnownBody) -> bytes:
        most = self._options.max_bytes
        if (response.content_length or 0) > most:
            raise _too_large(response)
        inflate: _Inflater | None = None
        chunks, size, looking = [], 0, self._options.pictures_only and not known.any_kind
        async for start, chunk in _whole_start(response):
            if start and not known.medium.starts(chunk):
                # Some servers state an encoding that the body does not have: the first bytes of a medium are believed.
                inflate = _Inflater.for_encoding(response.headers.get("Content-Encoding", ""), response.status)
            part = inflate(chunk, most - size + 1) if inflate else chunk
            size += len(part)
            if size > most:
                raise _too_large(response)
            chunks.append(part)
            if looking and size >= ENOUGH:
                refuse_other_media(b"".join(chunks)[:ENOUGH], known.medium, response.status)
                looking = False
        if inflate:
            inflate.finish()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _whole_start(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[bool, bytes]]:
    """The body in chunks, each with whether it is the first; that one has ``ENOUGH`` bytes, if the body has as many."""
    start: bytes | None = b""
    async for chunk in response.content.iter_any():
        if start is None:
            yield False, chunk
            continue
        start += chunk
        if len(start) >= ENOUGH:
            yield True, start
            start = None
    if start:
        yield True, start


async def _read_start(response: aiohttp.ClientResponse, most: int) -> bytes:
    """The first ``most`` bytes of a body that may be longer."""
    inflate = _Inflater.for_encoding(response.headers.get("Content-Encoding", ""), response.status)
    start = bytearray()
    async for chunk in response.content.iter_any():
        start += inflate(chunk, most - len(start) + 1) if inflate else chunk
        if len(start) >= most:
            break
    return bytes(start[:most])


@contextlib.contextmanager
def _stopped(deadline: asyncio.Timeout) -> Iterator[None]:
    """Suspends the time limit of an attempt."""
    loop = asyncio.get_running_loop()
    left = (deadline.when() or 0.0) - loop.time()
    deadline.reschedule(None)
    yield
    deadline.reschedule(loop.time() + left)


def _validator(value: str | None) -> str | None:
    """An ETag or Last-Modified that is valid to store and send back; servers send arbitrary values."""
    return value if value is not None and re.fullmatch(r"[\x20-\x7e]{1,512}", value) else None


def _conditions(known: KnownBody) -> dict[str, str] | None:
    pairs = ("If-None-Match", _validator(known.etag)), ("If-Modified-Since", _validator(known.last_modified))
    return {name: value for name, value in pairs if value is not None} or None


class SystemResolver(AbstractResolver):
    """The system's DNS look-up, in threads, with answers and failures cached per process."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Addresses of ``host``; raises OSError (socket.gaierror) when there are none."""
        entry = _dns_cache.get((host, family))
        if entry is None or entry.expires < time.monotonic():
            entry = await _look_up(host, family)
            if len(_dns_cache) >= _DNS_ENTRIES:
                _dns_cache.clear()
            _dns_cache[host, family] = entry
        if entry.error is not None:
            raise socket.gaierror(*entry.error)
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST)
            for kind, address in entry.addresses
        ]

    async def close(self) -> None:
        """Does nothing: cache and threads belong to the process."""


@dataclass(frozen=True, slots=True)
class _Answer:
    addresses: tuple[tuple[int, str], ...]
    error: tuple[int, str] | None
    expires: float


_dns_cache: dict[tuple[str, int], _Answer] = {}


async def _look_up(host: str, family: socket.AddressFamily) -> _Answer:
    call = functools.partial(
        socket.getaddrinfo, host, None, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
    )
    try:
        found = await asyncio.get_running_loop().run_in_executor(_dns_threads(), call)
    except socket.gaierror as error:
        number, text = int(error.args[0]), str(error.args[-1])
        seconds = 0.0 if number == socket.EAI_AGAIN else _DNS_FAILURE_SECONDS
        return _Answer((), (number, text), time.monotonic() + seconds)
    except UnicodeError:
        return _Answer((), (socket.EAI_NONAME, "not a host name"), time.monotonic() + _DNS_FAILURE_SECONDS)
    addresses = tuple(dict.fromkeys((int(kind), str(address[0])) for kind, _, _, _, address in found))
    return _Answer(addresses, None, time.monotonic() + _DNS_SECONDS)


@functools.cache
def _dns_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_DNS_THREADS, thread_name_prefix="dns")


@functools.cache
def _tls_context() -> ssl.SSLContext:
    # Reading the certificate store takes tens of milliseconds: once per process, not per request.
    return ssl.create_default_context()


@functools.cache
def _raise_file_limit() -> None:
    # Kept-alive connections to many hosts soon exceed the usual soft limit of 1,024 open files.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(65_536, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def digest(body: bytes, algorithm: str | None) -> str | None:
    """Hex digest of ``body``; None without an algorithm."""
    return None if algorithm is None else hashlib.new(algorithm, body, usedforsecurity=False).hexdigest()


def parse_url(text: str) -> URL:
    """A url to fetch, without user name and password; spaces and other invalid characters are percent-encoded."""
    text = text.strip() if isinstance(text, str) else ""
    scheme = _SCHEME.match(text)
    if scheme is None or len(text) > _MAX_URL:
        raise Failure("bad_url", "not a url")
    if scheme[1].lower() not in ("http", "https"):
        raise Failure("policy", "only http and https are fetched")
    try:
        url = URL(text, encoded=_WELL_FORMED.fullmatch(text) is not None)
        if not url.host or not url.port:
            raise Failure("bad_url", "not a url")
        return url.with_user(None) if url.raw_user is not None or url.raw_password is not None else url
    except ValueError as error:
        raise Failure("bad_url", "not a url") from error


def _join(url: URL, location: str) -> URL:
    location = location.strip()
    if _SCHEME.match(location):
        return parse_url(location)
    try:
        joined = url.join(URL(location, encoded=_WELL_FORMED.fullmatch(location) is not None))
    except ValueError as error:
        raise Failure("bad_url", "redirected to what is not a url") from error
    return parse_url(str(joined))


def _classify(error: Exception) -> Failure:
    cause = getattr(error, "os_error", None) or error.__cause__
    if isinstance(error, AddressRefused) or isinstance(cause, AddressRefused):
        return Failure("policy", "refused: not a public address")
    match error:
        case aiohttp.ClientConnectorDNSError():
            again = getattr(cause, "errno", None) == socket.EAI_AGAIN
            return Failure("dns_again" if again else "dns", "name does not resolve")
        case aiohttp.ClientSSLError() | ssl.SSLError():
            return Failure("tls", "no verified TLS connection")
        case aiohttp.ClientConnectorError():
            return Failure("connect", "connection failed")
        case aiohttp.ClientPayloadError():
            broken = isinstance(cause, ConnectionError)
            return Failure("reset", "connection reset") if broken else Failure("short_read", "incomplete body")
        case aiohttp.InvalidURL():
            return Failure("bad_url", "not a url")
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientOSError() | OSError():
            return Failure("reset", "connection reset")
        case _:
            return Failure("protocol", "malformed HTTP answer")


def _too_large(response: aiohttp.ClientResponse) -> Failure:
    response.close()
    return Failure("too_large", "body too large", response.status)


def _retry_after(value: str) -> float:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3: seconds or a date); 0 if it is neither."""
    try:
        if re.fullmatch(r"\s*[0-9]{1,10}\s*", value):
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _pause(attempt: int, retry_after: float, options: DownloadOptions) -> float:
    delay = options.retry_delay * 2.0 ** min(attempt - 1, 30) * random.uniform(0.5, 1.5)
    return min(options.max_retry_delay, max(delay, retry_after))


class _Inflater:
    """Decompresses gzip or deflate, up to a size limit, for servers that compress in spite of "identity"."""

    def __init__(self, window: int, status: int) -> None:
        self._stream = zlib.decompressobj(window)
        self._status = status

    @classmethod
    def for_encoding(cls, encoding: str, status: int) -> "_Inflater | None":
        name = encoding.strip().lower()
        if name in ("", "identity"):
            return None
        if name in ("gzip", "x-gzip", "deflate"):
            # 32: the header tells gzip from zlib.
            return cls(32 + zlib.MAX_WBITS, status)
        raise Failure("encoding", "unknown content encoding", status)

    def __call__(self, data: bytes, most: int) -> bytes:
        try:
            return self._stream.decompress(data, most)
        except zlib.error as error:
            raise Failure("encoding", "damaged content encoding", self._status) from error

    def finish(self) -> None:
        if not self._stream.eof:
            raise Failure("short_read", "incomplete body", self._status)


class _Pump:
    """An event loop in a thread: takes urls in batches, returns outcomes through a queue."""

    def __init__(self, options: DownloadOptions, resolver: AbstractResolver | None) -> None:
        self._options = options
        self._resolver = resolver
        self._results: queue.SimpleQueue[tuple[int, Download | SampleError] | None] = queue.SimpleQueue()
        self._tasks: set[asyncio.Task[Download]] = set()
        # Each is written by one thread only, so that their difference needs no lock.
        self._received = 0
        self._taken = 0
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, name="download", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def run(self, urls: Iterable[Request]) -> Iterator[tuple[int, Download | SampleError]]:
        source, window, outstanding, more = iter(urls), 4 * self._options.thread_count, 0, True
        batch = max(1, window // 16)
        while True:
            if more and outstanding <= window - batch:
                part = [request for _, request in zip(range(batch), source, strict=False)]
                more = len(part) == batch
                outstanding += len(part)
                self._loop.call_soon_threadsafe(self._begin, part)
            if not outstanding:
                return
            # Fill the window first; wait once it is full or the urls are used up.
            if more and outstanding <= window - batch and self._results.empty():
                continue
            yield self._take()
            outstanding -= 1

    def _take(self) -> tuple[int, Download | SampleError]:
        item = self._results.get()
        if item is None:
            raise RuntimeError("the download thread ended early")
        number, outcome = item
        if isinstance(outcome, Download):
            self._taken += len(outcome.body)
        return number, outcome

    def _work(self) -> None:
        try:
            asyncio.run(self._serve())
        finally:
            if not self._ready.done():
                self._ready.set_exception(RuntimeError("the download thread could not start"))
            self._results.put(None)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with Downloader(self._options, self._resolver, self._is_full) as self._downloader:
            self._ready.set_result(None)
            await self._stop.wait()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _is_full(self) -> bool:
        return self._received - self._taken > _MAX_WAITING_BYTES

    def _begin(self, requests: list[Request]) -> None:
        for number, *what in requests:
            task = self._loop.create_task(self._downloader.fetch(*what))
            self._tasks.add(task)
            task.add_done_callback(functools.partial(self._finish, number))

    def _finish(self, number: int, task: asyncio.Task[Download]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._received += len(task.result().body)
            self._results.put((number, task.result()))
        elif isinstance(error, SampleError):
            self._results.put((number, error))
        else:
            # The sample boundary: a url that triggers a bug in an HTTP parser fails one row, not the whole crawl.
            logger.error("url number %d failed unexpectedly", number, exc_info=error)
            self._results.put((number, SampleError("failed_to_download", "unexpected", type(error).__name__)))
