"""Moving scenes: what is seen follows the motion, opposites show the same frames, captions are true, equal bytes."""

import multiprocessing
import re
from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pipeline.errors import SettingError
from pipeline.shards.storage import Folder
from pipeline.shards.video_frames import read_frames, read_timeline, read_video_header
from pipeline.sources.drawn import world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.film import draw_frames
from pipeline.sources.drawn.filmed import VIDEO_COLUMNS, draw_clip
from pipeline.sources.drawn.motion import MOTIONS, OPPOSITES, PAIRED, RATE, MovingScene, actions, moving_scene
from pipeline.sources.drawn.render import paint_ground
from pipeline.sources.drawn.source import Drawn
from pipeline.sources.drawn.story import WORDS, tell
from pipeline.sources.source import Row


def scene_of(split: str, index: int, seconds: float = 3.0) -> MovingScene:
    return moving_scene(split, Draws(0, split, index, "motion"), index, 64, seconds)


def rows_of(source: Drawn) -> list[Row]:
    return [row for piece in source.slices(1000, Folder("memory://x")) for row in source.rows(piece)]


def mp4_of(index: int) -> bytes:
    return draw_clip("train", 0, index, 64, 1.5).mp4


def test_the_same_bytes_in_any_order_and_process() -> None:
    wanted = [mp4_of(index) for index in range(4)]
    for order in ((3, 2, 1, 0), (0, 2, 1, 2, 1, 3), (1, 2) * 6):  # x264's defaults fail in the last one
        assert [mp4_of(index) for index in order] == [wanted[index] for index in order]
    assert len(set(wanted)) == 4
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(mp4_of, range(4)) == wanted


def test_a_video_is_h264_of_the_asked_length_and_like_its_frames() -> None:
    clip = draw_clip("motions", 0, 0, 64, 2.5)
    header = read_video_header(clip.mp4)
    assert (header.kind, header.width, header.height, header.has_sound) == ("mp4", 64, 64, False)
    timeline = read_timeline(clip.mp4)
    assert timeline.frames == 20 and timeline.end == pytest.approx(2.5, abs=1e-6)
    drawn = draw_frames(scene_of("motions", 0, 2.5), "motions", 0, 0)
    shown = read_frames(clip.mp4, [number / RATE for number in range(20)]).pixels
    error = np.abs(shown.astype(int) - drawn.astype(int)).mean(axis=(1, 2, 3))
    assert error.max() < 12 and np.abs(shown.astype(int) - drawn[::-1].astype(int)).mean() > error.mean()


def masks_of(index: int) -> np.ndarray:
    """Where the pixels of the objects that move are in each frame of a clip of ``motions``, drawn without distractors:
    bool [T, 64, 64]."""
    moving = scene_of("motions", index)
    (event,) = moving.events
    renumbered = {place: event.after[number] for place, number in enumerate(sorted(event.after))}
    actors = tuple(
        replace(moving.actors[number], look=replace(moving.actors[number].look, texture="plain", rgb=(255, 0, 255)))
        for number in sorted(event.after)
    )
    alone = replace(
        moving,
        style="flat",
        ground="clear",
        actors=actors,
        main=len(actors) - 1,
        events=(replace(event, after=renumbered),),
    )
    ground = paint_ground("clear", "flat", 64, Draws(0, "motions", index, "film"))
    return np.abs(draw_frames(alone, "motions", 0, index).astype(int) - ground).sum(axis=3) > 40


def of_motion(motion: str, count: int = 4) -> list[np.ndarray]:
    start = MOTIONS.index(motion)
    return [masks_of(start + len(MOTIONS) * number) for number in range(count)]


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("moving to the right", 1, 1), ("moving to the left", 1, -1), ("moving down", 0, 1), ("moving up", 0, -1)],
)
def test_objects_travel(motion: str, axis: int, sign: int) -> None:
    for masks in of_motion(motion):
        centres = np.array([np.argwhere(mask).mean(axis=0) for mask in masks])
        way = sign * np.diff(centres[:, axis])
        assert way.min() > -0.6 and way.sum() > 18, "one direction, at least a quarter of the image"
        assert np.ptp(centres[:, 1 - axis]) < 1.5


@pytest.mark.parametrize(("motion", "sign"), [("growing", 1), ("shrinking", -1)])
def test_objects_grow_and_shrink(motion: str, sign: int) -> None:
    for masks in of_motion(motion):
        areas = masks.sum(axis=(1, 2))[::sign]
        assert areas[-1] > 1.6 * areas[0] and np.diff(areas).min() > -0.05 * areas[0]


@pytest.mark.parametrize(("motion", "sign"), [("turning clockwise", -1), ("turning anticlockwise", 1)])
def test_objects_turn(motion: str, sign: int) -> None:
    """The last frame is the first one, turned by 45 to 90 degrees in this direction (OpenCV's is anticlockwise)."""
    fits = []
    for masks in of_motion(motion, 8):
        y, x = np.argwhere(masks[0]).mean(axis=0)
        first, last = masks[0].astype(np.uint8), masks[-1]

        def overlap(
            angle: float, first: np.ndarray = first, last: np.ndarray = last, x: float = x, y: float = y
        ) -> float:
            turned = cv2.warpAffine(first, cv2.getRotationMatrix2D((x, y), angle, 1.0), (64, 64)) > 0
            return (turned & last).sum() / (turned | last).sum()

        right = max(overlap(sign * angle) for angle in range(45, 91, 5))
        assert right > 0.6
        fits.append(right - max(overlap(-sign * angle) for angle in range(45, 91, 5)))
    assert np.mean(fits) > 0.05, "symmetric shapes fit in both directions, others in one"


@pytest.mark.parametrize(("motion", "sign"), [("colliding", 1), ("parting", -1)])
def test_objects_meet_and_part(motion: str, sign: int) -> None:
    for index in range(MOTIONS.index(motion), 10 * len(MOTIONS), len(MOTIONS)):
        moving = scene_of("motions", index)
        one, other = moving.events[0].actors
        states = [moving.states(time) for time in moving.times][::sign]
        ways = np.array([[state[one].x - state[other].x, state[one].y - state[other].y] for state in states])
        distance = np.hypot(*ways.T)
        assert distance[0] - distance[-1] > 8 and np.diff(distance).max() < 1e-9


def test_unseen_actions_are_new_pairs_of_known_shapes_and_motions() -> None:
    seen, unseen = actions(unseen=False), actions(unseen=True)
    assert len(seen) == 184 and len(unseen) == 46 and not set(seen) & set(unseen)
    for place in (0, 1):
        assert {pair[place] for pair in unseen} <= {pair[place] for pair in seen}
    assert {shape for shape, _ in unseen} == set(world.SHAPE_NAMES)
    for split, pairs in (("seen_actions_train", seen), ("unseen_actions", unseen)):
        for index in range(0, 2 * len(pairs), 7):
            moving, (shape, motion) = scene_of(split, index), pairs[index % len(pairs)]
            assert moving.actors[moving.main].look.shape == shape
            assert [event.motion for event in moving.events] == [motion]
    columns = draw_clip("unseen_actions", 0, 3, 64, 1.0).columns
    assert columns["label"] == f"{columns['shape']} {columns['motion']}" == " ".join(unseen[3])
    with pytest.raises(SettingError, match="video: got False"):
        Drawn(split="unseen_actions")


def test_blinking_objects_vanish_and_still_ones_do_not() -> None:
    for masks in of_motion("blinking"):
        seen = masks.any(axis=(1, 2))
        assert seen[0] and seen[-1] and 2 <= np.count_nonzero(np.diff(seen.astype(int)) == -1) <= 4
    for masks in of_motion("standing still"):
        assert (masks == masks[0]).all() and masks[0].any()


@pytest.mark.parametrize("motion", [motion for number, motion in enumerate(OPPOSITES) if number % 2 == 0])
def test_opposites_show_the_same_frames_in_another_order(motion: str) -> None:
    """From sorted values (frames without an order) nothing can be learned; the first and the last frame tell all."""
    sets = {"bags": ([], []), "ordered": ([], [])}
    labels = [one for one in (motion, OPPOSITES[motion]) for _ in range(200)]
    for name, start in zip(labels, [*range(200), *range(200)], strict=True):
        moving = scene_of("motions", MOTIONS.index(name) + start * len(MOTIONS))
        actor = moving.actors[moving.main]
        frames = [moving.states(time) for time in moving.times]
        other = [state[moving.events[0].actors[-1]] for state in frames]
        values = np.array(
            [
                [one.x, one.y, one.angle + actor.pose.angle, one.scale, np.hypot(one.x - two.x, one.y - two.y)]
                for one, two in zip([state[moving.main] for state in frames], other, strict=True)
            ]
        )
        # Even samples are learned from, odd ones are judged.
        sets["bags"][start % 2].append(np.sort(values, axis=0)[[0, 6, 12, 18, -1]].ravel())
        sets["ordered"][start % 2].append((values[-1] - values[0]).ravel())
    truth = [name == motion for name in labels[::2]]
    scores = {}
    for name, (train, test) in sets.items():
        scale = StandardScaler().fit(train)
        model = LogisticRegression(C=0.1).fit(scale.transform(train), truth)
        scores[name] = model.score(scale.transform(test), truth)
    assert 0.38 < scores["bags"] < 0.62 and scores["ordered"] > 0.97, scores


def test_events_follow_one_another_without_jumps() -> None:
    counts = Counter()
    for index in range(60):
        moving = scene_of("events", index, 5.0)
        counts[len(moving.events)] += 1
        bounds = [0.0, *(event.end for event in moving.events)]
        assert [event.begin for event in moving.events] == bounds[:-1] and bounds[-1] == 5.0
        assert min(np.diff(bounds)) >= 1.0
        assert all(a.motion != b.motion for a, b in zip(moving.events, moving.events[1:], strict=False))
        for cut in bounds[1:-1]:
            for before, after in zip(moving.states(cut - 1e-6), moving.states(cut + 1e-6), strict=True):
                assert abs(before.x - after.x) + abs(before.y - after.y) + abs(before.scale - after.scale) < 1e-3
        for time in moving.times:
            assert all(0 < state.x < 64 and 0 < state.y < 64 for state in moving.states(time))
    assert set(counts) == {2, 3, 4} and min(counts.values()) >= 10
    assert {len(scene_of("train", index, 1.0).events) for index in range(30)} == {1}
    assert {len(scene_of("train", index, 4.0).events) for index in range(60)} == {1, 2, 3}


def motions_in(text: str) -> set[str]:
    said = {words: motion for motion, forms in WORDS.items() for form in forms for words in form}
    longest = "|".join(map(re.escape, sorted(said, key=len, reverse=True)))
    return {said[words] for words in re.findall(rf"\b(?:{longest})\b", text.lower())}


def shapes_in(text: str) -> set[str]:
    found = {}
    for noun in world.SHAPES:
        for word in (noun.name, *noun.synonyms, *noun.variants):
            found[word] = noun.name
    longest = "|".join(map(re.escape, sorted(found, key=len, reverse=True)))
    return {found[word] for word in re.findall(rf"\b(?:{longest})\b", text.lower())}


def test_captions_are_true_or_say_that_they_are_not() -> None:
    false = untold = 0
    for index in range(400):
        moving = scene_of("train", index)
        story = tell(moving, Draws(0, "train", index, "story"), world.WRONG_CAPTIONS, plain=False)
        shown = {moving.actors[number].look.shape for event in moving.events for number in event.actors}
        motions = {event.motion for event in moving.events}
        false += not story.truthful
        if story.truthful:
            untold += not motions_in(story.text)
            assert motions_in(story.text) in (motions, set()) and shapes_in(story.text) <= shown
        else:
            assert motions_in(story.text) != motions or not shapes_in(story.text) & shown
        for event, text in zip(moving.events, story.events, strict=True):
            assert motions_in(text) == {event.motion}
    assert 5 <= false <= 40 and 20 <= untold <= 90


def test_rows_labels_and_columns() -> None:
    rows = rows_of(Drawn(split="motions", samples=24, size=64, video=True, clip_seconds=1.0, captions=3))
    assert [row.columns["label"] for row in rows] == list(MOTIONS) * 2
    for row in rows:
        assert set(row.columns) == set(VIDEO_COLUMNS) and len(row.columns["captions"]) == 3
        assert row.columns["captions"][0] == row.caption and [part.medium for part in row.parts] == ["video"]
    shapes = rows_of(Drawn(split="shapes", samples=24, size=64, video=True, clip_seconds=1.0))
    assert [row.columns["label"] for row in shapes] == list(world.SHAPE_NAMES)
    (event,) = rows_of(Drawn(split="events", samples=1, size=64, video=True, clip_seconds=2.0))
    timed = event.columns["timed_captions"]
    assert len(timed) == 2 and all(one["text"] in MOTIONS for one in timed) and timed[0]["end"] == timed[1]["start"]
    assert Drawn(video=True).media == ("video",) and Drawn().media == ("image",)


def test_turning_shapes_are_seen_to_turn() -> None:
    """Also where the class is the shape: a disc grows instead."""
    for index in range(240):
        moving = scene_of("shapes", index)
        if moving.events[0].motion.startswith("turning"):
            assert moving.actors[moving.main].look.shape not in ("disc", "ring", "gear", "flower", "spiral")


def test_a_clip_has_no_two_objects_that_a_caption_could_confuse() -> None:
    for index in range(100):
        looks = [actor.look for actor in scene_of("train", index).actors]
        assert len({look.shape for look in looks}) == len({look.colour for look in looks}) == len(looks)
        assert len(looks) >= 2 or not any(event.motion in PAIRED for event in scene_of("train", index).events)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("split", {"video": True, "split": "digits"}),
        ("video", {"split": "motions"}),
        ("clip_seconds", {"video": True, "clip_seconds": 0.5}),
        ("sound", {"video": True, "sound": "beside"}),
        ("truth", {"video": True, "truth": "none"}),
        ("size", {"video": True, "size": 65}),
    ],
)
def test_bad_settings(field: str, options: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=field):
        Drawn(**options)  # type: ignore[arg-type]
