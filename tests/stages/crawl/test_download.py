"""The downloader against servers on loopback: honest, broken, slow, greedy and hostile ones."""

import asyncio
import contextlib
import datetime
import email.utils
import gc
import gzip
import hashlib
import ipaddress
import itertools
import logging
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from pipeline.errors import SampleError, SettingError
from pipeline.stages.crawl import download
from pipeline.stages.crawl.download import Download, Downloader, DownloadOptions, KnownBody, download_all, parse_url
from pipeline.stages.crawl.turns import Turns

BODY = b"\xff\xd8\xff" + bytes(range(256)) * 40
QUICK: dict[str, Any] = {"allow_hosts": ("127.0.0.1",), "timeout": 3.0, "retry_delay": 0.01, "pictures_only": False}


def quick(**changes: Any) -> DownloadOptions:
    return DownloadOptions(**{**QUICK, **changes})


def fetch(url: str, resolver: AbstractResolver | None = None, **changes: Any) -> Download | SampleError:
    ((number, outcome),) = download_all([(7, url)], quick(**changes), resolver)
    assert number == 7
    return outcome


def failure(url: str, resolver: AbstractResolver | None = None, **changes: Any) -> SampleError:
    outcome = fetch(url, resolver, **changes)
    assert isinstance(outcome, SampleError), outcome
    assert outcome.status == "failed_to_download"
    assert outcome.error_class in download.ERROR_CLASSES
    return outcome


def success(url: str, resolver: AbstractResolver | None = None, **changes: Any) -> Download:
    outcome = fetch(url, resolver, **changes)
    assert isinstance(outcome, Download), repr(outcome)
    return outcome


# A server that may say anything: each path is a function that gets the socket and how often it was asked before


Script = Callable[[socket.socket, int], None]


class RawServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size = 512

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RawHandler)
        self.scripts: dict[str, Script] = {}
        self.heads: list[str] = []
        self.lock = threading.Lock()
        self.connections = 0

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def add(self, path: str, script: Script | bytes) -> str:
        self.scripts[path] = (lambda connection, _: connection.sendall(script)) if isinstance(script, bytes) else script
        return f"http://127.0.0.1:{self.port}{path}"

    def asked(self, path: str) -> int:
        return sum(head.startswith(f"GET {path} ") for head in self.heads)

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are what the tests are about."""


class RawHandler(socketserver.BaseRequestHandler):
    server: RawServer

    def handle(self) -> None:
        with self.server.lock:
            self.server.connections += 1
        while True:
            head = b""
            while b"\r\n\r\n" not in head:
                received = self.request.recv(65536)
                if not received:
                    return
                head += received
            path = head.split(b" ")[1].decode()
            with self.server.lock:
                before = self.server.asked(path)
                self.server.heads.append(head.decode("latin-1"))
            self.server.scripts[path](self.request, before)
            if not path.startswith("/keep"):
                return


@pytest.fixture
def raw() -> Iterator[RawServer]:
    server = RawServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def answer(body: bytes = BODY, status: str = "200 OK", length: int | None = None, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


class Names(AbstractResolver):
    """Answers each look-up of a name with the next of its lists of addresses, the last for ever."""

    def __init__(self, **names: list[list[str]]) -> None:
        self.names = {name.replace("_", "."): answers for name, answers in names.items()}

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list[ResolveResult]:
        answers = self.names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            ResolveResult(hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0)
            for address in addresses
        ]

    async def close(self) -> None:
        pass


# What arrives


def test_a_body_arrives_whole(raw: RawServer) -> None:
    url = raw.add("/a.jpg", answer(Content_Type="image/jpeg"))
    got = success(url)
    assert got == Download(BODY, url, 200, "image/jpeg", 1, hashlib.sha256(BODY).hexdigest())


@pytest.mark.parametrize("name", ["md5", "sha512", None])
def test_the_digest_is_of_the_body(raw: RawServer, name: Any) -> None:
    expected = None if name is None else hashlib.new(name, BODY).hexdigest()
    assert success(raw.add("/a", answer()), compute_hash=name).digest == expected


def test_a_chunked_body_and_a_page_are_bodies_too(raw: RawServer) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
    assert success(raw.add("/chunked", chunked)).body == b"hello world"
    assert success(raw.add("/page", answer(b"<html>", Content_Type="text/html"))).body == b"<html>"
    until_close = b"HTTP/1.0 200 OK\r\n\r\n" + BODY
    assert success(raw.add("/close", until_close)).body == BODY


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        ("/plain.jpg?a=1&b=%7Ex%2F", "/plain.jpg?a=1&b=%7Ex%2F"),
        ("/with space.jpg", "/with%20space.jpg"),
        ("/Straße/ü.jpg?q=é", "/Stra%C3%9Fe/%C3%BC.jpg?q=%C3%A9"),
        ("/part#fragment", "/part"),
        ("/tab\tand\nline", "/tabandline"),
        ("/日本.png  ", "/%E6%97%A5%E6%9C%AC.png"),
        ("", "/"),
    ],
)
def test_urls_are_sent_as_they_are_or_quoted(raw: RawServer, sent: str, received: str) -> None:
    raw.add(received, answer())
    assert success(f"http://127.0.0.1:{raw.port}{sent}").body == BODY


def test_request_headers_are_few_and_honest(raw: RawServer) -> None:
    success(raw.add("/a", answer()).replace("//", "//user:secret@"), user_agent_token="mybot")
    (head,) = raw.heads
    assert "User-Agent: Mozilla/5.0 (compatible; clipmill; mybot)\r\n" in head
    assert "Accept-Encoding: identity\r\n" in head
    assert "secret" not in head and "Authorization" not in head and "Cookie" not in head


def test_proxies_of_the_environment_are_not_used(raw: RawServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert success(raw.add("/a", answer())).body == BODY


# What does not


@pytest.mark.parametrize(
    ("status", "error_class"),
    [
        ("304 Not Modified", "http_3xx"),
        ("301 Moved Permanently", "http_3xx"),
        ("403 Forbidden", "http_4xx"),
        ("404 Not Found", "http_4xx"),
        ("429 Too Many Requests", "http_429"),
        ("500 Internal Server Error", "http_5xx"),
        ("503 Service Unavailable", "http_5xx"),
    ],
)
def test_a_status_is_a_class_and_urllibs_sentence(raw: RawServer, status: str, error_class: str) -> None:
    error = failure(raw.add("/a", answer(b"" if status.startswith("304") else b"sorry", status)))
    number, phrase = status.split(" ", 1)
    assert (error.error_class, error.http_status, error.attempts) == (error_class, int(number), 1)
    assert error.message == f"HTTP Error {number}: {phrase}"


@pytest.mark.parametrize("reply", [answer(b""), b"HTTP/1.1 204 No Content\r\n\r\n"])
def test_nothing_is_not_a_body(raw: RawServer, reply: bytes) -> None:
    assert failure(raw.add("/a", reply)).error_class == "empty"


@pytest.mark.parametrize(
    "reply",
    [
        answer(BODY, length=len(BODY) + 1),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n wo",
        answer(gzip.compress(BODY, mtime=0)[:-9], Content_Encoding="gzip"),
    ],
)
def test_a_body_that_stops_early_is_a_failure(raw: RawServer, reply: bytes) -> None:
    assert failure(raw.add("/a", reply)).error_class == "short_read"


@pytest.mark.parametrize(
    ("sent", "classes"),
    [(b"", ["reset"]), (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\nstart", ["reset", "short_read"])],
)
def test_a_broken_connection_is_reported(raw: RawServer, sent: bytes, classes: list[str]) -> None:
    def script(connection: socket.socket, _: int) -> None:
        connection.sendall(sent)
        time.sleep(0.05)
        reset(connection)

    assert failure(raw.add("/a", script)).error_class in classes


@pytest.mark.parametrize("reply", [b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"])
def test_what_is_not_http_is_a_protocol_failure(raw: RawServer, reply: bytes) -> None:
    assert failure(raw.add("/a", reply)).error_class == "protocol"


def test_endless_headers_end(raw: RawServer) -> None:
    def script(connection: socket.socket, _: int) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            connection.sendall(b"X-Padding: " + b"a" * 5000 + b"\r\n")

    assert failure(raw.add("/a", script)).error_class in ("protocol", "timeout")


def test_a_closed_port_is_a_connect_failure() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert failure(f"http://127.0.0.1:{port}/").error_class == "connect"


def test_an_unknown_name_is_a_dns_failure() -> None:
    assert failure("http://no-such-name.invalid/a.jpg").error_class == "dns"


@pytest.mark.parametrize("head", [True, False])
def test_a_slow_drip_meets_the_deadline_of_the_whole_attempt(raw: RawServer, head: bool) -> None:
    def script(connection: socket.socket, _: int) -> None:
        drip = answer(b"x" * 10_000)
        connection.sendall(drip[: 60 if head else 5])
        for _ in range(100):
            time.sleep(0.05)  # each socket operation is quick, the whole is not
            connection.sendall(b"x" if head else b"")

    began = time.monotonic()
    error = failure(raw.add("/a", script), timeout=0.4)
    assert (error.error_class, error.message) == ("timeout", "timed out")
    assert time.monotonic() - began < 2


# Caps


def test_a_long_body_is_refused_by_its_announcement(raw: RawServer) -> None:
    assert failure(raw.add("/a", answer(b"", length=10**12)), max_bytes=1000).error_class == "too_large"


def test_an_endless_body_is_cut_off(raw: RawServer) -> None:
    sent = []

    def script(connection: socket.socket, _: int) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
            sent.append(65536)

    assert failure(raw.add("/a", script), max_bytes=200_000).error_class == "too_large"
    assert sum(sent) < 20 * 2**20


def test_the_cap_itself_passes(raw: RawServer) -> None:
    url = raw.add("/a", answer(b"x" * 1000))
    assert len(success(url, max_bytes=1000).body) == 1000
    assert failure(url, max_bytes=999).error_class == "too_large"


@pytest.mark.parametrize(("name", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_compressed_body_is_unpacked_up_to_the_cap(raw: RawServer, name: str, pack: Callable[[bytes], bytes]) -> None:
    assert success(raw.add("/a", answer(pack(BODY), Content_Encoding=name))).body == BODY
    bomb = pack(bytes(50 * 2**20))
    assert failure(raw.add("/b", answer(bomb, Content_Encoding=name)), max_bytes=2**20).error_class == "too_large"


@pytest.mark.parametrize(
    "reply", [answer(b"garbage", Content_Encoding="br"), answer(b"garbage", Content_Encoding="gzip")]
)
def test_an_encoding_that_is_not_understood_is_a_failure(raw: RawServer, reply: bytes) -> None:
    assert failure(raw.add("/a", reply)).error_class == "encoding"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "utf-8"])
def test_an_images_bytes_are_believed_and_not_its_encoding(raw: RawServer, encoding: str) -> None:
    assert success(raw.add("/a", answer(BODY, Content_Encoding=encoding))).body == BODY


# Retries


def test_a_429_is_asked_again_when_it_says(raw: RawServer) -> None:
    busy = answer(b"", "429 Too Many Requests", Retry_After="1")
    url = raw.add("/a", lambda connection, before: connection.sendall(answer() if before else busy))
    began = time.monotonic()
    got = success(url, retries=2)
    assert (got.attempts, raw.asked("/a")) == (2, 2)
    assert 1 <= time.monotonic() - began < 2


def test_a_retry_after_is_capped(raw: RawServer) -> None:
    busy = answer(b"", "503 Service Unavailable", Retry_After="Fri, 31 Dec 2100 23:59:59 GMT")
    url = raw.add("/a", lambda connection, before: connection.sendall(answer() if before else busy))
    began = time.monotonic()
    assert success(url, retries=1, max_retry_delay=0.1).attempts == 2
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("kind", ["500", "reset", "short", "timeout"])
def test_what_may_pass_is_tried_again(raw: RawServer, kind: str) -> None:
    def script(connection: socket.socket, before: int) -> None:
        if before == 2:
            connection.sendall(answer())
        elif kind == "500":
            connection.sendall(answer(b"", "500 Internal Server Error"))
        elif kind == "reset":
            reset(connection)
        elif kind == "short":
            connection.sendall(answer(length=10**6))
        else:
            time.sleep(0.6)

    url = raw.add("/a", script)
    # aiohttp asks once more by itself when a connection breaks, as it may have been an idle one.
    assert success(url, retries=2, timeout=0.3).attempts == (2 if kind == "reset" else 3)


def test_retries_end(raw: RawServer) -> None:
    error = failure(raw.add("/a", answer(b"", "500 Internal Server Error")), retries=3)
    assert (error.error_class, error.attempts, raw.asked("/a")) == ("http_5xx", 4, 4)


@pytest.mark.parametrize("reply", [answer(b"", "404 Not Found"), answer(X_Robots_Tag="noai"), answer(b"")])
def test_what_will_not_pass_is_not_tried_again(raw: RawServer, reply: bytes) -> None:
    assert failure(raw.add("/a", reply), retries=5).attempts == 1
    assert raw.asked("/a") == 1


# Redirects


def test_redirects_are_followed(raw: RawServer) -> None:
    raw.add("/b/c.jpg", answer())
    for number, (status, location) in enumerate(
        [(301, "b/c.jpg"), (302, "/b/c.jpg"), (303, "/x/../b/c.jpg"), (307, f"http://127.0.0.1:{raw.port}/b/c.jpg")]
    ):
        url = raw.add(f"/a{number}", answer(b"moved", f"{status} Moved", Location=location))
        assert success(url).url == f"http://127.0.0.1:{raw.port}/b/c.jpg"


def test_only_so_many_redirects_are_followed(raw: RawServer) -> None:
    for number in range(7):
        raw.add(f"/{number}", answer(b"", "302 Found", Location=f"/{number - 1}"))
    raw.add("/0", answer())
    assert success(f"http://127.0.0.1:{raw.port}/5").body == BODY
    assert failure(f"http://127.0.0.1:{raw.port}/6").error_class == "too_many_redirects"
    assert failure(raw.add("/loop", answer(b"", "302 Found", Location="/loop"))).error_class == "too_many_redirects"
    assert failure(f"http://127.0.0.1:{raw.port}/1", max_redirects=0).error_class == "too_many_redirects"


@pytest.mark.parametrize(
    ("location", "error_class"),
    [
        ("http://10.0.0.1/", "policy"),
        ("http://169.254.169.254/latest/meta-data/", "policy"),
        ("http://[::1]:{port}/ok", "policy"),
        ("http://[::ffff:127.0.0.1]:{port}/ok", "policy"),
        ("http://2130706433:{port}/ok", "policy"),
        ("//127.0.0.2:{port}/ok", "policy"),
        ("http://sneaky.test:{port}/ok", "policy"),
        ("file:///etc/passwd", "policy"),
        ("gopher://127.0.0.1/", "policy"),
        ("http://", "bad_url"),
        ("http://[", "bad_url"),
    ],
)
def test_a_redirect_passes_the_same_checks(raw: RawServer, location: str, error_class: str) -> None:
    raw.add("/ok", answer())
    url = raw.add("/a", answer(b"", "302 Found", Location=location.format(port=raw.port)))
    assert failure(url, Names(sneaky_test=[["127.0.0.3"]])).error_class == error_class
    assert raw.asked("/ok") == 0


# Addresses


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "017700000001",
        "0177.0.0.1",
        "127.1",
        "127.0.0.1.",
        "127。0。0。1",
        "①②⑦.0.0.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "localhost",
        "LOCALHOST.",
        "0.0.0.0",
        "0",
        "8.8.8.8@127.0.0.1",
    ],
)
def test_no_spelling_of_loopback_gets_through(raw: RawServer, host: str) -> None:
    raw.add("/", answer())
    error = failure(f"http://{host}:{raw.port}/", allow_hosts=())
    assert error.error_class in ("policy", "dns", "bad_url")
    assert raw.connections == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://[fd00:ec2::254]/",
        "http://100.100.100.200/",
        "http://168.63.129.16/",
        "http://192.168.1.1/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[fe80::1%25eth0]/",
        "file:///etc/passwd",
        "ftp://example.com/a.jpg",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
    ],
)
def test_other_places_and_schemes_are_refused(url: str) -> None:
    assert failure(url).error_class == "policy"


@pytest.mark.parametrize(
    "url",
    ["", "   ", "image.jpg", "//host/a", "http://", "http:///a", "http://[::1/", "http://a:99999/", "http:a", None],
)
def test_an_invalid_url_is_reported(url: Any) -> None:
    assert failure(url).error_class == "bad_url"


def test_a_name_that_changes_its_address_gains_nothing(raw: RawServer) -> None:
    raw.add("/a", answer())
    # TEST-NET-3 stands for a public server; the second look-up says loopback.
    names = Names(rebinding_test=[["8.8.8.8"], ["127.0.0.1"], ["127.0.0.1"]])
    for _ in range(3):
        error = failure(f"http://rebinding.test:{raw.port}/a", names, allow_hosts=(), timeout=0.3)
        assert error.error_class in ("connect", "timeout", "policy")
    assert error.error_class == "policy"
    assert raw.connections == 0


def test_a_resolver_that_is_passed_by_does_not_matter(raw: RawServer, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.add("/a", answer())
    monkeypatch.setattr(Downloader, "_checked_host", lambda self, url: url.host)
    assert failure(f"http://127.0.0.1:{raw.port}/a", allow_hosts=()).error_class == "policy"
    assert raw.connections == 0


def test_of_several_addresses_only_allowed_ones_are_tried(raw: RawServer) -> None:
    url = raw.add("/a", answer()).replace("127.0.0.1", "mixed.test")
    assert success(url, Names(mixed_test=[["10.0.0.1", "127.0.0.1", "169.254.169.254"]])).body == BODY


def test_allow_hosts_opens_a_name_and_no_more(raw: RawServer) -> None:
    url = raw.add("/a", answer())
    names = Names(store_test=[["127.0.0.1"]], evil_test=[["127.0.0.1"]])
    hosts = ["store.test", "evil.test", "127.0.0.1", "store.test"]
    urls = [(number, url.replace("127.0.0.1", host)) for number, host in enumerate(hosts)]
    for allowed, good in [("store.test", {0, 3}), (f"store.test:{raw.port}", {0, 3}), ("store.test:1", set())]:
        options = quick(allow_hosts=(allowed,), thread_count=1)
        outcomes = dict(download_all(urls, options, names))
        assert {number for number, outcome in outcomes.items() if isinstance(outcome, Download)} == good
        assert {outcome.error_class for outcome in outcomes.values() if isinstance(outcome, SampleError)} == {"policy"}


# X-Robots-Tag


TAGS = [
    ("noai", None),
    ("NoAI", None),
    ("all, noimageai", None),
    ("noindex", None),
    ("nofollow", None),
    ("none", None),
    ("otherbot: noai", None),
    ("otherbot: noai", "mybot"),
    ("mybot: noai", "mybot"),
    ("MyBot: nofollow , noindex", "mybot"),
    ("mybot: nofollow", "mybot"),
    ("unavailable_after: 25 Jun 2030 15:00:00 PST", None),
    ("", None),
]


@pytest.mark.parametrize(("tag", "token"), TAGS)
def test_opt_outs_are_read_as_img2dataset_reads_them(raw: RawServer, tag: str, token: str | None) -> None:
    if sys.version_info >= (3, 13):
        pytest.skip("img2dataset does not import on Python 3.13")
    from email.message import Message

    theirs = pytest.importorskip("img2dataset.downloader")
    headers = Message()
    headers["X-Robots-Tag"] = tag
    options = DownloadOptions()
    expected = theirs.is_disallowed(headers, token, set(options.disallowed_header_directives))
    outcome = fetch(raw.add("/a", answer(X_Robots_Tag=tag)), user_agent_token=token)
    assert isinstance(outcome, SampleError) is expected


def test_an_opt_out_is_obeyed_before_the_body_is_read(raw: RawServer) -> None:
    url = raw.add("/a", answer(b"", length=10**7, X_Robots_Tag="all\r\nX-Robots-Tag: noai"))
    error = failure(url)
    assert (error.error_class, error.http_status) == ("optout", 200)
    assert error.message == "Use of image disallowed by X-Robots-Tag directive"
    assert fetch(raw.add("/b", answer(X_Robots_Tag="noai")), disallowed_header_directives=()).body == BODY  # type: ignore[union-attr]


# Many at a time


class Crowd:
    """An asyncio server in a thread that counts who is there at the same time."""

    def __init__(self, hold: float = 0.0, together: int = 0) -> None:
        self.hold, self.together = hold, together
        self.present = self.most = self.served = self.connections = 0
        self.full = asyncio.Event()
        started = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.work(started)))
        self.thread.start()
        started.wait()

    async def work(self, started: threading.Event) -> None:
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0, backlog=1024)
        self.port = self.server.sockets[0].getsockname()[1]
        started.set()
        await self.over.wait()
        self.server.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.present += 1
                self.most = max(self.most, self.present)
                if self.present >= self.together:
                    self.full.set()
                await self.full.wait()
                await asyncio.sleep(self.hold)
                self.present -= 1
                self.served += 1
                writer.write(answer(head.split(b" ")[1] * 100))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def url(self, number: int) -> str:
        return f"http://127.0.0.1:{self.port}/{number}"

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join()


@pytest.fixture
def crowd() -> Iterator[Callable[..., Crowd]]:
    crowds: list[Crowd] = []

    def start(**options: Any) -> Crowd:
        crowds.append(Crowd(**options))
        return crowds[-1]

    yield start
    for one in crowds:
        one.stop()


def test_two_thousand_files_two_hundred_at_a_time(crowd: Callable[..., Crowd]) -> None:
    server = crowd(together=200)  # nobody is served before two hundred are there
    options = quick(connections_per_host=256, timeout=10.0)
    outcomes = dict(download_all(((number, server.url(number)) for number in range(2000)), options))
    assert len(outcomes) == 2000
    for number, outcome in outcomes.items():
        assert isinstance(outcome, Download), outcome
        assert outcome.body == f"/{number}".encode() * 100
    assert 200 <= server.most <= 256
    assert server.connections <= 256, "connections are kept alive"


def test_a_host_gets_no_more_connections_than_allowed(crowd: Callable[..., Crowd]) -> None:
    server = crowd(hold=0.005)
    list(download_all([(number, server.url(number)) for number in range(60)], quick(connections_per_host=3)))
    assert server.most == server.connections == 3


def test_waiting_for_a_place_does_not_use_up_the_time(crowd: Callable[..., Crowd]) -> None:
    server = crowd(hold=0.1)
    urls = [(number, server.url(number)) for number in range(8)]
    for options in (quick(thread_count=1, timeout=0.4), quick(connections_per_host=1, timeout=0.4)):
        assert all(isinstance(outcome, Download) for _, outcome in download_all(urls, options))


def test_a_slow_host_does_not_hold_up_the_others(raw: RawServer, crowd: Callable[..., Crowd]) -> None:
    def slow(connection: socket.socket, _: int) -> None:
        time.sleep(0.3)
        connection.sendall(answer())

    other = crowd()
    first = [(number, raw.add(f"/{number}", slow)) for number in range(6)]
    second = [(number, other.url(number).replace("127.0.0.1", "127.0.0.2")) for number in range(6, 30)]
    other_names = quick(allow_hosts=("127.0.0.0/8",), thread_count=8, connections_per_host=2, timeout=3)
    second = [(number, url.replace("127.0.0.2", "other.test")) for number, url in second]
    order = [number for number, _ in download_all(first + second, other_names, Names(other_test=[["127.0.0.1"]]))]
    assert set(order[:24]) == set(range(6, 30))


def test_urls_are_read_no_further_ahead_than_needed(crowd: Callable[..., Crowd]) -> None:
    server, read = crowd(), itertools.count()
    outcomes = download_all(((next(read), server.url(0)) for _ in itertools.count()), quick(thread_count=4))
    taken = [next(outcomes) for _ in range(40)]
    outcomes.close()  # type: ignore[attr-defined]
    assert len({number for number, _ in taken}) == 40
    assert next(read) <= 40 + 16 + 1


def test_bodies_that_nobody_takes_stop_the_requests(
    crowd: Callable[..., Crowd], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_MAX_WAITING_BYTES", 2000)
    server = crowd()
    outcomes = download_all([(number, server.url(number)) for number in range(100)], quick(thread_count=8))
    next(outcomes)
    time.sleep(0.3)
    assert server.served < 40
    assert sum(1 for _ in outcomes) == 99


def test_closing_early_is_quick_and_clean(crowd: Callable[..., Crowd], caplog: pytest.LogCaptureFixture) -> None:
    server = crowd(hold=0.001)
    urls = [(number, server.url(number)) for number in range(500)]
    outcomes = download_all(urls, quick(timeout=60.0))
    next(outcomes)
    server.hold = 30.0
    time.sleep(0.1)
    began = time.monotonic()
    outcomes.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 3
    assert not [thread for thread in threading.enumerate() if thread.name == "download"]
    gc.collect()  # an open transport would warn now, and warnings are errors
    assert not caplog.records


def test_an_error_in_the_list_of_urls_reaches_the_caller(crowd: Callable[..., Crowd]) -> None:
    def urls() -> Iterable[tuple[int, str]]:
        yield 0, crowd().url(0)
        raise KeyError("broken table")

    with pytest.raises(KeyError, match="broken table"):
        list(download_all(urls(), quick()))
    assert not [thread for thread in threading.enumerate() if thread.name == "download"]


def test_an_unforeseen_exception_costs_one_row(
    crowd: Callable[..., Crowd], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server, receive = crowd(), Downloader._receive

    async def stumble(self: Downloader, response: Any, *rest: Any) -> Download:
        if response.url.path == "/3":
            raise ZeroDivisionError("a hole in a parser")
        return await receive(self, response, *rest)

    monkeypatch.setattr(Downloader, "_receive", stumble)
    outcomes = dict(download_all([(number, server.url(number)) for number in range(6)], quick()))
    bad = outcomes.pop(3)
    assert isinstance(bad, SampleError) and bad.error_class == "unexpected"
    assert all(isinstance(outcome, Download) for outcome in outcomes.values())
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_no_urls_no_results() -> None:
    assert list(download_all([], quick())) == []


def test_the_asynchronous_door(raw: RawServer) -> None:
    url = raw.add("/a", answer())

    async def both() -> list[Any]:
        async with Downloader(quick()) as downloader:
            return await asyncio.gather(downloader.fetch(url), downloader.fetch(url + "x"), return_exceptions=True)

    raw.add("/ax", answer(b"", "404 Not Found"))
    good, bad = asyncio.run(both())
    assert good.body == BODY
    assert isinstance(bad, SampleError) and bad.http_status == 404


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    folder: Path = tmp_path_factory.mktemp("tls")
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "both.pem").write_bytes(private + made.public_bytes(pem))
    return SimpleNamespace(path=folder / "both.pem", pem=made.public_bytes(pem).decode())


def test_tls_is_verified(raw: RawServer, certificate: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    url = raw.add("/keep", answer()).replace("http:", "https:")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.path)
    raw.socket = context.wrap_socket(raw.socket, server_side=True)
    assert failure(url).error_class == "tls"
    trusting = ssl.create_default_context(cadata=certificate.pem)
    monkeypatch.setattr(download, "_tls_context", lambda: trusting)
    assert success(url).body == BODY
    other = url.replace("127.0.0.1", "other.test")
    assert failure(other, Names(other_test=[["127.0.0.1"]])).error_class == "tls"


def test_closing_early_leaves_no_tls_connection_behind(
    raw: RawServer, certificate: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def stall(connection: socket.socket, before: int) -> None:
        connection.sendall(answer(length=10**6) if before % 2 else b"")
        over.wait(10)

    good, bad = (raw.add(path, reply).replace("http:", "https:") for path, reply in (("/a", answer()), ("/b", stall)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.path)
    raw.socket = context.wrap_socket(raw.socket, server_side=True)
    trusting = ssl.create_default_context(cadata=certificate.pem)
    monkeypatch.setattr(download, "_tls_context", lambda: trusting)
    outcomes = download_all([(0, good), *((number, bad) for number in range(1, 12))], quick(timeout=60.0))
    assert isinstance(next(outcomes)[1], Download)
    time.sleep(0.1)
    began = time.monotonic()
    outcomes.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 3
    gc.collect()  # an open transport would warn now, and warnings are errors
    over.set()


def test_plain_http_where_tls_was_asked_for_is_a_tls_failure(raw: RawServer) -> None:
    url = raw.add("/a", answer()).replace("http:", "https:")
    assert failure(url, timeout=0.3).error_class in ("tls", "reset", "timeout")


# Options


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timeout", 0),
        ("timeout", -1.0),
        ("retries", -1),
        ("thread_count", 0),
        ("connections_per_host", 0),
        ("max_bytes", 0),
        ("max_redirects", -1),
        ("user_agent_token", "two words"),
        ("user_agent_token", "line\r\nX-Evil: 1"),
        ("compute_hash", "crc32"),
        ("retry_for", -1.0),
        ("host_pause", -1.0),
        ("max_crawl_delay", -1.0),
        ("allow_stores", ("file",)),
        ("allow_stores", ("http",)),
        ("allow_stores", ("simplecache::s3://bucket",)),
        ("allow_stores", ("nosuchstore://bucket",)),
        ("allow_local_root", "/"),
        ("allow_local_root", "/no/such/folder"),
        ("allow_hosts", ("http://x/",)),
    ],
)
def test_senseless_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(SettingError, match=field):
        DownloadOptions(**{field: value})


def test_a_url_keeps_its_host_and_loses_its_password() -> None:
    url = parse_url("https://user:pw@Example.com:8443/a%20b?x=%2F")
    assert str(url) == "https://Example.com:8443/a%20b?x=%2F"


# Images only


def test_a_page_is_refused_before_it_has_arrived(raw: RawServer) -> None:
    closed = threading.Event()

    def script(connection: socket.socket, _: int) -> None:
        connection.sendall(answer(b"<!doctype html><title>Not here</title>", length=10**7))
        if connection.recv(1) == b"":  # waits until the client hangs up, long before its time is over
            closed.set()

    error = fetch(raw.add("/a.jpg", script), pictures_only=True, timeout=60.0, retries=3)
    assert isinstance(error, SampleError)
    assert (error.status, error.error_class) == ("failed_to_resize", "not_a_picture")
    assert (error.http_status, error.attempts) == (200, 1)
    assert closed.wait(10)


def test_images_pass_however_they_are_cut(raw: RawServer) -> None:
    def script(connection: socket.socket, _: int) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        whole = answer()
        connection.sendall(whole[: -len(BODY) + 1])
        for byte in BODY[1:20]:
            time.sleep(0.002)
            connection.sendall(bytes([byte]))
        connection.sendall(BODY[20:])

    assert success(raw.add("/a", script), pictures_only=True).body == BODY
    packed = raw.add("/b", answer(gzip.compress(BODY, mtime=0), Content_Encoding="gzip"))
    assert success(packed, pictures_only=True).body == BODY
    page = raw.add("/c", answer(gzip.compress(b" <html>" * 10, mtime=0), Content_Encoding="gzip"))
    assert getattr(fetch(page, pictures_only=True), "error_class", "") == "not_a_picture"


# What is known before


def test_validators_are_kept_and_asked_with(raw: RawServer) -> None:
    version = {"ETag": '"v1"', "Last_Modified": "Sun, 22 Nov 2026 08:00:00 GMT"}
    url = raw.add("/a", answer(**version))
    got = success(url)
    assert (got.etag, got.last_modified, got.not_modified) == ('"v1"', version["Last_Modified"], False)

    raw.add("/a", answer(b"", "304 Not Modified", ETag='"v1"'))
    known = KnownBody(etag=got.etag, last_modified=got.last_modified)
    ((_, again),) = download_all([(0, url, known)], quick())
    assert isinstance(again, Download) and again.not_modified
    assert (again.body, again.etag, again.last_modified) == (b"", got.etag, got.last_modified)
    assert 'If-None-Match: "v1"\r\n' in raw.heads[-1]
    assert "If-Modified-Since: Sun, 22 Nov 2026 08:00:00 GMT\r\n" in raw.heads[-1]
    assert "If-None-Match" not in raw.heads[0]


def test_validators_that_can_not_be_sent_back_are_dropped(raw: RawServer) -> None:
    got = success(raw.add("/a", answer(ETag='"\u00e9\u00e9"', Last_Modified="x" * 5000)))
    assert (got.etag, got.last_modified) == (None, None)
    evil = KnownBody(etag='"a"\r\nX-Evil: 1', last_modified="\0")
    ((_, outcome),) = download_all([(0, raw.add("/b", answer()), evil)], quick())
    assert isinstance(outcome, Download)
    assert "Evil" not in raw.heads[-1] and "If-" not in raw.heads[-1]


@pytest.mark.parametrize("algorithm", ["sha256", "md5", "sha512"])
def test_a_body_has_to_have_the_expected_digest(raw: RawServer, algorithm: str) -> None:
    url, right = raw.add("/a", answer()), hashlib.new(algorithm, BODY).hexdigest()
    expected = [right, right.upper() + " ", right[:-1], "", "0" * len(right)]
    requests = [(number, url, KnownBody(expected=f"{algorithm}:{text}")) for number, text in enumerate(expected)]
    outcomes = dict(download_all(requests, quick(compute_hash=None, retries=3)))
    assert {number for number, outcome in outcomes.items() if isinstance(outcome, Download)} == {0, 1}
    for number in (2, 3, 4):
        error = outcomes[number]
        assert isinstance(error, SampleError)
        assert (error.status, error.message, error.attempts) == ("failed_to_download", "hash mismatch", 1)
        assert (error.error_class, error.http_status) == ("hash_mismatch", 200)


# Politeness and patience


def test_a_host_is_asked_no_faster_than_its_pause(crowd: Callable[..., Crowd]) -> None:
    server = crowd()
    began = time.monotonic()
    urls = [(number, server.url(number)) for number in range(6)]
    assert all(isinstance(outcome, Download) for _, outcome in download_all(urls, quick(host_pause=0.1, timeout=0.3)))
    assert time.monotonic() - began >= 0.5


def test_a_pause_holds_for_each_host_alone() -> None:
    async def starts() -> list[float]:
        turns, moments = Turns(10, 10, 0.0, lambda: False), []
        turns.slow_down("slow", 30.0)
        loop = asyncio.get_running_loop()
        await turns.take("slow")
        waiting = loop.create_task(turns.take("slow"))
        for number in range(10):
            await turns.take(f"host {number % 3}")
            moments.append(loop.time())
            turns.release(f"host {number % 3}")
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        turns.release("slow")
        return moments

    assert len(asyncio.run(starts())) == 10


def test_patience_ends(raw: RawServer) -> None:
    url = raw.add("/a", answer(b"", "500 Internal Server Error"))
    assert failure(url, retries=100, retry_for=0.2, retry_delay=0.05).attempts < 10


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("7", 7, 7),
        (" 120 ", 120, 120),
        (email.utils.format_datetime(datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC), usegmt=True), 10**9, 10**10),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0, 0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 0, 0),
        ("", 0, 0),
        ("soon", 0, 0),
        ("-5", 0, 0),
        ("1e9", 0, 0),
        ("\u00b2", 0, 0),
        ("9" * 5000, 0, 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, low: float, high: float) -> None:
    assert low <= download._retry_after(value) <= high


def test_a_server_that_is_down_for_a_while_loses_nothing(raw: RawServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    late = threading.Timer(0.7, lambda: None)
    server = RawServer.__new__(RawServer)

    def rise() -> None:
        socketserver.ThreadingTCPServer.__init__(server, ("127.0.0.1", port), RawHandler)
        server.scripts, server.heads, server.lock, server.connections = {}, [], threading.Lock(), 0
        for number in range(40):
            server.add(f"/{number}", answer(BODY + bytes([number])))
        server.serve_forever(0.02)

    late.function = rise
    late.start()
    options = quick(retries=12, retry_delay=0.05, max_retry_delay=0.3)
    outcomes = dict(download_all([(n, f"http://127.0.0.1:{port}/{n}") for n in range(40)], options))
    server.shutdown()
    server.server_close()
    late.join()
    assert [getattr(outcomes[n], "body", None) for n in range(40)] == [BODY + bytes([n]) for n in range(40)]


def test_every_tenth_request_reset_loses_nothing(raw: RawServer) -> None:
    count = itertools.count()

    def script(connection: socket.socket, _: int) -> None:
        if next(count) % 10 == 9:
            connection.sendall(answer()[:500])
            time.sleep(0.01)
            reset(connection)
        else:
            connection.sendall(answer())

    urls = [(n, raw.add(f"/{n}", script)) for n in range(60)]
    outcomes = dict(download_all(urls, quick(retries=5)))
    assert all(isinstance(outcome, Download) and outcome.body == BODY for outcome in outcomes.values())
    assert any(outcome.attempts > 1 for outcome in outcomes.values())


# More hostility


def test_what_comes_after_a_body_does_not_answer_the_next_request(raw: RawServer) -> None:
    forged = answer(b"forged")
    first = raw.add("/keep1", answer() + forged)
    second = raw.add("/keep2", answer(b"honest"))
    options = quick(thread_count=1)
    for _ in range(3):
        outcomes = dict(download_all([(0, first), (1, second), (2, second)], options))
        assert {getattr(outcomes[n], "body", b"honest") for n in (1, 2)} == {b"honest"}


def test_interim_answers_without_end_meet_the_deadline(raw: RawServer) -> None:
    def script(connection: socket.socket, _: int) -> None:
        for _ in range(200):
            connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")
            time.sleep(0.01)

    assert failure(raw.add("/a", script), timeout=0.3).error_class in ("timeout", "protocol", "reset")


def test_a_flood_of_headers_costs_little(raw: RawServer) -> None:
    sent = []

    def script(connection: socket.socket, _: int) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        for number in range(300_000):
            line = b"X-%d: %s\r\n" % (number, b"a" * 200)
            connection.sendall(line)
            sent.append(len(line))

    assert failure(raw.add("/a", script), timeout=2.0).error_class in ("protocol", "timeout")
    assert sum(sent) < 40 * 2**20


def test_a_redirect_does_not_lead_into_stores_or_files(raw: RawServer, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(BODY)
    for place in (f"file://{tmp_path}/secret.jpg", "memory://bucket/a.jpg", f"{tmp_path}/secret.jpg"):
        url = raw.add("/a", answer(b"", "302 Found", Location=place))
        raw.scripts.setdefault(
            f"{tmp_path}/secret.jpg", lambda connection, _: connection.sendall(answer(b"", "404 No"))
        )
        error = failure(url, allow_stores=("memory",), allow_local_root=str(tmp_path))
        assert error.error_class in ("policy", "http_4xx")


class Families(AbstractResolver):
    """One name with the addresses given, of either family."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=0,
            )
            for address in self.addresses
        ]

    async def close(self) -> None:
        pass


def test_a_dead_ipv6_address_gives_way_to_ipv4(raw: RawServer) -> None:
    url = raw.add("/a", answer()).replace("127.0.0.1", "both.test")
    assert success(url, Families("::1", "127.0.0.1"), allow_hosts=("both.test",)).body == BODY


def test_a_silent_address_does_not_use_up_the_time(raw: RawServer) -> None:
    # A listener whose queue is full answers no further connection, as a firewall that drops packets.
    with socket.socket(socket.AF_INET6) as silent, contextlib.ExitStack() as fillers:
        silent.bind(("::1", raw.port))
        silent.listen(0)
        for _ in range(4):
            filler = fillers.enter_context(socket.socket(socket.AF_INET6))
            filler.setblocking(False)
            filler.connect_ex(("::1", raw.port))
        url = raw.add("/a", answer()).replace("127.0.0.1", "both.test")
        assert success(url, Families("::1", "127.0.0.1"), allow_hosts=("both.test",), timeout=3.0).body == BODY
