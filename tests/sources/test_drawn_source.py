"""The source: the same bytes in any order and process, invalid options, and the splits as rows."""

import hashlib
import json
import multiprocessing
import pickle
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg

from pipeline.config import from_json, to_json
from pipeline.dataset import card_names, load_card
from pipeline.errors import SettingError
from pipeline.shards.storage import Folder
from pipeline.sources import open_source
from pipeline.sources.drawn import sets, world
from pipeline.sources.drawn.motion import ACTION_SPLITS, MOTION_SPLITS, MOTIONS, action_name, actions
from pipeline.sources.drawn.rooms import ROOM_KINDS
from pipeline.sources.drawn.sample import draw_sample
from pipeline.sources.drawn.solids import SOLIDS
from pipeline.sources.drawn.source import Drawn
from pipeline.sources.source import Row, Slice

GOLDEN = "d91f790d84af1714bc78026d1441e9c9c25cb4f606fe72ea53967fc3874b5a22"
"""SHA-256 of truth, captions and columns of six samples of every split. If it changes, raise WORLD_VERSION."""


def rows_of(source: Drawn, rows_per_shard: int = 1000) -> list[Row]:
    scratch = Folder("memory://drawn-has-no-use-for-it")
    return [row for piece in source.slices(rows_per_shard, scratch) for row in source.rows(piece)]


def described(row: Row) -> tuple[str, bytes, str | None, str, dict[str, bytes]]:
    assert row.body("image") is not None
    return row.url, row.body("image"), row.caption, json.dumps(dict(row.columns)), dict(row.members)


def drawn_elsewhere(index: int) -> str:
    """What another process makes of one sample: a digest."""
    sample = draw_sample("train", 5, index, 96)
    return hashlib.sha256(sample.image + repr((sample.caption, sample.columns, sample.record)).encode()).hexdigest()


def test_the_golden_samples() -> None:
    digest = hashlib.sha256(str(world.WORLD_VERSION).encode())
    for split in sets.SPLITS:
        for index in range(6):
            sample = draw_sample(split, 11, index, 64)
            known = [sample.caption, sample.columns, sample.record]
            digest.update(json.dumps(known, sort_keys=True).encode())
    assert digest.hexdigest() == GOLDEN


def test_any_order_gives_the_same_bytes() -> None:
    forwards = [drawn_elsewhere(index) for index in range(12)]
    backwards = [drawn_elsewhere(index) for index in reversed(range(12))]
    assert forwards == backwards[::-1] and len(set(forwards)) == 12


def test_any_process_gives_the_same_bytes() -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(drawn_elsewhere, range(10)) == [drawn_elsewhere(index) for index in range(10)]


def test_any_cut_into_shards_gives_the_same_rows() -> None:
    source = Drawn(samples=13, size=64)
    whole = [described(row) for row in rows_of(source)]
    assert [described(row) for row in rows_of(source, 4)] == whole
    assert [described(row) for row in rows_of(Drawn(samples=5, first=8, size=64))] == whole[8:]
    assert [described(row) for row in rows_of(pickle.loads(pickle.dumps(source)), 5)] == whole


def test_another_seed_or_split_is_another_world() -> None:
    sources = [Drawn(samples=1, size=64), Drawn(samples=1, size=64, seed=1), Drawn(samples=1, size=64, split="val")]
    assert len({row.body("image") for source in sources for row in rows_of(source)}) == 3


def test_digests_follow_the_options_and_not_the_length() -> None:
    scratch = Folder("memory://x")
    digests = [piece.digest for piece in Drawn(samples=20).slices(5, scratch)]
    assert len(set(digests)) == 4 and all(len(digest) == 64 for digest in digests)
    assert [piece.digest for piece in Drawn(samples=30).slices(5, scratch)][:4] == digests
    changed = [Drawn(samples=20, seed=1), Drawn(samples=20, size=64), Drawn(samples=20, truth="none")]
    assert not {piece.digest for source in changed for piece in source.slices(5, scratch)} & set(digests)
    assert [piece.count for piece in Drawn(samples=13).slices(5, scratch)] == [5, 5, 3]


@pytest.mark.parametrize("split", sets.SPLITS)
def test_rows_match_their_schema(split: str) -> None:
    source = Drawn(split=split, samples=3, size=64)
    for row in rows_of(source):
        assert row.problem is None and row.caption and row.body("image") is not None
        assert set(row.columns) == set(source.schema())
        for name, kind in source.schema().items():
            assert isinstance(row.columns[name], kind) or (name == "variant" and row.columns[name] is None)
        assert row.columns["label"] in sets.classes_of(split)
        height, width, _, _ = simplejpeg.decode_jpeg_header(row.body("image"))
        assert (height, width) == (64, 64)


@pytest.mark.parametrize("size", [64, 100, 512])
def test_sizes(size: int) -> None:
    for row in rows_of(Drawn(samples=4, size=size)):
        record = json.loads(row.members["boxes.json"])
        assert (record["width"], record["height"]) == (size, size)
        assert simplejpeg.decode_jpeg(row.body("image")).shape == (size, size, 3)
        for obj in record["objects"]:
            x, y, width, height = obj["bbox"]
            assert 0 <= x < x + width <= size and 0 <= y < y + height <= size


def test_boxes_lie_on_what_was_painted() -> None:
    """On a flat image the pixels of a plain object have its colour."""
    found = 0
    for index in range(200):
        sample = draw_sample("colours", 0, index, 128)
        record, look = sample.record, sample.columns
        if look["style"] != "flat" or look["texture"] != "plain" or record is None:
            continue
        x, y, width, height = record["objects"][0]["bbox"]
        pixels = simplejpeg.decode_jpeg(sample.image)[y : y + height, x : x + width].reshape(-1, 3)
        named = [world.name_colour(*(int(part) for part in pixel)) for pixel in pixels[::7]]
        assert named.count(str(look["colour"])) / len(named) > 0.1, index
        found += 1
    assert found > 10


def test_jpeg_quality_varies() -> None:
    lengths = [len(row.body("image") or b"") for row in rows_of(Drawn(samples=60, split="styles", size=64))]
    assert max(lengths) > 3 * min(lengths)


def test_base_truth_tells_nothing_of_novel_shapes() -> None:
    full = [json.loads(row.members["boxes.json"]) for row in rows_of(Drawn(samples=150, size=64))]
    rows = rows_of(Drawn(samples=150, size=64, truth="base"))
    hidden = 0
    for row, known in zip(rows, full, strict=True):
        record = json.loads(row.members["boxes.json"])
        annotations = json.dumps(
            {key: value for key, value in record.items() if key not in ("caption", "more_captions")}
        )
        novel = {obj["id"] for obj in known["objects"] if obj["label"] in world.NOVEL_SHAPES}
        hidden += len(novel)
        assert not {obj["label"] for obj in record["objects"]} & set(world.NOVEL_SHAPES)
        assert not any(f'"{shape}"' in annotations for shape in world.NOVEL_SHAPES)
        assert not any(novel & set(phrase["objects"]) for phrase in record["phrases"])
        assert record["caption"] == known["caption"]
        assert (row.columns["label"] is None) == (known["main"] in novel)
    assert hidden > 30


def test_no_truth_leaves_captions_alone() -> None:
    for row in rows_of(Drawn(samples=5, size=64, truth="none")):
        assert row.members == {} and row.caption
        assert row.columns["label"] is None and row.columns["shape"] is None


def test_more_captions() -> None:
    (row,) = rows_of(Drawn(samples=1, size=64, captions=5))
    record = json.loads(row.members["boxes.json"])
    assert record["caption"] == row.caption and len(record["more_captions"]) == 4


def test_few_shot_pools_are_other_images() -> None:
    test = {row.body("image") for row in rows_of(Drawn(split="shapes", samples=30, size=64))}
    assert not test & {row.body("image") for row in rows_of(Drawn(split="shapes_train", samples=30, size=64))}


def pixels_and_labels(split: str, count: int) -> tuple[np.ndarray, list[str]]:
    samples = [draw_sample(split, 0, index, 64) for index in range(count)]
    images = [simplejpeg.decode_jpeg(sample.image, colorspace="GRAY")[::4, ::4].ravel() for sample in samples]
    return np.stack(images) / 255, [str(sample.columns["label"]) for sample in samples]


@pytest.mark.parametrize(("name", "least"), [("digits", 0.65), ("digits_real", 0.8)])
def test_a_linear_model_on_pixels_reads_digits(name: str, least: float) -> None:
    from sklearn.linear_model import RidgeClassifier

    train, labels = pixels_and_labels(f"{name}_train", 600)
    test, truth = pixels_and_labels(name, 300)
    assert RidgeClassifier(alpha=10).fit(train, labels).score(test, truth) > least


def test_real_digits_end() -> None:
    assert len(rows_of(Drawn(split="digits_real", samples=10_000, first=790, size=64))) == 7
    with pytest.raises(SettingError, match="first"):
        Drawn(split="digits_real", first=797)


@pytest.mark.parametrize(
    "wrong",
    [
        {"split": "tset"},
        {"size": 63},
        {"size": 513},
        {"samples": 0},
        {"seed": -1},
        {"first": -1},
        {"captions": 6},
        {"questions": 8},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, int | str]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        Drawn(**wrong)  # type: ignore[arg-type]


def test_options_survive_json() -> None:
    source = Drawn(split="val", samples=7, truth="base")
    assert from_json(Drawn, to_json(source)) == source


def test_a_slice_needs_nothing_but_itself() -> None:
    (piece,) = Drawn(samples=2, first=3, size=64).slices(10, Folder("memory://x"))
    where = json.loads(json.dumps(dict(piece.where)))
    again = Drawn(samples=99, size=64).rows(Slice(count=piece.count, digest=piece.digest, where=where))
    assert [row.url for row in again] == ["drawn://train/0/3", "drawn://train/0/4"]


@pytest.mark.parametrize("name", [name for name in card_names() if name.startswith("drawn")])
def test_cards_fit_their_split(name: str) -> None:
    card = load_card(name)
    source = open_source(card.source)
    assert isinstance(source, Drawn)
    assert card.samples == source.samples and card.templates
    if source.split in ACTION_SPLITS:  # all actions in both sets, so that the two numbers are comparable
        wanted = {action_name(*pair) for unseen in (False, True) for pair in actions(unseen)}
    elif source.points:
        wanted = set(SOLIDS)
    elif source.depth:
        wanted = {kind.name for kind in ROOM_KINDS}
    else:
        of_motion = card.label == "motion" or source.split in MOTION_SPLITS
        wanted = set(MOTIONS if of_motion else sets.classes_of(source.split))
    assert set(card.classes) == wanted
    few = replace(source, samples=4, size=64)
    assert {str(row.columns[card.label]) for row in rows_of(few)} <= set(card.classes)


def test_every_split_but_pools_has_a_card() -> None:
    cards = {str(load_card(name).source.get("split")) for name in card_names()}
    assert {*sets.RECIPES, *sets.IMAGE_SETS, "motions", "events", "seen_actions", "unseen_actions"} <= cards
