"""Tars: deterministic bytes, readable by webdataset, hostile ones rejected."""

import io
import tarfile
from pathlib import Path

import pytest
import webdataset

from pipeline.errors import DataError
from pipeline.shards.sample import Sample, sample_key
from pipeline.shards.tar import TarShard, TarWriter, iterate_tar

SAMPLES = [
    Sample("000000000", {"jpg": b"\xff\xd8 image", "txt": "café 🐈".encode(), "json": b"{}"}),
    Sample("000000003", {"boxes.json": b"[]", "jpg": b"x" * 5000}),
]


def packed(samples: list[Sample]) -> bytes:
    file = io.BytesIO()
    writer = TarWriter(file)
    for sample in samples:
        writer.write(sample)
    writer.close()
    return file.getvalue()


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def read_with_webdataset(path: Path) -> list[dict[str, bytes]]:
    with open(path, "rb") as file:
        return list(
            webdataset.tariterators.group_by_keys(
                webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
            )
        )


def named(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = "/etc/passwd"
    return member


def test_same_samples_give_same_bytes_whatever_the_order_of_fields() -> None:
    turned = [Sample(one.key, dict(reversed(one.fields.items()))) for one in SAMPLES]
    assert packed(SAMPLES) == packed(turned)


@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_bytes_are_those_of_tarfile(count: int) -> None:
    keys = ["000000001", "größe/ö" * 3, "a" * 95 + "/" + "b" * 60, "\udcff"]
    samples = [Sample(f"{keys[one % 4]}{one}", {"jpg": b"x" * (one * 137), "txt": b""}) for one in range(count)]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for field, content in sample.fields.items():
                member = tarfile.TarInfo(f"{sample.key}.{field}")
                member.size, member.mode, member.uname, member.gname = len(content), 0o444, "clipmill", "clipmill"
                tar.addfile(member, io.BytesIO(content))
    assert packed(samples) == file.getvalue()


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    path.write_bytes(packed(SAMPLES))
    read = read_with_webdataset(path)
    assert [one["__key__"] for one in read] == [one.key for one in SAMPLES]
    assert [{k: v for k, v in one.items() if not k.startswith("__")} for one in read] == [s.fields for s in SAMPLES]


def test_iterating_and_random_access_give_back_the_samples(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    path.write_bytes(packed(SAMPLES))
    assert list(iterate_tar(io.BytesIO(packed(SAMPLES)))) == SAMPLES
    shard = TarShard(path)
    assert len(shard) == 2 and shard.keys == [one.key for one in SAMPLES]
    assert [shard[1], shard[0]] == [SAMPLES[1], SAMPLES[0]]
    assert shard.field_names(1) == ("boxes.json", "jpg")


def test_keys_and_fields_are_webdatasets(tmp_path: Path) -> None:
    """Compared with the webdataset library on names with folders, several dots, upper case and metadata."""
    content = archive(
        *[
            (named(name), name.encode())
            for name in ("a/b.c/x.JPG", "a/b.c/x.seg.png", "y.txt", "__meta__.json", "__m__/a.json", "nodot")
        ]
    )
    path = tmp_path / "odd.tar"
    path.write_bytes(content)
    ours = [{"__key__": one.key, **one.fields} for one in iterate_tar(io.BytesIO(content))]
    theirs = read_with_webdataset(path)
    assert ours == [{k: v for k, v in one.items() if k not in ("__url__", "__local_path__")} for one in theirs]


@pytest.mark.parametrize(
    "member",
    [
        named("/etc/passwd.txt"),
        named("../up.txt"),
        named("a/../../up.txt"),
        named("link.txt", tarfile.SYMTYPE),
        named("hard.txt", tarfile.LNKTYPE),
        named("device.txt", tarfile.CHRTYPE),
        named("pipe.txt", tarfile.FIFOTYPE),
        named("a\\b.txt"),
    ],
    ids=lambda member: member.name,
)
def test_hostile_members_are_refused(member: tarfile.TarInfo, tmp_path: Path) -> None:
    content = archive((member, b""))
    path = tmp_path / "bad.tar"
    path.write_bytes(content)
    with pytest.raises(DataError):
        list(iterate_tar(io.BytesIO(content)))
    with pytest.raises(DataError):
        TarShard(path)


def test_members_of_one_key_must_be_together_and_distinct(tmp_path: Path) -> None:
    for names in (("a.jpg", "b.jpg", "a.txt"), ("a.jpg", "a.jpg"), ("a.JPG", "a.jpg")):
        content = archive(*[(named(name), b"x") for name in names])
        path = tmp_path / "bad.tar"
        path.write_bytes(content)
        with pytest.raises(DataError, match="together|two members"):
            list(iterate_tar(io.BytesIO(content)))
        with pytest.raises(DataError, match="together|two members"):
            TarShard(path)


@pytest.mark.parametrize("length", [0, 100, 700, 1500, 4000])
def test_cut_off_tars_are_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    path.write_bytes(packed(SAMPLES)[:length])
    with pytest.raises(DataError):
        list(iterate_tar(io.BytesIO(path.read_bytes())))
    with pytest.raises(DataError):
        TarShard(path)


def test_keys_are_numbered_as_img2dataset_numbers_them() -> None:
    assert sample_key(0, 0, 10_000) == "000000000"
    assert sample_key(12, 345, 10_000) == "000120345"
    assert sample_key(3, 4, 1_000) == "00003004"
    assert sample_key(3, 0, 1) == "00003"
    assert sample_key(100_000, 1, 10_000) == "1000000001"
