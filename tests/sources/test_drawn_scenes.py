"""Scenes and their annotations, compared with brute force over the pixels."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.shards.segmentation import mask_of, run_lengths
from pipeline.sources.drawn import sets, world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.sample import describe_scene
from pipeline.sources.drawn.scenes import Scene
from pipeline.sources.drawn.truth import scene_record


@cache
def scenes(split: str, count: int, size: int = 64) -> tuple[Scene, ...]:
    return tuple(sets.scene_of(split, Draws(0, split, i, "scene"), i, size) for i in range(count))


def decode(segmentation: dict[str, list[int]]) -> NDArray[np.bool_]:
    """COCO's run-length encoding, decoded pixel by pixel: down each column, zeros first."""
    height, width = segmentation["size"]
    mask = np.zeros((height, width), bool)
    place, value = 0, False
    for run in segmentation["counts"]:
        for _ in range(run):
            mask[place % height, place // height] = value
            place += 1
        value = not value
    assert place == height * width
    return mask


def test_training_never_shows_what_is_held_out() -> None:
    for split in ("train", "val", "shapes", "base", "novel", "rare", "counting", "relations", "fine_grained"):
        for scene in scenes(split, 1500 if split == "train" else 200):
            assert scene.style != world.UNSEEN_STYLE
            for obj in scene.objects:
                assert not world.is_held_out(obj.look.shape, obj.look.colour), split


def test_held_out_tests_show_it_and_nothing_else() -> None:
    for index, scene in enumerate(scenes("held_out_pairs", 96)):
        look = scene.objects[scene.main].look
        assert world.is_held_out(look.shape, look.colour)
        assert sets.label_of("held_out_pairs", scene, index) == f"{look.colour} {look.shape}"
        others = [obj.look for place, obj in enumerate(scene.objects) if place != scene.main]
        assert not any(world.is_held_out(other.shape, other.colour) for other in others)
    for scene in scenes("seen_pairs", 192):
        assert not world.is_held_out(scene.objects[scene.main].look.shape, scene.objects[scene.main].look.colour)
    assert {scene.style for scene in scenes("unseen_style", 48)} == {world.UNSEEN_STYLE}


@pytest.mark.parametrize("size", [64, 128])
def test_boxes_and_masks_by_brute_force(size: int) -> None:
    for scene in scenes("train", 120, size):
        record = scene_record(scene)
        taken = np.zeros((size, size), int)
        for obj, known in zip(scene.objects, record["objects"], strict=True):
            mask = decode(known["segmentation"])
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert known["bbox"] == box and known["area"] == mask.sum()
            np.testing.assert_array_equal(mask_of(known["segmentation"], *known["segmentation"]["size"]), mask)
            taken += mask
            nearer = [other.whole for other in scene.objects[known["depth"] + 1 :]]
            hidden = np.logical_or.reduce([*nearer, np.zeros_like(mask)])
            np.testing.assert_array_equal(mask, obj.whole & ~hidden)
            assert known["occlusion"] == pytest.approx(1 - mask.sum() / obj.whole.sum(), abs=1e-4)
        assert taken.max() == 1


def test_run_lengths_by_hand() -> None:
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    assert run_lengths(mask) == [2, 1, 1, 2]
    assert run_lengths(~mask) == [0, 2, 1, 1, 2]
    assert run_lengths(np.zeros((2, 2), bool)) == [4]
    assert run_lengths(np.ones((2, 2), bool)) == [0, 4]


def test_run_lengths_round_trip_on_noise() -> None:
    generator = np.random.default_rng(0)
    for shape in ((1, 1), (1, 9), (7, 1), (13, 8)):
        mask = generator.random(shape) < 0.5
        code = {"size": list(shape), "counts": run_lengths(mask)}
        np.testing.assert_array_equal(decode(code), mask)
        np.testing.assert_array_equal(mask_of(code, *shape), mask)


@pytest.mark.parametrize("size", [64, 128])
def test_occlusion_stays_below_its_cap_and_happens(size: int) -> None:
    hidden = [obj.occlusion for scene in scenes("train", 600, size) for obj in scene.objects]
    assert max(hidden) <= world.OCCLUSION_CAP
    assert np.mean(np.array(hidden) > 0.05) > 0.1


def test_scenes_hold_one_to_six_objects() -> None:
    counts = Counter(len(scene.objects) for scene in scenes("train", 1500))
    assert set(counts) == {1, 2, 3, 4, 5, 6}
    assert counts[1] > counts[3] > counts[6] > 20


def test_frequencies_have_a_long_tail() -> None:
    seen = Counter(obj.look.shape for scene in scenes("train", 1500) for obj in scene.objects)
    ranked = [seen[name] for name in world.SHAPE_NAMES]
    assert min(ranked) >= 20
    assert np.mean(ranked[:4]) > 4 * np.mean(ranked[-4:])
    assert np.corrcoef(ranked, list(world.SHAPE_FREQUENCIES.values()))[0, 1] > 0.9


def test_the_main_object_is_mostly_large_enough_to_learn_from() -> None:
    share = [scene.objects[scene.main].area / scene.size**2 for scene in scenes("train", 1500)]
    assert np.mean(np.array(share) > 0.04) > 0.6


@pytest.mark.parametrize("split", [name for name, recipe in sets.RECIPES.items() if recipe.varies])
def test_sets_are_balanced_and_show_their_label(split: str) -> None:
    classes = sets.RECIPES[split].classes
    attribute = sets.RECIPES[split].label
    for index, scene in enumerate(scenes(split, len(classes))):
        label = sets.label_of(split, scene, index)
        assert label == classes[index]
        main = scene.objects[scene.main].look
        if attribute in ("shape", "variant", "colour", "texture"):
            assert getattr(main, attribute) == label
        elif attribute == "style":
            assert world.STYLE_CLASSES[scene.style] == label
        elif attribute == "count":
            assert len(scene.objects) == classes.index(label) + 1
            assert max(obj.occlusion for obj in scene.objects) == 0


def test_aerial_views_hold_dozens_of_tiny_objects_that_do_not_touch() -> None:
    for index, scene in enumerate(scenes("aerial", 10, 128)):
        assert 12 <= len(scene.objects) <= 36
        assert np.sum([obj.whole for obj in scene.objects], axis=0).max() == 1
        common = Counter(obj.look.shape for obj in scene.objects).most_common(1)[0][0]
        assert common == sets.AERIAL_CLASSES[index]


def side(one: list[int], other: list[int]) -> str | None:
    """Left, right, above or below by disjoint boxes, along the axis with the larger distance of the centres."""
    apart = [(one[axis] + one[axis + 2] / 2) - (other[axis] + other[axis + 2] / 2) for axis in (0, 1)]
    axis = 0 if abs(apart[0]) >= abs(apart[1]) else 1
    gap = max(one[axis], other[axis]) - min(one[axis] + one[axis + 2], other[axis] + other[axis + 2])
    if gap < 0:
        return None
    return (("left of", "right of"), ("above", "below"))[axis][apart[axis] > 0]


def test_relations_are_true_and_their_negatives_false() -> None:
    """Parses the sentence by hand; sides are computed from boxes, inside and behind from masks and depth."""
    words = {"to the left of": "left of", "to the right of": "right of"}
    swaps = Counter()
    for index, scene in enumerate(scenes("relations", 180)):
        record, columns = describe_scene("relations", 0, index, scene)
        objects = {f"{obj['colour']} {obj['label']}": obj for obj in record["objects"]}
        assert len(objects) == 2
        for sentence, truth in ((record["caption"], True), (columns["negative"], False)):
            relation = next(name for name in (*words, *sets.RELATION_CLASSES) if f" {name} " in str(sentence))
            parts = [part.split(" ", 1)[1] for part in str(sentence).split(f" {relation} ")]
            known = all(part in objects for part in parts)
            assert holds(scene, objects, parts, words.get(relation, relation)) if truth else True
            if not truth:
                swaps[columns["swap"]] += 1
                assert not known or not holds(scene, objects, parts, words.get(relation, relation))
    assert set(swaps) == {"order", "attributes", "relation"} and min(swaps.values()) == 60


def holds(scene: Scene, objects: dict[str, dict[str, object]], parts: list[str], relation: str) -> bool:
    one, other = (objects[part] for part in parts)
    first, second = (scene.objects[obj["id"]] for obj in (one, other))  # type: ignore[index]
    if relation in ("left of", "right of", "above", "below"):
        return side(one["bbox"], other["bbox"]) == relation  # type: ignore[arg-type]
    if relation == "inside":
        rows, columns = np.nonzero(first.whole)
        low = second.outline.points[: second.outline.starts[1]].min(axis=0)
        high = second.outline.points[: second.outline.starts[1]].max(axis=0)
        within = columns.min() >= low[0] - 1 and columns.max() <= high[0] + 1
        return bool(within and rows.min() >= low[1] - 1 and rows.max() <= high[1] + 1 and first.depth > second.depth)
    return first.depth < second.depth and first.occlusion > 0.05
