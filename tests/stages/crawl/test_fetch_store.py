"""Urls of stores and local files: allowed ones are read, all others are rejected, and the limits apply."""

import hashlib
import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.errors import SampleError, SettingError
from pipeline.stages.crawl.download import Download, DownloadOptions, KnownBody, download_all

JPEG = b"\xff\xd8\xff" + bytes(range(250)) * 8


def fetch(url: str, known: KnownBody | None = None, **changes: Any) -> Download | SampleError:
    ((_, outcome),) = download_all([(0, url, known or KnownBody())], DownloadOptions(**{"timeout": 20.0, **changes}))
    return outcome


def failure(url: str, **changes: Any) -> SampleError:
    outcome = fetch(url, **changes)
    assert isinstance(outcome, SampleError), outcome
    return outcome


# Local files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "in ner").mkdir(parents=True)
    (folder / "in ner" / "a.jpg").write_bytes(JPEG)
    (folder / "link.jpg").symlink_to(folder / "in ner" / "a.jpg")
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "secret.jpg").write_bytes(JPEG)
    (folder / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "outer").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "zero").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    (folder / "empty").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    "url",
    [
        "file://{}/in%20ner/a.jpg",
        "file://localhost{}/in%20ner/a.jpg",
        "{}/in ner/a.jpg",
        "in ner/a.jpg",
        "FILE://{}/link.jpg",
    ],
)
def test_files_below_the_root_are_read(root: Path, url: str) -> None:
    got = fetch(url.format(root), allow_local_root=str(root))
    assert isinstance(got, Download), got
    assert got.body == JPEG and got.digest == hashlib.sha256(JPEG).hexdigest() and got.etag


def test_a_root_may_itself_be_a_link(root: Path) -> None:
    (root.parent / "alias").symlink_to(root)
    got = fetch(f"file://{root.parent}/alias/in%20ner/a.jpg", allow_local_root=str(root.parent / "alias"))
    assert isinstance(got, Download)


@pytest.mark.parametrize(
    "path",
    [
        "{}/../secret.jpg",
        "{}/in ner/../../secret.jpg",
        "../secret.jpg",
        "{}/out.jpg",
        "{}/outer/secret.jpg",
        "{}2/secret.jpg",
        "{}/zero",
        "../no-such-file.jpg",
        "{}/pipe",
        "{}/in ner",
        "{}/loop",
        "/etc/passwd",
        "file:///etc/passwd",
        "file://{}/%2e%2e/secret.jpg",
        "file://{}/..%2fsecret.jpg",
        "a\0b",
    ],
)
def test_nothing_leads_out_of_the_root(root: Path, path: str) -> None:
    error = failure(path.format(root), allow_local_root=str(root))
    assert (error.status, error.error_class) == ("failed_to_download", "policy")
    assert "secret" not in error.message


def test_local_files_have_the_same_caps_and_classes(root: Path) -> None:
    opened = {"allow_local_root": str(root)}
    assert failure(f"{root}/none.jpg", **opened).error_class == "missing"
    assert failure(f"{root}/empty", **opened).error_class == "empty"
    assert failure(f"{root}/link.jpg", **opened, max_bytes=100).error_class == "too_large"
    (root / "page.html").write_bytes(b"<html>not an image at all</html>")
    assert failure("page.html", **opened).error_class == "not_a_picture"
    wrong = fetch("link.jpg", KnownBody(expected="md5:00"), **opened)
    assert isinstance(wrong, SampleError) and wrong.message == "hash mismatch"


def test_without_a_root_no_file_is_read(root: Path) -> None:
    assert failure(f"file://{root}/link.jpg").error_class == "policy"
    assert failure(f"{root}/link.jpg").error_class == "bad_url"
    assert failure(f"file://{root}/link.jpg", allow_stores=("memory",)).error_class == "policy"


# Stores


@pytest.fixture
def memory() -> str:
    name = f"bucket{uuid.uuid4().hex[:8]}"
    fs = fsspec.filesystem("memory")
    for path, body in {"open/a.jpg": JPEG, "closed/a.jpg": JPEG, "opener/a.jpg": JPEG, "open/none": b""}.items():
        fs.pipe_file(f"{name}/{path}", body)
    return f"memory://{name}"


def test_a_store_is_read_below_what_was_opened(memory: str) -> None:
    for opened in ("memory", "memory://", memory, memory + "/open", memory + "/open/"):
        got = fetch(memory + "/open/a.jpg", allow_stores=(opened,))
        assert isinstance(got, Download) and got.body == JPEG, opened


@pytest.mark.parametrize(
    ("path", "error_class"),
    [
        ("/closed/a.jpg", "policy"),
        ("/opener/a.jpg", "policy"),
        ("/open/../closed/a.jpg", "bad_url"),
        ("/open/none", "empty"),
        ("/open/missing.jpg", "http_4xx"),
        ("/open", "http_4xx"),
        ("", "bad_url"),
        ("/", "bad_url"),
    ],
)
def test_the_rest_of_a_store_is_closed(memory: str, path: str, error_class: str) -> None:
    assert failure(memory + path, allow_stores=(memory + "/open",)).error_class == error_class


def test_chains_and_other_schemes_stay_closed(memory: str) -> None:
    opened = {"allow_stores": ("memory",)}
    assert failure(f"simplecache::{memory}/open/a.jpg", **opened).error_class in ("bad_url", "policy")
    assert failure(f"{memory}/x::memory://y/a.jpg", **opened).error_class == "bad_url"
    assert failure("memory://user@bucket/a.jpg", **opened).error_class == "bad_url"
    assert failure("s3://bucket/a.jpg", **opened).error_class == "policy"
    assert failure(memory + "/open/a.jpg").error_class == "policy"


def test_a_store_has_the_same_caps(memory: str) -> None:
    assert failure(memory + "/open/a.jpg", allow_stores=("memory",), max_bytes=10).error_class == "too_large"


def test_s3_gives_bodies_validators_and_statuses(s3: str) -> None:
    fs = fsspec.filesystem("s3")
    fs.pipe_file(f"{s3}/a b/ü.jpg", JPEG)
    got = fetch(f"{s3}/a b/ü.jpg", allow_stores=("s3",), compute_hash="md5")
    assert isinstance(got, Download), got
    assert got.body == JPEG and got.digest == hashlib.md5(JPEG).hexdigest()
    # S3's ETag of a whole put is the MD5 of the body.
    assert got.etag == f'"{got.digest}"' and got.last_modified
    again = fetch(f"{s3}/a b/ü.jpg", KnownBody(etag=got.etag), allow_stores=("s3",))
    assert isinstance(again, Download) and again.not_modified and again.body == b""
    missing = failure(f"{s3}/none.jpg", allow_stores=("s3",))
    assert (missing.error_class, missing.http_status) == ("http_4xx", 404)
    assert failure("s3://no-such-bucket-here/a.jpg", allow_stores=("s3",)).http_status in (403, 404)
    assert failure(f"{s3}/a b/ü.jpg", allow_stores=("s3://other",)).error_class == "policy"


class Broken(Exception):
    pass


@pytest.mark.parametrize(
    ("raised", "error_class", "passing"),
    [
        (TimeoutError(), "timeout", True),
        (ConnectionResetError(), "reset", True),
        (PermissionError("no"), "http_4xx", False),
        (Broken("what"), "store", True),
        (type("EndpointConnectionError", (Exception,), {})(), "connect", True),
        (type("ReadTimeoutError", (Exception,), {})(), "timeout", True),
        (type("NoCredentialsError", (Exception,), {})(), "http_4xx", False),
        (type("E", (OSError,), {"response": {"ResponseMetadata": {"HTTPStatusCode": 503}}})(), "http_5xx", True),
    ],
)
def test_errors_of_stores_become_classes(
    memory: str, raised: Exception, error_class: str, passing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fail(self: Any, path: str, **_: Any) -> Any:
        calls.append(path)
        raise raised

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", fail)
    error = failure(memory + "/open/a.jpg", allow_stores=("memory",), retries=2, retry_delay=0.0)
    assert error.error_class == error_class
    assert len(calls) == error.attempts == (3 if passing else 1)


@pytest.mark.parametrize("entry", ["", "file", "http", "https://a.test", "sftp://host", "nosuch", "simplecache::s3"])
def test_only_stores_can_be_opened(entry: str) -> None:
    with pytest.raises(SettingError, match="allow_stores"):
        DownloadOptions(allow_stores=(entry,))


# Google's store


@pytest.fixture
def google(serve: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server with the answers of Google's store that a read asks for; every object has an ETag."""
    core = pytest.importorskip("gcsfs", reason="not a dependency: it brings gRPC").core
    name = "images/a.jpg"
    about = {"kind": "storage#object", "bucket": "bucket", "name": name, "size": str(len(JPEG)), "etag": "CJ4="}
    about |= {"updated": "2026-11-01T00:00:00.000Z", "contentType": "image/jpeg"}
    item = "bucket/o/images%2Fa.jpg"
    server = serve(
        {
            f"storage/v1/b/{item}?": serve.Reply(
                json.dumps(about).encode(), headers={"Content-Type": "application/json"}
            ),
            f"storage/v1/b/{item}": serve.Reply(
                json.dumps(about).encode(), headers={"Content-Type": "application/json"}
            ),
            f"download/storage/v1/b/{item}?alt=media": JPEG,
        }
    )
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    monkeypatch.setitem(
        sys.modules["fsspec.registry"]._registry, "gs", core.GCSFileSystem
    )  # without its gRPC probe of the bucket
    core.GCSFileSystem.clear_instance_cache()
    yield server
    core.GCSFileSystem.clear_instance_cache()


def test_googles_store_is_read(google: Any) -> None:
    outcome = fetch("gs://bucket/images/a.jpg", allow_stores=("gs://bucket/images",))
    assert isinstance(outcome, Download), outcome
    assert outcome.body == JPEG and outcome.etag == "CJ4="
    again = fetch("gs://bucket/images/a.jpg", KnownBody(etag="CJ4="), allow_stores=("gs",))
    assert isinstance(again, Download) and again.not_modified
    assert failure("gs://bucket/images/b.jpg", allow_stores=("gs",)).error_class in ("missing", "http_4xx")
    assert failure("gs://other/a.jpg", allow_stores=("gs://bucket",)).error_class == "policy"


def test_a_store_whose_package_is_missing_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str) -> Any:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(SettingError, match="allow_stores: 'gs'.*Please install gcsfs"):
        DownloadOptions(allow_stores=("gs",))
