"""Label PNGs in published layouts: their values, files that cannot be used, and what a refresh does."""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.codecs.image_encoding import ImageOptions
from pipeline.codecs.options import MediaOptions
from pipeline.dataset import load_card
from pipeline.errors import SettingError
from pipeline.evaluation.suite import Evaluations
from pipeline.evaluation.task import PreparedSet
from pipeline.loaders.segmentation import SegmentationReader
from pipeline.shards.label_values import decode_values, encode_values
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.tar import iterate_tar
from pipeline.sources import open_source
from pipeline.sources.label_maps import LabelMaps
from pipeline.sources.source import UNCHANGED, Row, Source
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers

NO_RAY = Workers(processes_count=0)
CARD = 'name: two\ntitle: Two\nclasses: ["cat", "dog"]\n'
# The ids of COCO's classes that have no pixels in COCO-Stuff, from its README and labels.txt.
NO_PIXELS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)


def png(values: Any, mode: str | None = None, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(np.asarray(values))
    if mode == "P":
        image.putpalette([number for value in range(256) for number in (value, 255 - value, 7)])
    image.save(buffer, format="PNG", **more)
    return buffer.getvalue()


def photo(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(buffer, format="JPEG")
    return buffer.getvalue()


def write(place: Path, content: bytes | str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content.encode() if isinstance(content, str) else content)


def pieces(source: Source, scratch: Path, at_once: int = 2) -> Iterator[Row]:
    for piece in list(source.slices(at_once, Folder(scratch))):
        yield from source.rows(piece)


def mask_of(row: Row) -> np.ndarray:
    assert row.problem is None, row.problem
    return decode_values(row.members["mask.png"])


@pytest.fixture
def two(tmp_path: Path) -> str:
    write(tmp_path / "two.yaml", CARD)
    return str(tmp_path / "two.yaml")


# Published layouts


def opened(card: str, folder: Path) -> Source:
    return open_source({**load_card(card).source, "folder": str(folder)})


def test_the_layout_of_pascal_voc(tmp_path: Path) -> None:
    """Palette files; 0 is unlabelled and 255 void; the split keeps its order, and images outside of it are left out."""
    values = np.array([[0, 1, 20], [255, 15, 0]], np.uint8)
    for name in ("2007_000033", "2007_000032", "2008_000001"):
        write(tmp_path / f"JPEGImages/{name}.jpg", photo(2, 3))
        write(tmp_path / f"SegmentationClass/{name}.png", png(values, "P"))
    write(tmp_path / "ImageSets/Segmentation/val.txt", "2007_000033\n2007_000032\n")
    rows = list(pieces(opened("pascal_voc", tmp_path), tmp_path / "scratch"))
    assert [row.url for row in rows] == ["JPEGImages/2007_000033.jpg", "JPEGImages/2007_000032.jpg"]
    assert [row.columns["name"] for row in rows] == ["2007_000033", "2007_000032"]
    for row in rows:
        assert np.array_equal(mask_of(row), values) and Image.open(io.BytesIO(row.members["mask.png"])).mode == "L"


def test_the_layout_of_ade20k_and_of_pascal_context(tmp_path: Path) -> None:
    values = np.array([[0, 1], [150, 59]], np.uint8)
    write(tmp_path / "images/validation/ADE_val_00000001.jpg", photo(2, 2))
    write(tmp_path / "annotations/validation/ADE_val_00000001.png", png(values))
    (row,) = pieces(opened("ade20k", tmp_path), tmp_path / "scratch")
    assert np.array_equal(mask_of(row), values)
    write(tmp_path / "JPEGImages/2008_000002.jpg", photo(2, 2))
    write(tmp_path / "SegmentationClassContext/2008_000002.png", png(values.clip(max=59)))
    write(tmp_path / "ImageSets/SegmentationContext/val.txt", "2008_000002\n")
    (row,) = pieces(opened("pascal_context", tmp_path), tmp_path / "scratch")
    assert np.array_equal(mask_of(row), values.clip(max=59))


def test_the_layout_of_coco_stuff_and_of_coco_object(tmp_path: Path) -> None:
    """Of the ids 1 to 182, stored less one, 11 have no pixels; for objects stuff and 255 are the background."""
    ids = np.array([number for number in range(1, 183) if number not in NO_PIXELS])
    assert len(ids) == 171
    values = np.append(ids - 1, 255).astype(np.uint8)[None]
    write(tmp_path / "images/val2017/000000000139.jpg", photo(1, 172))
    write(tmp_path / "annotations/val2017/000000000139.png", png(values))
    (stuff,) = pieces(opened("coco_stuff", tmp_path), tmp_path / "scratch")
    assert np.array_equal(mask_of(stuff)[0], [*range(1, 172), 0])
    (things,) = pieces(opened("coco_object", tmp_path), tmp_path / "scratch")
    assert np.array_equal(mask_of(things)[0], [*range(1, 81), *[0] * 92])
    write(tmp_path / "annotations/val2017/000000000139.png", png(np.full((1, 172), 11, np.uint8)))  # a street sign
    (bad,) = pieces(opened("coco_stuff", tmp_path), tmp_path / "scratch")
    assert bad.problem is not None and "has the values 11, which no class has" in bad.problem.message


def test_class_names_are_the_official_ones() -> None:
    """Those of the papers, with spaces."""
    voc = "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant"
    cards = {
        name: load_card(name).classes
        for name in ("pascal_voc", "pascal_context", "ade20k", "coco_stuff", "coco_object")
    }
    assert [len(names) for names in cards.values()] == [20, 59, 150, 171, 80]
    assert all(len(set(names)) == len(names) for names in cards.values())
    plain = [name.replace(" ", "") for name in cards["pascal_voc"]]
    assert plain == [*voc.split(), "sheep", "sofa", "train", "tvmonitor"]
    context = [name.replace(" ", "") for name in cards["pascal_context"]]
    assert [name for name in context if name in plain] == [name for name in plain if name != "diningtable"]
    assert context[10] == "table" and context[20] == "bag" and context[-1] == "wood"
    instances = load_card("coco_ovd_all").classes  # base, novel and unused classes of COCO
    assert cards["coco_stuff"][:80] == cards["coco_object"] and set(instances) <= set(cards["coco_object"])
    assert cards["coco_stuff"][80] == "banner" and cards["coco_stuff"][-1] == "wood"
    assert (cards["ade20k"][0], cards["ade20k"][12], cards["ade20k"][149]) == ("wall", "person", "flag")


# Files


def test_values_of_one_to_sixteen_bits_and_palettes(two: str, tmp_path: Path) -> None:
    """Pillow multiplies grey values of two and four bits; the values count."""
    files = {
        "bit": grey_png(1, [0b01000000]),
        "two": grey_png(2, [0b00011000]),
        "four": grey_png(4, [0x01, 0x20]),
        "palette": png(np.array([[0, 1, 2]], np.uint8), "P", bits=2),
        "wide": png(np.array([[0, 1, 255]], np.uint16)),
    }
    for name, content in files.items():
        write(tmp_path / f"images/{name}.jpg", photo(1, 3))
        write(tmp_path / f"annotations/{name}.png", content)
    rows = {str(row.columns["name"]): row for row in pieces(LabelMaps(folder=str(tmp_path), classes_of=two), tmp_path)}
    found = {name: mask_of(row)[0].tolist() for name, row in rows.items()}
    assert found == {"bit": [0, 1, 0], "two": [0, 1, 2], "four": [0, 1, 2], "palette": [0, 1, 2], "wide": [0, 1, 255]}


def grey_png(depth: int, row: list[int], width: int = 3) -> bytes:
    """A grey PNG of one row with ``depth`` bits a pixel, written by hand."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, 1, depth, 0, 0, 0, 0)
    data = zlib.compress(bytes([0, *row]))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_more_classes_than_eight_bits_have(tmp_path: Path) -> None:
    """300 classes: 16 bits, 255 is a class, 65535 is void; the reader follows."""
    names = [f"class {number}" for number in range(300)]
    write(tmp_path / "many.yaml", f"name: many\ntitle: Many\nclasses: {names}\n")
    write(tmp_path / "images/a.jpg", photo(1, 4))
    write(tmp_path / "annotations/a.png", png(np.array([[0, 255, 300, 65535]], np.uint16)))
    source = LabelMaps(folder=str(tmp_path), classes_of=str(tmp_path / "many.yaml"), void_values=(65535,))
    (row,) = pieces(source, tmp_path / "scratch")
    assert mask_of(row).tolist() == [[0, 255, 300, 65535]]
    refresh(source, Folder(tmp_path / "out"), kept(), NO_RAY)
    prepared = Evaluations(segmentation=(f"it={tmp_path / 'out'}",)).prepare()
    assert label_maps(prepared.sets[0]) == [[[-1, 254, 299, -1]]]
    with pytest.raises(SettingError, match="one meaning each"):
        list(LabelMaps(folder=str(tmp_path), classes_of=str(tmp_path / "many.yaml")).slices(2, Folder(tmp_path)))


def label_maps(one: PreparedSet) -> list[Any]:
    reader = SegmentationReader(classes=one.ready.words.one.classes, resize=None)
    return [reader.read(sample)["labels"].tolist() for sample in one.samples()]


def kept(**images: Any) -> ShardOptions:
    return ShardOptions(media=MediaOptions(image=ImageOptions(**{**UNCHANGED, **images})), number_sample_per_shard=10)


def reasons(snapshot: Snapshot) -> dict[str, str]:
    folder = Path(snapshot.folder)
    rows = [row for shard in snapshot.shards for row in pq.read_table(folder / f"{shard.name}.parquet").to_pylist()]
    return {row["name"]: f"{row['error_class']}: {row['error_message']}" for row in rows if row["status"] != "success"}


def test_files_that_cannot_be_used_are_rows_with_a_reason(two: str, tmp_path: Path) -> None:
    fine = png(np.array([[0, 1, 2, 255]], np.uint8))
    labels = {
        "fine": fine,
        "size": png(np.zeros((1, 5), np.uint8)),
        "turned": png(np.zeros((4, 1), np.uint8)),
        "outside": png(np.array([[0, 1, 7, 9]], np.uint8)),
        "colours": png(np.zeros((1, 4, 3), np.uint8)),
        "broken": fine[:40],
        "text": b"no image",
    }
    for name, content in labels.items():
        write(tmp_path / f"images/{name}.jpg", photo(1, 4))
        write(tmp_path / f"annotations/{name}.png", content)
    write(tmp_path / "images/alone.jpg", photo(1, 4))
    names = "".join(f"{name}\n" for name in (*labels, "alone", "nowhere"))
    write(tmp_path / "val.txt", names)
    source = LabelMaps(folder=str(tmp_path), classes_of=two, split="val.txt")
    snapshot = refresh(source, Folder(tmp_path / "out"), kept(), NO_RAY)
    found = reasons(snapshot)
    assert snapshot.samples == 1 and set(found) == {*labels, "alone", "nowhere"} - {"fine"}
    assert found["size"].startswith("stale_annotation: mask.png has 5 x 1 pixels, the image has 4 x 1")
    assert "--apply-exif-orientation" in found["turned"]
    assert found["outside"] == "bad_mask: outside.png has the values 7, 9, which no class has"
    assert found["colours"] == "bad_mask: colours.png: RGB, not grey or a palette"
    assert found["broken"].startswith("bad_mask: broken.png") and found["text"] == "bad_mask: text.png: not a PNG"
    assert found["alone"] == "no_mask: there is no file annotations/alone.png"
    assert found["nowhere"].startswith("unreadable: there is no file images/nowhere")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"images": "nowhere"}, "nowhere"),
        ({"labels": "empty"}, "labels: got 'empty'.*with a.png"),
        ({"split": "none.txt"}, "none.txt"),
        ({"split": "up.txt"}, r"split.*not '\.\./a'"),
        ({"split": "blank.txt"}, "split"),
        ({"class_values": (1, 2, 3)}, "one for each of the 2 classes"),
        ({"class_values": (1, 0)}, "one meaning each"),
        ({"void_values": (70_000,)}, "0 to 65535"),
        ({"classes_of": "nowhere"}, "card"),
        ({"label_suffix": ".tif"}, "label_suffix"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, Any], sentence: str, two: str, tmp_path: Path) -> None:
    write(tmp_path / "images/a.jpg", photo(1, 1))
    write(tmp_path / "annotations/a.png", png(np.zeros((1, 1), np.uint8)))
    write(tmp_path / "empty/b.txt", "")
    write(tmp_path / "up.txt", "../a\n")
    write(tmp_path / "blank.txt", " \n")
    with pytest.raises(SettingError, match=sentence):
        source = LabelMaps(**{"folder": str(tmp_path), "classes_of": two, **options})
        list(source.slices(2, Folder(tmp_path / "scratch")))


def test_digests_follow_the_files_and_the_mapping(two: str, tmp_path: Path) -> None:
    write(tmp_path / "images/a.jpg", photo(1, 1))
    write(tmp_path / "annotations/a_labelTrainIds.png", png(np.zeros((1, 1), np.uint8)))
    base: dict[str, Any] = {"folder": str(tmp_path), "classes_of": two, "label_suffix": "_labelTrainIds.png"}
    digests = [
        next(iter(LabelMaps(**base, **more).slices(2, Folder(tmp_path / "scratch")))).digest
        for more in ({}, {}, {"other_values": "void"}, {"class_values": (2, 1)})
    ]
    write(tmp_path / "annotations/a_labelTrainIds.png", png(np.ones((1, 2), np.uint8)))
    digests.append(next(iter(LabelMaps(**base).slices(2, Folder(tmp_path / "scratch")))).digest)
    assert digests[0] == digests[1] and len(set(digests)) == 4


# Refreshes


SIZES = ((61, 90), (90, 40), (5, 200), (1, 1))


@pytest.mark.parametrize("mode", ["border", "keep_ratio", "keep_ratio_largest", "center_crop"])
def test_a_resize_keeps_image_and_mask_aligned(mode: Any, two: str, tmp_path: Path) -> None:
    """The class is where the image is bright, but for blurred edges; what a border adds is void."""
    for height, width in SIZES:
        labels = np.zeros((height, width), np.uint8)
        labels[height // 4 : height // 2 + 1, 3 * width // 8 : 5 * width // 8 + 1] = 2
        pixels = np.repeat((labels[:, :, None] > 0) * np.uint8(255), 3, axis=2)
        write(tmp_path / f"images/{height:03d}.png", png(pixels))
        write(tmp_path / f"annotations/{height:03d}.png", png(labels))
    options = ImageOptions(image_size=48, resize_mode=mode, encode_format="png", encode_quality=1, background=(0, 0, 0))
    source = LabelMaps(folder=str(tmp_path), classes_of=two)
    snapshot = refresh(source, Folder(tmp_path / "out"), ShardOptions(media=MediaOptions(image=options)), NO_RAY)
    samples = list(iterate_tar(Folder(tmp_path / "out").open(snapshot.shards[0].tar)))
    for sample, (height, width) in zip(samples, sorted(SIZES), strict=True):
        seen = np.asarray(Image.open(io.BytesIO(sample.fields["png"])).convert("L")).astype(int)
        mask = decode_values(sample.fields["mask.png"])
        clear, inside = (seen < 30) | (seen > 225), mask != 255
        assert mask.shape == seen.shape and (mask == 2).any()
        assert ((mask == 2) == (seen > 127))[clear & inside].all() and (seen[~inside] == 0).all()
        assert (mode == "border" and height != width) == (not inside.all())


def test_a_refresh_without_a_resize_keeps_the_mask(two: str, tmp_path: Path) -> None:
    write(tmp_path / "images/a.jpg", photo(2, 2))
    write(tmp_path / "annotations/a.png", png(np.array([[0, 1], [2, 255]], np.uint8)))
    snapshot = refresh(LabelMaps(folder=str(tmp_path), classes_of=two), Folder(tmp_path / "out"), kept(), NO_RAY)
    (sample,) = iterate_tar(Folder(tmp_path / "out").open(snapshot.shards[0].tar))
    assert sample.fields["jpg"] == (tmp_path / "images/a.jpg").read_bytes()
    assert sample.fields["mask.png"] == encode_values(np.array([[0, 1], [2, 255]], np.uint8))
    assert snapshot.options["classes"] == {"cat": "", "dog": ""}


def test_a_card_is_evaluated_without_a_refresh(two: str, tmp_path: Path) -> None:
    write(tmp_path / "images/a.jpg", photo(2, 2))
    write(tmp_path / "annotations/a.png", png(np.array([[0, 1], [2, 255]], np.uint8)))
    source = f"source: {{kind: label-maps, folder: {tmp_path}, classes_of: {two}}}\n"
    write(tmp_path / "mine.yaml", CARD.replace("two", "mine") + source)
    prepared = Evaluations(segmentation=(f"{tmp_path / 'mine.yaml'},unlabelled=background",)).prepare()
    assert label_maps(prepared.sets[0]) == [[[2, 0], [1, -1]]]
