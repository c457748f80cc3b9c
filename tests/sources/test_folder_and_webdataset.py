"""Rows of image folders and existing tars; unreadable files are rows with a problem."""

import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import SettingError
from pipeline.loaders.samples import Samples, json_of_sample
from pipeline.shards.sample import Sample
from pipeline.shards.storage import Folder
from pipeline.shards.tar import TarShard, TarWriter
from pipeline.sources import open_source
from pipeline.sources.folder import ImageFolder
from pipeline.sources.source import Row, Source
from pipeline.sources.webdataset import WebDatasetTars
from pipeline.stages.refresh.make_shard import AS_IT_IS
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers


def read(source: Source, scratch: Path, rows: int = 2) -> list[Row]:
    return [row for piece in source.slices(rows, Folder(scratch)) for row in source.rows(piece)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name, content in {
        "cats/tom.jpg": b"tom",
        "cats/tom.txt": "  a café cat\n".encode(),
        "dogs/rex.PNG": b"rex",
        "dogs/deep/fido.webp": b"fido",
        "top.gif": b"top",
        "notes.md": b"not an image",
    }.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    return tmp_path / "in"


def test_a_folder_gives_its_images_captions_and_labels(images: Path, tmp_path: Path) -> None:
    rows = read(ImageFolder(folder=str(images)), tmp_path / "scratch")
    assert [(row.url, row.caption, row.body("image"), row.columns["label"]) for row in rows] == [
        ("cats/tom.jpg", "a café cat", b"tom", "cats"),
        ("dogs/deep/fido.webp", "", b"fido", "dogs"),
        ("dogs/rex.PNG", "", b"rex", "dogs"),
        ("top.gif", "", b"top", ""),
    ]


def test_every_kind_of_image_is_a_row_and_other_files_are_counted(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.AVIF", "b.jp2", "c.jpe", "d.ppm", "e.svg", "f.SVG"):
        (images / name).write_bytes(b"x")
    rows = read(ImageFolder(folder=str(images)), tmp_path / "scratch", 20)
    assert {"a.AVIF", "b.jp2", "c.jpe", "d.ppm"} < {row.url for row in rows} and len(rows) == 8
    (message,) = caplog.messages
    assert "3 files are left out" in message and "2 .svg" in message and "1 .md" in message


def test_captions_beside_images_in_any_case_and_encoding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, content in {
        "a.JPG": b"1",
        "a.TXT": "\ufeffone".encode(),
        "b.jpg": b"2",
        "b.txt": "two".encode("utf-16"),
    }.items():
        (folder / name).write_bytes(content)
    rows = read(ImageFolder(folder=str(folder)), tmp_path / "scratch")
    assert [row.caption for row in rows] == ["one", "two"] and not caplog.messages
    rows = read(ImageFolder(folder=str(folder), caption_suffix=".caption"), tmp_path / "scratch")
    assert [row.caption for row in rows] == ["", ""]
    assert any("--caption-suffix could be .TXT or .txt" in message for message in caplog.messages)


def test_names_that_are_not_utf_8_are_read(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "in")
    os.makedirs(folder + b"/ca\xf1on")
    for name, content in ((b"/ca\xf1on/a.jpg", image_of("JPEG")), (b"/ca\xf1on/a.txt", b"text")):
        with open(folder + name, "wb") as file:
            file.write(content)
    snapshot = refresh(
        ImageFolder(folder=str(tmp_path / "in")), Folder(tmp_path / "out"), AS_IT_IS, Workers(processes_count=0)
    )
    sample = Samples(snapshot)[0]
    assert json_of_sample(sample)["label"] == "ca?on" and sample.fields["txt"] == b"text"


def test_an_image_that_vanished_is_a_row_with_a_problem(images: Path, tmp_path: Path) -> None:
    source = ImageFolder(folder=str(images))
    pieces = list(source.slices(10, Folder(tmp_path / "scratch")))
    (images / "top.gif").unlink()
    problems = [row.problem for row in source.rows(pieces[0])]
    assert problems[:3] == [None] * 3 and problems[3] is not None and problems[3].status == "failed_to_download"


def test_a_changed_image_changes_the_digest(images: Path, tmp_path: Path) -> None:
    source = ImageFolder(folder=str(images))
    before = [piece.digest for piece in source.slices(2, Folder(tmp_path / "scratch"))]
    (images / "top.gif").write_bytes(b"another")
    after = [piece.digest for piece in source.slices(2, Folder(tmp_path / "scratch"))]
    assert before[0] == after[0] and before[1] != after[1]


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(SettingError, match="folder"):
            list(ImageFolder(folder=str(place)).slices(2, Folder(tmp_path / "scratch")))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(3):
        with open(folder / f"{number:05d}.tar", "wb") as file:
            writer = TarWriter(file)
            for index in range(2):
                json = f'{{"url": "http://x/{number}/{index}", "score": {index}}}'.encode()
                fields = {"png": b"p%d" % index, "txt": b"text", "json": json, "boxes.json": b"[]"}
                writer.write(Sample(f"k{number}{index}", fields))
            writer.close()
    return folder


def test_tars_give_images_captions_columns_and_members(tars: Path, tmp_path: Path) -> None:
    rows = read(WebDatasetTars(tars=str(tars), json_columns=("score",)), tmp_path / "scratch")
    assert [row.url for row in rows] == [f"http://x/{number}/{index}" for number in range(3) for index in range(2)]
    assert {row.caption for row in rows} == {"text"} and [row.body("image") for row in rows] == [b"p0", b"p1"] * 3
    assert rows[1].columns == {"score": "1"} and rows[1].members == {"boxes.json": b"[]"}


def test_brace_ranges_and_joined_parts_name_tars(tars: Path, tmp_path: Path) -> None:
    rows = read(WebDatasetTars(tars=f"{tars}/{{00001..00002}}.tar::{tars}/00000.tar"), tmp_path / "scratch")
    assert [row.url[9] for row in rows] == list("112200")


def test_braces_expand_as_in_bash(tars: Path, tmp_path: Path) -> None:
    (tars / "a{1}.tar").write_bytes((tars / "00000.tar").read_bytes())
    for pattern, expected in {
        "0000{0,2}.tar": "0022",
        "0000{0..1}.tar": "0011",
        "{00001,0000{1,2}}.tar": "111122",
        "0{0,0}0{0..0}{1..2}.tar": "11221122",
        "a{1}.tar": "00",
    }.items():
        rows = read(WebDatasetTars(tars=f"{tars}/{pattern}"), tmp_path / "scratch")
        assert "".join(row.url[9] for row in rows) == expected, pattern
    with pytest.raises(SettingError, match="braces"):
        list(WebDatasetTars(tars=f"{tars}/{{0..1.tar").slices(2, Folder(tmp_path / "scratch")))


def tar_of(path: Path, *members: tuple[bytes, bytes]) -> WebDatasetTars:
    """By tarfile, with names in bytes as GNU tar writes them."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name.decode("latin-1"))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return WebDatasetTars(tars=str(path))


def test_text_that_is_not_utf_8_costs_no_tar(tmp_path: Path) -> None:
    source = tar_of(
        tmp_path / "x.tar",
        (b"a.jpg", b"1"),
        (b"a.json", b'{"url": "http://x/\\ud83d.jpg", "author": "cut \\ud83d", "kept": "\xff"}'),
        (b"caf\xe9.jpg", b"2"),
        (b"caf\xe9.txt", b"e"),
        (b"caf\xe8.jpg", b"3"),
    )
    rows = read(replace(source, json_columns=("author", "kept")), tmp_path / "scratch", 9)
    assert [row.url for row in rows] == ["http://x/?.jpg", "caf%E9", "caf%E8"]
    assert rows[0].columns == {"author": "cut ?", "kept": "\ufffd"} and rows[1].caption == "e"
    TarShard(tmp_path / "x.tar").close()


def test_captions_are_read_in_the_encoding_of_their_mark(tmp_path: Path) -> None:
    source = tar_of(
        tmp_path / "x.tar",
        (b"a.jpg", b"1"),
        (b"a.TXT", b"\xef\xbb\xbfwith a mark\r\n"),
        (b"b.jpg", b"2"),
        (b"b.txt", "in UTF-16".encode("utf-16")),
    )
    assert [row.caption for row in read(source, tmp_path / "scratch")] == ["with a mark", "in UTF-16"]


@pytest.mark.parametrize(
    ("members", "asked", "captions", "advice"),
    [
        ([(b"a.caption", b"one")], "caption", ["one"], "could be caption"),
        ([(b"a.json", b'{"caption": ["one", "two"]}')], "json:caption", ["one"], "could be json:caption"),
        ([(b"a.cls", b"3")], None, [None], "None stands for no captions"),
    ],
)
def test_captions_elsewhere_are_named(
    members: list[tuple[bytes, bytes]],
    asked: str | None,
    captions: list[str | None],
    advice: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = tar_of(tmp_path / "x.tar", (b"a.jpg", b"1"), *members)
    assert [row.caption for row in read(source, tmp_path / "scratch")] == [""]
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith(advice)
    assert [row.caption for row in read(replace(source, caption_field=asked), tmp_path / "scratch")] == captions
    assert len(caplog.messages) == 1


def test_one_caption_is_enough_for_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(tar_of(tmp_path / "x.tar", (b"a.jpg", b"1"), (b"b.jpg", b"2"), (b"b.txt", b"two")), tmp_path / "scratch")
    assert not caplog.messages


def test_a_key_with_a_dot_names_the_field_that_it_makes(tmp_path: Path) -> None:
    source = tar_of(tmp_path / "x.tar", (b"a.v1.jpg", b"1"), (b"a.v1.txt", b"text"))
    (row,) = read(source, tmp_path / "scratch")
    assert row.problem is not None and ".v1.jpg, .v1.txt" in row.problem.message
    assert "--image-field v1.jpg" in row.problem.message
    (row,) = read(replace(source, image_field="v1.jpg", caption_field="v1.txt"), tmp_path / "scratch")
    assert (row.body("image"), row.caption, row.members) == (b"1", "text", {})


def test_json_that_cannot_be_read_is_the_reason_of_its_row(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    source = tar_of(tmp_path / "x.tar", (b"a.jpg", b"1"), (b"a.json", deep), (b"b.jpg", b"2"), (b"b.json", b"{"))
    rows = read(source, tmp_path / "scratch")
    assert [row.problem and row.problem.error_class for row in rows] == ["malformed_row"] * 2
    assert rows[0].problem is not None and "nested" in rows[0].problem.message


def test_json_is_read_as_it_was_written_where_something_of_it_is_asked(tmp_path: Path) -> None:
    bodies = [b'{"caption": "x", "n": 0.10}', b"[1, 2]", b'{"caption": {"en": "x"}}']
    members = [
        (f"{n}.{kind}".encode(), some) for n, one in enumerate(bodies) for kind, some in (("jpg", b"1"), ("json", one))
    ]
    source = tar_of(tmp_path / "x.tar", *members)
    assert [row.problem for row in read(source, tmp_path / "plain", 3)] == [None] * 3
    rows = read(replace(source, caption_field="json:caption", json_columns=("n",)), tmp_path / "asked", 3)
    assert (rows[0].caption, rows[0].columns) == ("x", {"n": "0.10"})
    messages = [row.problem and row.problem.message for row in rows[1:]]
    assert messages == ["the member .json is no JSON object", "json:caption is an object, not a text"]


def test_other_kinds_of_images_count_and_other_members_stay(tmp_path: Path) -> None:
    source = tar_of(tmp_path / "x.tar", (b"a.tif", b"1"), (b"b.jpg", b"2"), (b"b.png", b"mask"))
    rows = read(source, tmp_path / "scratch")
    assert [(row.body("image"), row.members) for row in rows] == [(b"1", {}), (b"2", {"png": b"mask"})]


def test_an_unsorted_tar_says_how_to_sort(tmp_path: Path) -> None:
    source = tar_of(tmp_path / "x.tar", (b"a.jpg", b"1"), (b"b.jpg", b"2"), (b"a.txt", b"1"))
    with pytest.raises(SettingError, match="--sort=name"):
        read(source, tmp_path / "scratch")


@pytest.mark.parametrize("columns", [("sha256",), ("caption",), ("width",), ("key",), ("score", "score")])
def test_columns_with_the_shards_own_names_are_refused(columns: tuple[str, ...]) -> None:
    with pytest.raises(SettingError, match="json_columns"):
        WebDatasetTars(tars="x.tar", json_columns=columns)


def image_of(kind: str, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((32, 24), 90).convert(mode).save(stream, kind)
    return stream.getvalue()


def test_tars_are_stored_byte_for_byte(tmp_path: Path) -> None:
    deep = io.BytesIO()
    Image.fromarray(np.arange(768, dtype=np.uint16).reshape(24, 32) * 85).save(deep, "PNG")
    given = {"jpg": image_of("JPEG"), "png": image_of("PNG", "RGBA"), "webp": image_of("WEBP"), "gif": image_of("GIF")}
    bodies = [*given.items(), ("png", deep.getvalue()), ("jpg", image_of("PNG"))]
    members = [(f"{n}.{ending}".encode(), body) for n, (ending, body) in enumerate(bodies)]
    members += [(b"6.jpg", image_of("JPEG")[:200]), (b"7.jpg", image_of("WEBP")), (b"7.png", image_of("PNG"))]
    source = tar_of(tmp_path / "x.tar", *members)
    snapshot = refresh(source, Folder(tmp_path / "out"), AS_IT_IS, Workers(processes_count=0))
    stored = [Samples(snapshot)[number] for number in range(6)]
    assert [sample.image() for sample in stored] == [body for _, body in bodies]
    endings = [next(name for name in sample.fields if name not in ("txt", "json")) for sample in stored]
    assert endings == ["jpg", "png", "webp", "gif", "png", "png"]
    assert snapshot.dropped == {"damaged": 1, "two_images": 1}


def test_samples_without_an_image_or_with_broken_json_are_kept_as_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with open(path, "wb") as file:
        writer = TarWriter(file)
        writer.write(Sample("a", {"txt": b"\xff\xfe", "json": b"{"}))
        writer.write(Sample("b", {"jpg": b"x"}))
        writer.close()
    rows = read(WebDatasetTars(tars=str(path)), tmp_path / "scratch")
    assert rows[0].problem is not None and rows[0].problem.error_class == "no_picture"
    assert (rows[1].body("image"), rows[1].caption, rows[1].url) == (b"x", "", "b")


def test_missing_hostile_and_overfull_tars_are_refused(tars: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.tar"
    with tarfile.open(hostile, "w") as tar:
        tar.addfile(tarfile.TarInfo("../../etc/passwd.txt"), io.BytesIO())
    for place, rows in ((tmp_path / "no.tar", 2), (hostile, 2), (tmp_path, 2), (tars, 1)):
        if place == tmp_path:
            hostile.unlink()
        with pytest.raises(SettingError):
            list(WebDatasetTars(tars=str(place)).slices(rows, Folder(tmp_path / "scratch")))


def test_a_card_names_its_source(images: Path) -> None:
    opened = open_source({"kind": "folder", "folder": str(images)})
    assert opened == ImageFolder(folder=str(images))
    with pytest.raises(SettingError, match="kind"):
        open_source({"kind": "images"})
    with pytest.raises(SettingError, match="fodler"):
        open_source({"kind": "folder", "fodler": "x"})
