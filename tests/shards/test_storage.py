"""Folders: whole-file reads and atomic writes, on disk and in an object store."""

import errno
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ConnectTimeoutError, EndpointConnectionError, NoCredentialsError

from pipeline.errors import ReadError, StorageError
from pipeline.shards.storage import Folder, file_digest


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(tmp_path / "a" if request.param == "disk" else f"memory://{tmp_path.name}/a")


def test_what_is_written_is_read(folder: Folder, tmp_path: Path) -> None:
    assert folder.names() == [] and not folder.exists("x.txt")
    folder.write_atomic("x.txt", "café".encode())
    source = tmp_path / "source"
    source.write_bytes(b"moved")
    folder.write_atomic("y.bin", source)
    folder.folder("inner").write_atomic("z.txt", b"z")
    assert folder.read_text("x.txt") == "café" and folder.size("y.bin") == 5 and not source.exists()
    assert folder.names() == ["x.txt", "y.bin"] and folder.names(".bin") == ["y.bin"]
    with folder.open("y.bin") as file:
        assert file.read() == b"moved"
    folder.delete("x.txt")
    folder.delete("x.txt")
    assert folder.names() == ["y.bin"]


def test_a_missing_file_is_said_so(folder: Folder) -> None:
    for read in (folder.read_bytes, folder.size, folder.open):
        with pytest.raises(FileNotFoundError):
            read("missing")


def test_a_folder_pickles(folder: Folder) -> None:
    assert pickle.loads(pickle.dumps(folder)).uri == folder.uri


def test_a_relative_path_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Folder("data")
    monkeypatch.chdir("/")
    folder.write_atomic("x", b"x")
    assert (tmp_path / "data" / "x").exists()


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(step: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write_atomic("x", b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "write":
        monkeypatch.setattr("os.fdopen", full)
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(StorageError, match="disk is full"):
        folder.write_atomic("x", b"new")
    monkeypatch.undo()
    assert folder.read_bytes("x") == b"old" and folder.names() == ["x"]


def test_scratch_files_vanish_and_are_never_listed(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "out")
    with folder.scratch_file(".tar") as path:
        path.write_bytes(b"half")
        assert folder.names() == [] and path.parent == tmp_path / "out"
    assert not path.exists()
    (tmp_path / "out" / ".tmp-left-by-a-killed-writer").write_bytes(b"half")
    folder.remove_temporary()
    assert list((tmp_path / "out").iterdir()) == []


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert file_digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NoCredentialsError(), "no credentials for this store"),
        (EndpointConnectionError(endpoint_url="http://127.0.0.1:1/b"), "no connection, or it was refused"),
        (ConnectTimeoutError(endpoint_url="http://127.0.0.1:1/b"), "no answer in time"),
        (PermissionError("Forbidden"), "access denied"),
        (OSError("something else"), "something else"),
    ],
)
def test_a_store_that_refuses_is_one_sentence(
    error: Exception, reason: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_atomic("x.txt", b"x")

    def refused(*_: object, **__: object) -> None:
        raise error

    for name in ("ls", "exists", "size", "info", "open", "cat_file", "find", "isdir"):
        monkeypatch.setattr(folder.fs, name, refused)
    reads = [lambda: folder.exists("x.txt"), lambda: folder.info("x.txt"), lambda: folder.size("x.txt")]
    reads += [lambda: folder.open("x.txt"), lambda: folder.read_bytes("x.txt")]
    for read in (*reads, folder.names, folder.find, folder.kind):
        with pytest.raises(ReadError) as caught:
            read()
        sentence = str(caught.value)
        assert sentence.startswith(f"cannot read {folder.uri}") and reason in sentence
        assert isinstance(caught.value, OSError) and isinstance(caught.value, StorageError)


def test_other_errors_are_not_blamed_on_the_store(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(folder.fs, "cat_file", wrong)
    with pytest.raises(ZeroDivisionError):
        folder.read_bytes("x")


def test_files_below_a_folder_are_found_without_the_marks_of_consoles(s3: str) -> None:
    folder = Folder(f"{s3}/a")
    folder.fs.pipe_file(f"{folder.path}/", b"")
    folder.write_atomic("b #1.txt", b"x")
    folder.write_atomic("c/d.txt", b"x")
    assert list(folder.find()) == ["b #1.txt", "c/d.txt"] and list(folder.find(depth=1)) == ["b #1.txt"]
    assert folder.kind() == "directory" and Folder(f"{s3}/a/c/d.txt").kind() == "file"
    assert Folder(f"{s3}/no").kind() is None and Folder("s3://no-such-bucket-here/x").kind() is None


def test_an_object_is_found_where_lists_are_refused(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in public buckets: GET and HEAD of an object are allowed, ListBucket is not."""
    Folder(s3).write_atomic("a/one.tar", b"whole")
    place = Folder(f"{s3}/a/one.tar")

    answer = type(place.fs)._call_s3

    async def without_lists(fs: Any, method: str, *words: Any, **more: Any) -> Any:
        if method.startswith("list_objects"):
            raise PermissionError("Access Denied")
        return await answer(fs, method, *words, **more)

    async def refused(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(place.fs), "_call_s3", without_lists)
    monkeypatch.setattr(type(place.fs), "_lsdir", refused)
    assert place.kind() == "file" and Folder(f"{s3}/a").read_bytes("one.tar") == b"whole"
    with pytest.raises(ReadError, match=f"cannot read {s3}/a: access denied"):
        Folder(f"{s3}/a").kind()


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("gs://bucket/x", 'needs another package: pip install "clipmill[gcs]"'),
        ("az://bucket/x", 'needs another package: pip install "clipmill[azure]"'),
        ("foo://bucket/x", "unknown scheme foo://; a path, s3://"),
        ("ftp://127.0.0.1:1/x", "this store cannot be opened ([Errno 111] Connection refused); a path, s3://"),
        ("zip://x.zip", "this store cannot be opened ([Errno 21] Is a directory: '"),
        ("github://x/y", "github:// needs settings that a path does not have; a path, s3://"),
    ],
)
def test_a_store_that_cannot_be_reached_from_here(uri: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence; the packages are those that fsspec itself asks for."""
    for package in ("gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(StorageError, match=re.escape(said)):
        Folder(uri)


def test_a_kind_of_store_without_lists_is_one_sentence() -> None:
    with pytest.raises(ReadError, match="cannot read data://x: its kind of store cannot list or read that"):
        Folder("data://x").names()


def test_the_hub_offline_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for read in (Folder("hf://datasets/none/none").names, Folder("hf://datasets/none/none").kind):
        with pytest.raises(ReadError, match="cannot read hf://datasets/none/none: no connection.* offline mode"):
            read()


def test_a_file_has_no_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("a")
    assert Folder(tmp_path / "list.csv" / "below").names() == []
