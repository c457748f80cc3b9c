"""Web servers and object stores that are slow, refuse, reset and lose parts; a disk that fills up.

Between us and an in-memory S3 stands a proxy that spoils requests as a test says.
"""

import functools
import http.client
import io
import itertools
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg

from pipeline.codecs.image_encoding import ImageOptions
from pipeline.codecs.options import MediaOptions
from pipeline.errors import StorageError
from pipeline.shards.storage import Folder, storage_errors
from pipeline.sources.drawn.source import Drawn
from pipeline.sources.urls import UrlTable
from pipeline.stages.crawl.download import DownloadOptions
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers

pytestmark = [pytest.mark.slow, pytest.mark.alone]

ROOT = Path(__file__).resolve().parents[2]
BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"

Fault = Callable[[str, str, int], str]
"""Method, path with query, and how many requests came before -> "", "slow", "503", "reset" or "half"."""


class FaultyProxy:
    """Forwards requests to ``target`` unless ``fault`` breaks them."""

    def __init__(self, target: str) -> None:
        self.target, self.fault = urlsplit(target).netloc, lambda *_: ""
        self.requests: list[str] = []
        self.spoiled = 0
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    fault: Fault

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def spoil_or_serve(self) -> None:
                with proxy.lock:
                    what = proxy.fault(self.command, self.path, len(proxy.requests))
                    proxy.requests.append(f"{self.command} {self.path}")
                    proxy.spoiled += bool(what)
                length = int(self.headers.get("Content-Length") or 0)
                if what == "half":
                    self.rfile.read(length // 2)
                if what in ("reset", "half"):
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True
                    return
                body = self.rfile.read(length)
                if what == "503":
                    self.reply(503, {"Content-Type": "application/xml"}, BUSY)
                    return
                if what == "slow":
                    time.sleep(0.3)
                self.reply(*proxy.forward(self.command, self.path, dict(self.headers), body))

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = spoil_or_serve

            def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                length = headers.get("Content-Length", len(body)) if self.command == "HEAD" else len(body)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else body)

            def log_message(self, *_: object) -> None:
                """Stay quiet."""

        return Handler

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.target, timeout=20)
        try:
            kept = {name: value for name, value in headers.items() if name.lower() not in ("connection", "expect")}
            connection.request(method, path, body, kept)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()


@pytest.fixture
def faulty(s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    import s3fs

    proxy = FaultyProxy(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    # Ten parts of five megabytes take long enough; the real limit is 50.
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 5 * 2**20)
    s3fs.S3FileSystem.clear_instance_cache()
    yield proxy
    monkeypatch.undo()
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.stop()


def stored(uri: str, s3_endpoint: str) -> dict[str, bytes]:
    """What the store itself holds, asked past the proxy."""
    client = boto(s3_endpoint)
    bucket = uri.removeprefix("s3://").partition("/")[0]
    listed = client.list_objects_v2(Bucket=bucket).get("Contents", [])
    return {one["Key"]: client.get_object(Bucket=bucket, Key=one["Key"])["Body"].read() for one in listed}


def boto(endpoint: str) -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=endpoint)


def large(folder: Path) -> tuple[Path, bytes]:
    content = os.urandom(2**20) * 17
    path = folder / "large.tar"
    path.write_bytes(content)
    return path, content


@pytest.mark.parametrize("kind", ["slow", "503", "reset", "half"])
def test_what_passes_leaves_no_trace(kind: str, faulty: FaultyProxy, s3: str, s3_endpoint: str, tmp_path: Path) -> None:
    faulty.fault = lambda method, path, before: kind if before % 3 == 1 else ""
    folder = Folder(f"{s3}/data")
    path, content = large(tmp_path)
    folder.write_atomic("00000.tar", path)
    folder.write_atomic("00000_stats.json", b"{}")
    assert faulty.spoiled >= 2
    assert any("uploadId" in request for request in faulty.requests), "the upload was in parts"
    assert folder.read_bytes("00000_stats.json") == b"{}" and folder.names() == ["00000.tar", "00000_stats.json"]
    assert stored(s3, s3_endpoint) == {"data/00000.tar": content, "data/00000_stats.json": b"{}"}


@pytest.mark.parametrize("kind", ["503", "half"])
def test_an_upload_that_fails_in_the_middle_is_a_sentence_and_no_object(
    kind: str, faulty: FaultyProxy, s3: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    # s3fs tries throttled requests again by itself.
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    folder = Folder(f"{s3}/data")
    folder.write_atomic("00000.tar", b"the old one")
    faulty.fault = lambda method, path, before: kind if method == "PUT" and "partNumber=3" in path else ""
    path, content = large(tmp_path)
    with pytest.raises(StorageError, match=r"cannot write s3://.*00000.tar.*run the same command again"):
        folder.write_atomic("00000.tar", path)
    assert stored(s3, s3_endpoint) == {"data/00000.tar": b"the old one"}
    uploads = boto(s3_endpoint).list_multipart_uploads(Bucket=s3.removeprefix("s3://"))
    assert not uploads.get("Uploads"), "parts that nobody sees would be paid for"
    assert path.read_bytes() == content, "nothing is lost"

    faulty.fault = lambda *_: ""
    folder.write_atomic("00000.tar", path)
    assert stored(s3, s3_endpoint) == {"data/00000.tar": content}


def test_a_store_that_is_gone_is_a_sentence(faulty: FaultyProxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    folder = Folder(f"{s3}/data")
    faulty.fault = lambda *_: "reset"
    with pytest.raises(StorageError, match="run the same command again"):
        folder.write_atomic("a", b"a")


# A whole refresh


def test_a_refresh_among_faults_equals_one_without(
    faulty: FaultyProxy, serve: Any, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(number: int, before: int) -> Any:
        body, kind = coloured(number), number % 10
        if before < 2 and kind in (3, 7):
            return serve.Reply(b"", 503, {"Retry-After": "0"}) if kind == 3 else serve.Reply(body, cut=len(body) // 2)
        return serve.Reply(b"gone", 404) if kind == 9 else body

    server = serve({f"{number}.jpg": functools.partial(answer, number) for number in range(40)})
    table = tmp_path / "list.csv"
    table.write_text("url\n" + "".join(f"{server.url}/{number}.jpg\n" for number in range(40)))
    downloads = DownloadOptions(allow_hosts=("127.0.0.1",), retries=4, retry_delay=0.01)
    options = ShardOptions(
        media=MediaOptions(image=ImageOptions(image_size=32)), downloads=downloads, number_sample_per_shard=10
    )
    source, here = UrlTable(url_list=str(table)), Workers(processes_count=0)

    kinds = itertools.cycle(["", "", "", "503", "", "", "", "reset", "", "", "", "half", "", "", "slow"])
    faulty.fault = lambda *_: next(kinds)
    disturbed = refresh(source, Folder(f"{s3}/data"), options, here)
    assert faulty.spoiled >= 4 and len(server.requests) == 40 + 2 * 8
    faulty.fault = lambda *_: ""
    quiet = refresh(source, Folder(tmp_path / "quiet"), options, here)
    assert (disturbed.samples, disturbed.dropped) == (36, {"http_4xx": 4})
    assert disturbed.digest == quiet.digest
    for name in Folder(tmp_path / "quiet").names(".tar"):
        assert Folder(f"{s3}/data").read_bytes(name) == Folder(tmp_path / "quiet").read_bytes(name), name
    for name in Folder(tmp_path / "quiet").names(".parquet"):
        # A successful row says how many requests it took, which is the one difference.
        one, other = (
            pq.read_table(io.BytesIO(Folder(place).read_bytes(name))) for place in (f"{s3}/data", tmp_path / "quiet")
        )
        assert one.drop_columns("attempts").equals(other.drop_columns("attempts")), name
        assert max(one["attempts"].to_pylist()) > max(other["attempts"].to_pylist()) == 1


class Flaky:
    """Images of a server that is down from the tenth request on, for a while, or that resets every tenth."""

    def __init__(self, serve: Any, tmp_path: Path) -> None:
        self.serve, self.asked, self.out = serve, itertools.count(), tmp_path
        self.kind, self.down_for = "", 0.0
        self.down_since = 0.0
        answers = {f"{number}.jpg": functools.partial(self.answer, number) for number in range(60)}
        self.server = serve(answers)
        self.table = tmp_path / "list.csv"
        self.table.write_text("url\n" + "".join(f"{self.server.url}/{number}.jpg\n" for number in range(60)))

    def answer(self, number: int, before: int) -> Any:
        body, count = coloured(number), next(self.asked)
        if self.kind == "reset" and count % 10 == 9:
            return self.serve.Reply(body, cut=0)
        if self.kind == "down" and count >= 10:
            self.down_since = self.down_since or time.monotonic()
            if time.monotonic() < self.down_since + self.down_for:
                return self.serve.Reply(b"", 503)
        return body

    def refresh(self, name: str) -> Any:
        downloads = DownloadOptions(allow_hosts=("127.0.0.1",), retries=20, retry_delay=0.05, max_retry_delay=0.5)
        options = ShardOptions(
            media=MediaOptions(image=ImageOptions(image_size=32)), downloads=downloads, number_sample_per_shard=10
        )
        return refresh(UrlTable(url_list=str(self.table)), Folder(self.out / name), options, Workers(processes_count=0))


@pytest.mark.parametrize("kind", ["down", "reset"])
def test_a_web_server_that_is_down_for_a_while_or_resets_changes_nothing(kind: str, serve: Any, tmp_path: Path) -> None:
    site = Flaky(serve, tmp_path)
    quiet = site.refresh("quiet")
    site.kind, site.down_for = kind, 2.0
    site.server.requests.clear()
    disturbed = site.refresh("disturbed")
    assert disturbed.samples == 60 and disturbed.digest == quiet.digest
    assert len(site.server.requests) >= 60 + 6
    for path in sorted((tmp_path / "quiet").glob("*.tar")):
        assert (tmp_path / "disturbed" / path.name).read_bytes() == path.read_bytes()


def coloured(number: int) -> bytes:
    """A small JPEG."""
    pixels = np.random.default_rng(number).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    encoded: bytes = simplejpeg.encode_jpeg(pixels)
    return encoded


# A disk that fills up


def run_smoke(out: Path, most: int | None) -> subprocess.CompletedProcess[str]:
    """The smoke job; files may grow to ``most`` bytes, as on a disk with that much left."""

    def limit() -> None:
        if most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    command = [sys.executable, str(ROOT / "jobs" / "refresh_dataset.py"), "smoke", "--output-folder", str(out)]
    path = os.pathsep.join(part for part in [str(ROOT), *sys.path] if part)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [*command, "--number-sample-per-shard", "20"],
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=limit,
        check=False,
    )


def test_a_disk_that_fills_up_stops_the_job_and_loses_nothing(tmp_path: Path) -> None:
    options = ShardOptions(
        media=MediaOptions(image=ImageOptions(resize_mode="no", skip_reencode=True)), number_sample_per_shard=20
    )
    refresh(Drawn(samples=64, size=64), Folder(tmp_path / "whole"), options, Workers(processes_count=0))
    tars = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.tar")}
    assert len(tars) == 4
    stopped = run_smoke(tmp_path / "out", max(map(len, tars.values())) // 2)
    assert stopped.returncode == 1
    sentence = stopped.stderr.strip().splitlines()[-1]
    assert "cannot write" in sentence and sentence.endswith("fix this and run the same command again")
    assert "Traceback" not in stopped.stderr
    left = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert not any(name.startswith(".tmp") for name in left), left
    again = run_smoke(tmp_path / "out", None)
    assert again.returncode == 0, again.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")} == tars


@pytest.mark.parametrize("number", [28, 122, 27])  # ENOSPC, EDQUOT, EFBIG
def test_a_full_disk_says_what_to_do(number: int) -> None:
    with pytest.raises(StorageError, match=r"cannot write /a/b: the (disk|file) is .* run the same command again"):
        with storage_errors("/a/b"):
            raise OSError(number, "whatever the system says")
