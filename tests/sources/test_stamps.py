"""The Tux Paint stamps: hand-made folders, hostile ones, and (mark `real`) the package itself."""

import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.codecs.audio import AudioOptions
from pipeline.codecs.image import ImageCodec
from pipeline.codecs.image_encoding import ImageOptions
from pipeline.codecs.options import MediaOptions
from pipeline.dataset import load_card
from pipeline.errors import SampleError, SettingError
from pipeline.loaders.audio import AudioTransform
from pipeline.loaders.questions import read_questions
from pipeline.loaders.text import read_captions
from pipeline.shards.questions import QUESTIONS
from pipeline.shards.sample import Sample
from pipeline.shards.selection import read_samples
from pipeline.shards.storage import Folder
from pipeline.sources.source import Row
from pipeline.sources.stamps import INSTALLED, TuxPaintStamps
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers
from tests.sounds import encoded, tone

CROW = "A crow.\nde.utf8=Eine Krähe.\nsr@latin.utf8=Vrana.\nfr.utf8=\n"


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    """Four stamps of every kind of text and image."""
    root = tmp_path / "stamps"
    for folder in ("animals/birds", "food", "town"):
        (root / folder).mkdir(parents=True)
    image((0, 0, 255, 255)).save(root / "animals/birds/crow.png")
    image((0, 0, 255, 255)).save(root / "animals/birds/crow_mirror.png")
    (root / "animals/birds/crow.txt").write_text(CROW, encoding="utf-8")
    image((0, 255, 0, 0)).save(root / "food/pear.png")
    (root / "food/pear.dat").write_text("nomirror\n")
    (root / "food/pear.svg").write_text("<svg/>")
    (root / "town/sign.svg").write_text("<svg/>")
    (root / "town/sign.txt").write_text("A sign.\n")
    return root


def image(rgba: tuple[int, int, int, int]) -> Image.Image:
    return Image.new("RGBA", (6, 4), rgba)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[Row]]:
    def rows(source: TuxPaintStamps, rows_per_shard: int = 100) -> list[Row]:
        pieces = list(source.slices(rows_per_shard, Folder(tmp_path / "scratch")))
        found = [row for piece in pieces for row in source.rows(piece)]
        assert len(found) == sum(piece.count for piece in pieces)
        return found

    return rows


def pixels(row: Row, background: tuple[int, int, int] = (255, 255, 255)) -> NDArray[np.uint8]:
    """The image as it is stored, without loss and in its own size."""
    assert row.body("image") is not None
    options = ImageOptions(resize_mode="no", encode_format="png", encode_quality=0, background=background)
    (body,) = ImageCodec().encode(row.body("image"), options).fields.values()
    return np.asarray(cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR_RGB), np.uint8)


def test_rows_of_a_small_folder(stamps: Path, read: Callable[..., list[Row]]) -> None:
    crow, mirror, pear, sign = read(TuxPaintStamps(folder=str(stamps)))
    assert [crow.url, crow.caption, crow.columns["label"]] == ["animals/birds/crow.png", "A crow.", "animals"]
    assert crow.columns["category"] == "animals/birds"
    assert mirror.url.endswith("crow_mirror.png") and mirror.caption == "A crow."
    assert pear.caption == "" and pear.problem is None
    assert sign.problem is not None and sign.problem.error_class == "vector_picture" and sign.body("image") is None
    assert sign.caption == "A sign."


def test_languages(stamps: Path, read: Callable[..., list[Row]]) -> None:
    for language, caption in (("de", "Eine Krähe."), ("sr@latin", "Vrana."), ("fr", "")):
        rows = read(TuxPaintStamps(folder=str(stamps), language=language))
        assert rows[0].caption == caption and rows[3].caption == ""
    rows = read(TuxPaintStamps(folder=str(stamps), language="de", fall_back_to_english=True))
    assert [row.caption for row in rows] == ["Eine Krähe.", "Eine Krähe.", "", "A sign."]
    with pytest.raises(SettingError, match="language: got 'xx'.*de, en, fr, sr@latin"):
        read(TuxPaintStamps(folder=str(stamps), language="xx"))


def test_alpha_lies_on_the_background(stamps: Path, read: Callable[..., list[Row]]) -> None:
    image((200, 100, 0, 51)).save(stamps / "food/plum.png")
    crow, _, pear, plum, _ = read(TuxPaintStamps(folder=str(stamps)))
    behind = (32, 64, 96)
    assert (pixels(crow, behind) == (0, 0, 255)).all() and (pixels(pear, behind) == behind).all()
    # A fifth of (200, 100, 0) and four fifths of (32, 64, 96).
    assert (pixels(plum, behind) == (66, 71, 77)).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_kind_of_png_agrees_with_pillow(mode: str, tmp_path: Path, read: Callable[..., list[Row]]) -> None:
    (tmp_path / "s/a").mkdir(parents=True)
    ramp = np.linspace(0, 255, 48, dtype=np.uint8).reshape(6, 8)
    if mode == "I;16":
        image, expected = Image.fromarray(ramp.astype(np.uint16) * 257), np.repeat(ramp[:, :, None], 3, 2)
    else:
        colour = Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp, ramp.T.reshape(6, 8)], 2), "RGBA")
        image = colour.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else colour.convert(mode)
        white = Image.new("RGBA", image.size, "white")
        expected = np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
    image.save(tmp_path / "s/a/x.png")
    (row,) = read(TuxPaintStamps(folder=str(tmp_path / "s")))
    assert np.abs(pixels(row).astype(int) - expected.astype(int)).max() <= 1


def hostile_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be ``width`` x ``height``."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 10)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_hostile_folder(stamps: Path, read: Callable[..., list[Row]]) -> None:
    good = (stamps / "animals/birds/crow.png").read_bytes()
    hostile = {
        "empty.png": b"",
        "fake.png": b"<html>not found</html>",
        "header.png": good[:20],
        "huge.png": hostile_png(60_000, 60_000),
        "zero.png": hostile_png(0, 7),
        "header_only.png": good[:8] + b"\0" * 40,
    }
    for name, data in hostile.items():
        (stamps / "food" / name).write_bytes(data)
    (stamps / "food/loop.png").symlink_to("loop.png")
    (stamps / "food/fake.txt").write_bytes(b"\xef\xbb\xbf\xff\xfe caption\r\nde.utf8=\x00\r\n==\n.utf8=x\n")
    rows = read(TuxPaintStamps(folder=str(stamps)), 3)
    bad = {row.url: row.problem.error_class for row in rows if row.problem is not None}
    assert bad == {"town/sign.svg": "vector_picture"}
    for row in rows:
        if row.url.removeprefix("food/") in hostile:
            with pytest.raises(SampleError):
                pixels(row)
        elif row.problem is None:
            assert pixels(row).shape == (4, 6, 3)
    assert len(rows) == len(hostile) + 4
    assert all(isinstance(row.caption, str) for row in rows)


def test_a_file_that_vanishes_is_a_problem_of_its_row(stamps: Path, tmp_path: Path) -> None:
    source = TuxPaintStamps(folder=str(stamps))
    (piece,) = source.slices(100, Folder(tmp_path / "scratch"))
    (stamps / "food/pear.png").unlink()
    problems = [row.problem.error_class for row in source.rows(piece) if row.problem]
    assert problems == ["unreadable", "vector_picture"]


def test_the_digest_follows_content_and_options(stamps: Path, tmp_path: Path) -> None:
    def digest(**options: str | bool) -> str:
        (piece,) = TuxPaintStamps(folder=str(stamps), **options).slices(100, Folder(tmp_path / "scratch"))  # type: ignore[arg-type]
        return piece.digest

    first = digest()
    assert digest() == first
    os.utime(stamps / "food/pear.png", (1, 1))
    assert digest() == first
    others = {digest(fall_back_to_english=True), digest(language="de")}
    (stamps / "animals/birds/crow.txt").write_text("A raven.\n")
    assert len({first, digest(), *others}) == 4


def test_parts_are_disjoint_and_stay_when_stamps_are_added(tmp_path: Path, read: Callable[..., list[Row]]) -> None:
    root = tmp_path / "many"
    (root / "x").mkdir(parents=True)

    def part(split: str) -> set[str]:
        return {row.url for row in read(TuxPaintStamps(folder=str(root), split=split, held_out_share=0.25))}  # type: ignore[arg-type]

    for number in range(120):
        image((1, 2, 3, 255)).save(root / f"x/{number}.png")
        image((1, 2, 3, 255)).save(root / f"x/{number}_mirror.png")
    train, held_out = part("train"), part("held_out")
    assert not train & held_out and train | held_out == part("all")
    assert 0.15 < len(held_out) / 240 < 0.35
    assert {url.replace("_mirror", "") for url in held_out} == {url for url in held_out if "_mirror" not in url}
    image((1, 2, 3, 255)).save(root / "x/new.png")
    assert held_out <= part("held_out") and train <= part("train")


def test_missing_and_empty_folders_name_the_package(tmp_path: Path, read: Callable[..., list[Row]]) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(SettingError, match="tuxpaint-stamps-default"):
            read(TuxPaintStamps(folder=str(folder)))


def test_an_unpacked_package_is_found(stamps: Path, tmp_path: Path, read: Callable[..., list[Row]]) -> None:
    inside = tmp_path / "unpacked" / INSTALLED.lstrip("/")
    inside.parent.mkdir(parents=True)
    stamps.rename(inside)
    assert len(read(TuxPaintStamps(folder=str(tmp_path / "unpacked")))) == 4


@pytest.mark.parametrize("wrong", [{"sound": "loud"}, {"held_out_share": 0.0}, {"held_out_share": 1.0}])
def test_wrong_options_are_refused(wrong: dict[str, str | float]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        TuxPaintStamps(**wrong)  # type: ignore[arg-type]


def test_sounds_are_parts(stamps: Path, read: Callable[..., list[Row]]) -> None:
    crow = stamps / "animals/birds/crow"
    effect, french, english = (encoded(tone(16_000, 0.5, hertz), 16_000, "OGG", "VORBIS") for hertz in (200, 300, 400))
    crow.with_suffix(".ogg").write_bytes(effect)
    (stamps / "animals/birds/crow_desc_fr.ogg").write_bytes(french)
    (stamps / "animals/birds/crow_desc.ogg").write_bytes(english)
    (stamps / "food/pear.wav").write_bytes(effect)
    wanted = {
        "effect": {"animals/birds/crow.png": effect, "animals/birds/crow_mirror.png": effect, "food/pear.png": effect},
        "spoken": {"animals/birds/crow.png": french, "animals/birds/crow_mirror.png": french, "food/pear.png": None},
    }
    for sound, bodies in wanted.items():
        source = TuxPaintStamps(folder=str(stamps), sound=sound)  # type: ignore[arg-type]
        rows = [row for row in read(source) if row.problem is None]
        assert {row.url: row.body("audio") for row in rows} == bodies and source.media == ("image", "audio")
        assert all(row.body("image") for row in rows)
    spoken = read(TuxPaintStamps(folder=str(stamps), sound="spoken", sound_language="en"))
    assert spoken[0].body("audio") == english
    assert all(row.body("audio") is None for row in read(TuxPaintStamps(folder=str(stamps))))


def test_digests_cover_sounds(stamps: Path, tmp_path: Path) -> None:
    def digest(**options: str | bool) -> str:
        (piece,) = TuxPaintStamps(folder=str(stamps), **options).slices(100, Folder(tmp_path))  # type: ignore[arg-type]
        return piece.digest

    plain, silent = digest(), digest(sound="effect")
    (stamps / "food/pear.ogg").write_bytes(b"a sound")
    assert digest() == plain != silent != digest(sound="effect")


def test_captions_of_all_languages(stamps: Path, read: Callable[..., list[Row]]) -> None:
    source = TuxPaintStamps(folder=str(stamps), translations=True)
    (crow,) = [row for row in read(source) if row.url == "animals/birds/crow.png"]
    assert crow.columns["languages"] == ["en", "de", "sr@latin", "fr"]
    assert crow.columns["captions"] == ["A crow.", "Eine Krähe.", "Vrana.", ""]
    assert set(crow.columns) == set(source.schema())


@pytest.mark.real
def test_tri_modal_shards_of_the_package(package: str, tmp_path: Path) -> None:
    """Image, spoken French and captions in many languages: most stamps have all three."""
    source = TuxPaintStamps(folder=package, split="held_out", sound="spoken", translations=True)
    options = ShardOptions(media=MediaOptions(image=ImageOptions(image_size=64), audio=AudioOptions(audio_rate=16_000)))
    snapshot = refresh(source, Folder(tmp_path), options, Workers(processes_count=0))
    samples = [sample for shard in snapshot.shards for sample in read_samples(Folder(tmp_path), shard)]
    sounds = [
        AudioTransform(sample_rate=16_000, seconds=2.0).read(s.fields["flac"]) for s in samples if "flac" in s.fields
    ]
    assert len(samples) > 100 and len(sounds) > 0.7 * len(samples)
    assert all(sound.abs().max() > 0.01 for sound in sounds)
    assert np.mean([len(read_captions(sample)) for sample in samples if sample.fields["txt"]]) > 20


@pytest.mark.real
def test_the_package_itself(package: str, read: Callable[..., list[Row]]) -> None:
    rows = read(TuxPaintStamps(folder=package, language="de", fall_back_to_english=True))
    outcome = Counter(row.problem.error_class if row.problem else "good" for row in rows)
    assert outcome["good"] > 700 and set(outcome) <= {"good", "vector_picture"}
    # Debian's tuxpaint-data, where it is installed too, adds stamps without texts.
    assert all(row.caption for row in rows if not row.url.startswith("cartoon/tux/"))
    assert len({row.columns["label"] for row in rows}) >= 15
    (tiger,) = [row for row in rows if row.url == "animals/mammals/cats/tiger.png"]
    assert tiger.caption == "Ein Tiger." and (pixels(tiger)[0, 0] == 255).all()


@pytest.mark.real
def test_questions_about_the_package(package: str) -> None:
    """What each stamp is, its kind, and a question with yes and no in balance; the same for a mirror image."""
    source = TuxPaintStamps(folder=package, split="held_out", questions=True)
    rows = [row for row in (source._row(path) for path in source._images()) if row.problem is None]
    kinds: dict[str, list[str]] = {"what_kind": [], "which_kind": [], "name": []}
    for row in rows:
        asked = read_questions(Sample("0", dict(row.members)), QUESTIONS)
        for one in asked:
            kinds[one.kind].append(one.answers[0])
            if one.kind == "which_kind":
                named = one.question.removeprefix("does it belong to ").removesuffix("?")
                assert (named == row.columns["label"]) == (one.answers == ("yes",))
        assert asked[0].answers == (row.columns["label"],)
    assert len(rows) == load_card("tuxpaint_questions").samples
    assert 0.4 < kinds["which_kind"].count("yes") / len(rows) < 0.65
    assert {"crow", "apple red"} & set(kinds["name"]) or len(set(kinds["name"])) > 50
    assert TuxPaintStamps(questions=True)._digest(["a"]) != TuxPaintStamps()._digest(["a"])
