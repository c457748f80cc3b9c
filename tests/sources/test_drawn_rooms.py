"""Drawn rooms: geometry by its formula, what is seen of depth, captions that are true of it, and determinism."""

import json
import re

import numpy as np
import pytest
import simplejpeg

from pipeline.errors import SettingError
from pipeline.shards.depth_values import decode_depth
from pipeline.shards.segmentation import mask_of
from pipeline.shards.storage import Folder
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.room_sample import DISTANCES, distance_words, draw_room
from pipeline.sources.drawn.rooms import APART, ROOM_KINDS, sample_room
from pipeline.sources.drawn.source import Drawn

COUNT, SIZE = 60, 64


@pytest.fixture(scope="module")
def rooms() -> list:
    return [sample_room(Draws(0, "train", index, "room"), index, SIZE) for index in range(COUNT)]


def test_a_sample_is_a_function_of_its_number() -> None:
    one, same, other = (draw_room("train", 0, number, SIZE) for number in (7, 7, 8))
    assert one == same and one.image != other.image and one.depth != other.depth
    assert draw_room("train", 1, 7, SIZE).depth != one.depth and draw_room("val", 0, 7, SIZE).depth != one.depth


def test_objects_stand_on_the_floor_and_shrink_with_the_distance(rooms: list) -> None:
    """The lowest row of an object is where the floor has its distance; its radius is focal / distance x its own."""
    for room in rooms:
        for obj, distance in zip(room.scene.objects, room.distances, strict=True):
            foot = room.horizon + room.focal / distance
            lowest = float(obj.outline.points[:, 1].max())
            assert lowest == pytest.approx(foot, abs=0.51)
            assert 0.19 <= obj.pose.radius * distance / room.focal <= 0.53


def test_depth_is_floor_wall_and_objects(rooms: list) -> None:
    for room in rooms:
        depth = room.depth()
        assert depth.dtype == np.float32 and depth.shape == (SIZE, SIZE)
        assert depth.max() == pytest.approx(room.wall) and depth.min() >= room.kind.nearest
        for obj, distance in zip(room.scene.objects, room.distances, strict=True):
            assert np.allclose(depth[obj.visible], distance)
        free = ~np.logical_or.reduce([obj.whole for obj in room.scene.objects])
        row = SIZE - 1
        expected = room.focal / (row + 0.5 - room.horizon)
        assert np.allclose(depth[row][free[row]], expected, rtol=1e-5)
        assert np.allclose(depth[: int(room.horizon)][free[: int(room.horizon)]], room.wall)


def test_nearer_objects_are_in_front_and_apart(rooms: list) -> None:
    several = [room for room in rooms if len(room.distances) > 1]
    assert len(several) > COUNT / 4
    for room in several:
        ratios = [far / near for far, near in zip(room.distances, room.distances[1:], strict=False)]
        assert min(ratios) >= APART - 1e-9
        assert room.scene.objects[-1].occlusion == 0  # nothing hides the nearest one


def test_places_take_turns_and_have_their_walls(rooms: list) -> None:
    assert [room.kind for room in rooms] == [ROOM_KINDS[number % 3] for number in range(COUNT)]
    for room in rooms:
        assert room.kind.wall[0] <= room.wall <= room.kind.wall[1]


def test_words_of_distances_are_those_of_the_nearest_row() -> None:
    metres = [row[0] for row in DISTANCES]
    assert [distance_words(one) for one in metres] == [words for _, words in DISTANCES]
    assert distance_words(0.6)[0] == "giant" and distance_words(1.74)[0] == "extremely close"
    assert distance_words(1.76)[0] == "close" and distance_words(40)[0] == "unseen"


def test_captions_are_true_of_an_object_or_the_wall() -> None:
    """Each distance in a caption is in the words of one of the image's distances."""
    every = sorted({word for _, words in DISTANCES for word in words}, key=len, reverse=True)
    said = 0
    for number in range(COUNT):
        room = draw_room("train", 0, number, SIZE, captions=3)
        record = room.record
        distances = [*(one["distance"] for one in record["objects"]), room.columns["wall"]]
        true = {word for distance in distances for word in distance_words(float(distance))}
        for entry in (record, *record["more_captions"]):
            if not entry["caption_true"]:
                continue
            text = entry["caption"].lower()
            found = [word for word in every if re.search(rf"\b{re.escape(word)}\b", text)]
            longest = [word for word in found if not any(word != other and word in other for other in found)]
            assert longest and set(longest) <= true, (text, true)
            said += 1
    assert said > 2 * COUNT


def test_rows_have_depth_that_fits_their_masks() -> None:
    source = Drawn(samples=6, size=SIZE, depth=True)
    (piece,) = source.slices(10, Folder("memory://rooms"))
    for row in source.rows(piece):
        depth = decode_depth(row.members["depth.png"])
        objects = json.loads(row.members["boxes.json"])["objects"]
        assert simplejpeg.decode_jpeg(row.body("image") or b"").shape == (SIZE, SIZE, 3)
        assert set(row.columns) == set(source.schema())
        for one in objects:
            seen = mask_of(one["segmentation"], SIZE, SIZE).astype(bool)
            assert np.abs(depth[seen] - one["distance"]).max() <= 0.0011
        assert row.columns["distance"] == min(one["distance"] for one in objects)
    bare = Drawn(samples=1, size=SIZE, depth=True, truth="none")
    (piece,) = bare.slices(10, Folder("memory://rooms"))
    assert list(next(iter(bare.rows(piece))).members) == ["depth.png"]


def test_the_haze_grows_with_the_distance() -> None:
    """Farther pixels of a wall are nearer to its haze: their colours are paler than those of the near floor."""
    spread: dict[str, list[float]] = {"near": [], "far": []}
    for number in range(240):
        room = draw_room("train", 0, number, SIZE)
        pixels, depth = simplejpeg.decode_jpeg(room.image).astype(float), decode_depth(room.depth)
        far, near = pixels[depth > 4.5], pixels[depth < 1.2]
        if len(far) > 100 and len(near) > 100:
            raise AssertionError("no place has both")
        for name, some in (("near", near), ("far", far)):
            if len(some) > 100:
                spread[name].append(float(some.std(axis=0).mean()))
    assert np.mean(spread["far"]) < 0.85 * np.mean(spread["near"])


def test_settings_that_do_not_go_together() -> None:
    for options in ({"split": "shapes"}, {"video": True}, {"sound": "beside"}):
        with pytest.raises(SettingError):
            Drawn(depth=True, **options)  # type: ignore[arg-type]


def test_without_depth_the_digest_is_that_of_before() -> None:
    """Folders that were drawn before there was depth stay valid."""
    (piece,) = Drawn(samples=3).slices(10, Folder("memory://rooms"))
    (deep,) = Drawn(samples=3, depth=True).slices(10, Folder("memory://rooms"))
    assert piece.digest != deep.digest
    assert piece.digest == "c312d7f262be7712ab43ca50fc236bf12c63b99f0ed4225e61f67e29426b9958"
