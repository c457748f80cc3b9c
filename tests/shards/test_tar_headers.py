"""Tar headers compared with tarfile, GNU tar and webdataset, also with random corruption."""

import io
import mmap
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset

from pipeline.errors import DataError
from pipeline.shards.tar import TarShard, iterate_tar
from pipeline.shards.tar_headers import RECORD, Member, read_headers

LONG = "folder/" * 30 + "n" * 120 + ".txt"
FILES = {
    "a.jpg": b"\xff\xd8" * 700,
    "a.txt": "café".encode(),
    "empty.txt": b"",
    "deep/er/b.json": b"{}",
    "p" * 90 + "/" + "q" * 90 + ".txt": b"prefix and name",
    "naïve/ünï.txt": b"odd characters",
    "block.txt": b"x" * 512,
}
READ_FIELDS = [*range(0, 100), *range(124, 136), 156, *range(345, 500)]


def archive(files: dict[str, bytes], style: int, **options: object) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=style, **options) as tar:  # type: ignore[call-overload]
        tar.addfile(named("folder", tarfile.DIRTYPE))
        for name, content in files.items():
            member = named(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def named(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mtime = kind, 1.5
    return member


def our_view(content: bytes, path: Path) -> list[Member]:
    path.write_bytes(content)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return list(read_headers(mapped, "x.tar"))


def tarfiles_view(content: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


def summed(content: bytearray, header: int) -> None:
    """Make the checksum of the header right."""
    content[header + 148 : header + 156] = b" " * 8
    content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + RECORD])


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tarfiles_formats(style: int, tmp_path: Path) -> None:
    files = FILES if style == tarfile.USTAR_FORMAT else {**FILES, LONG: b"a long name"}
    content = archive(files, style)
    view = our_view(content, tmp_path / "x.tar")
    assert view == tarfiles_view(content)
    assert {path: content[start : start + size] for path, start, size in view} == files
    shard = TarShard(tmp_path / "x.tar")
    assert [shard[index] for index in range(len(shard))] == list(iterate_tar(io.BytesIO(content)))


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs a tar program")
@pytest.mark.parametrize("style", ["v7", "ustar", "gnu", "oldgnu", "pax"])
def test_the_tar_programs_formats(style: str, tmp_path: Path) -> None:
    files = {name: content for name, content in FILES.items() if len(name) < 100}
    files |= {LONG: b"a long name"} if style not in ("v7", "ustar") else {}
    for name, content in files.items():
        place = tmp_path / "in" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    made = tmp_path / "made.tar"
    subprocess.run(
        ["tar", "-C", tmp_path / "in", f"--format={style}", "-cf", made, "--no-recursion", "deep", *files], check=True
    )
    content = made.read_bytes()
    assert our_view(content, tmp_path / "x.tar") == tarfiles_view(content)
    assert {path for path, _, _ in our_view(content, tmp_path / "x.tar")} == set(files)


def test_webdatasets_writer_and_img2datasets_layout(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    samples = [{"__key__": f"{n:09d}", "jpg": b"\xff\xd8" * n, "txt": f"text {n}", "json": {"n": n}} for n in range(9)]
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    shard = TarShard(path)
    assert shard.keys == [sample["__key__"] for sample in samples]
    assert [shard[n].fields["txt"] for n in range(9)] == [f"text {n}".encode() for n in range(9)]
    assert our_view(path.read_bytes(), path) == tarfiles_view(path.read_bytes())


def test_sizes_in_base_256_and_in_pax_headers(tmp_path: Path) -> None:
    content = bytearray(archive({"a.txt": b"abc", "b.txt": b"d"}, tarfile.GNU_FORMAT))
    header = content.index(b"a.txt\0")
    content[header + 124 : header + 136] = b"\x80" + (3).to_bytes(11, "big")
    summed(content, header)
    assert our_view(bytes(content), tmp_path / "x.tar") == tarfiles_view(bytes(content))
    large = io.BytesIO()
    with tarfile.open(fileobj=large, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = named("a.txt")
        member.size, member.pax_headers = 3, {"size": "3", "path": "other.txt"}
        tar.addfile(member, io.BytesIO(b"abc"))
    assert our_view(large.getvalue(), tmp_path / "x.tar") == tarfiles_view(large.getvalue())
    assert our_view(large.getvalue(), tmp_path / "x.tar")[0][0] == "other.txt"


def pax(**records: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = named("a.txt")
        member.size = 3
        member.pax_headers = {key.replace("_", "."): value for key, value in records.items()}
        tar.addfile(member, io.BytesIO(b"abc"))
    return file.getvalue()


def changed(place: int, value: bytes, right_sum: bool = True) -> bytes:
    """A tar whose first header has ``value`` at ``place``."""
    content = bytearray(archive({"a.txt": b"abc", "b.txt": b"d"}, tarfile.USTAR_FORMAT)[RECORD:])
    content[place : place + len(value)] = value
    if right_sum:
        summed(content, 0)
    return bytes(content)


def twice_named() -> bytes:
    """A tar whose member has two headers with its long name."""
    content = archive({LONG: b"abc"}, tarfile.GNU_FORMAT)[RECORD:]
    return content[: 2 * RECORD] + content


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(changed(124, b"-0000000003\0"), id="negative size"),
        pytest.param(changed(124, b"\xff" * 12), id="negative size in base 256"),
        pytest.param(changed(124, b"\x80" + b"\xff" * 11), id="size beyond every file"),
        pytest.param(changed(124, b"77777777777\0"), id="size beyond this file"),
        pytest.param(changed(124, b"0000000_003\0"), id="size with an underscore"),
        pytest.param(changed(124, b"00000000009\0"), id="size with a nine"),
        pytest.param(changed(148, b"0000000\0", right_sum=False), id="wrong checksum"),
        pytest.param(changed(148, b"zzzzzzz\0", right_sum=False), id="no checksum"),
        pytest.param(changed(156, b"S"), id="sparse file"),
        pytest.param(changed(156, b"2"), id="link"),
        pytest.param(changed(156, b"?"), id="unknown kind"),
        pytest.param(twice_named(), id="two long names for one member"),
        pytest.param(changed(156, b"x"), id="pax header that is none"),
        pytest.param(changed(345, b".."), id="parent folder in the prefix"),
        pytest.param(pax(path="../up.txt"), id="pax parent folder"),
        pytest.param(pax(path="/etc/passwd.txt"), id="pax absolute"),
        pytest.param(pax(path="a\0b.txt"), id="pax zero byte"),
        pytest.param(pax(size="-3"), id="pax negative size"),
        pytest.param(pax(size="9" * 5000), id="pax long size"),
        pytest.param(pax(size="99999999"), id="pax size beyond the file"),
        pytest.param(pax(GNU_sparse_major="1"), id="pax sparse"),
        pytest.param(pax(comment="x" * (2 << 20)), id="endless pax header"),
        pytest.param(archive({"a.txt": b""}, tarfile.PAX_FORMAT, pax_headers={"path": "b.txt"}), id="global path"),
    ],
)
def test_hostile_headers_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.tar"):
        TarShard(path)


def test_harmless_global_headers_are_read_over(tmp_path: Path) -> None:
    content = archive({"a.txt": b"abc"}, tarfile.PAX_FORMAT, pax_headers={"comment": "made by an archiver"})
    assert our_view(content, tmp_path / "x.tar") == tarfiles_view(content)


def test_a_spoilt_header_does_not_end_a_stream_early() -> None:
    """Tarfile alone would take it for the end of the archive and leave out the rest without a word."""
    content = bytearray(archive({"a.txt": b"abc", "b.txt": b"d", "c.txt": b"e"}, tarfile.USTAR_FORMAT))
    content[content.index(b"b.txt\0") + 150] ^= 1
    with pytest.raises(DataError, match="spoilt header"):
        list(iterate_tar(io.BytesIO(bytes(content))))


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_random_bytes_give_tarfiles_view_or_an_error(style: int, tmp_path: Path) -> None:
    """Bytes anywhere are changed; in half of the trials bytes of one header are, and its checksum is made right."""
    generator = random.Random(style)
    files = FILES if style == tarfile.USTAR_FORMAT else {**FILES, LONG: b"a long name"}
    whole = archive(files, style)
    headers = [start - RECORD for _, start, _ in tarfiles_view(whole)]
    accepted = 0
    for trial in range(300):
        content = bytearray(whole)
        header = generator.choice(headers)
        for _ in range(generator.randint(1, 3)):
            place = header + generator.choice(READ_FIELDS) if trial % 2 else generator.randrange(len(content))
            content[place] = generator.choice([0, 32, 47, 48, 55, 128, 255, generator.randrange(256)])
        if trial % 2:
            summed(content, header)
        try:
            ours = our_view(bytes(content), tmp_path / "x.tar")
        except DataError:
            continue
        assert ours == tarfiles_view(bytes(content)), trial
        accepted += 1
    assert accepted > 30


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    content = archive(FILES, tarfile.PAX_FORMAT)
    end = len(content.rstrip(b"\0"))
    for length in [*range(1, end, 97), *range(RECORD, end, RECORD)]:
        with pytest.raises(DataError):
            our_view(content[:length], tmp_path / "x.tar")
