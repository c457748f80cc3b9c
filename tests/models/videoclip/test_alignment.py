"""Overlapped positives: what holds of every pair, over thousands of random videos, and cases done by hand."""

from collections.abc import Iterator

import numpy as np
import pytest

from pipeline.errors import SettingError
from pipeline.models.videoclip.alignment import Overlap, grow_clip, grow_text, pick


def always(*draws: float) -> Iterator[float]:
    """These numbers, then the last one again and again."""
    yield from draws
    while True:
        yield draws[-1]


def random_video(random: np.random.Generator) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Spans of captions that may overlap and end after the video, their sizes, and times of frames."""
    count = int(random.integers(1, 20))
    starts = np.sort(random.uniform(0, 60, count))
    spans = np.stack([starts, starts + random.uniform(0, 8, count)], axis=1)
    frames = int(random.integers(1, 80))
    return spans, random.integers(1, 15, count).tolist(), np.arange(frames, dtype=np.float32)


def test_invariants_of_many_random_videos() -> None:
    random = np.random.default_rng(0)
    overlap = Overlap()
    seen_budgets, seen_lengths = set(), set()
    for number in range(300):
        spans, sizes, times = random_video(random)
        for pair in overlap.pairs(16, 5, 1, number, spans, sizes, times):
            texts, frames = pair.captions, pair.frames
            tokens = [sizes[place] for place in texts]
            assert 0 <= texts.start < texts.stop <= len(sizes)
            assert 0 <= frames.start < frames.stop <= len(times)
            # The text stopped when it had its budget, which is 64 at most: without an end it had less.
            assert len(tokens) == 1 or sum(tokens) - max(tokens[0], tokens[-1]) < 64
            # It grew while it had less than the least budget.
            assert sum(tokens) >= 8 or len(texts) == len(sizes)
            # The clip has the moment, which lies within the text, rounded to frames.
            assert pair.centre in frames
            low, high = np.floor(spans[texts.start, 0]), np.ceil(spans[texts.stop - 1, 1])
            assert pair.centre >= min(low, len(times) - 1) and pair.centre <= max(low, high)
            assert len(frames) >= min(3, len(times)) and len(frames) <= 32
            seen_budgets.add(sum(tokens))
            seen_lengths.add(len(frames))
    assert seen_lengths >= set(range(3, 33)) and max(seen_budgets) >= 64


def test_pairs_are_a_function_of_seed_epoch_and_sample() -> None:
    spans, sizes, times = random_video(np.random.default_rng(7))
    overlap = Overlap(budget=(2, 9), clip_frames=(1, 6))

    def pairs(*at: int) -> list[object]:
        return list(overlap.pairs(16, *at, spans, sizes, times))

    assert pairs(0, 1, 2) == pairs(0, 1, 2)
    assert len({str(pairs(*at)) for at in ((0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3))}) == 4


def test_a_text_grows_to_the_side_of_the_coin_and_stops_at_its_budget() -> None:
    sizes = [3, 4, 5, 6, 7]
    assert grow_text(sizes, 2, 5, always(0.9)) == range(2, 3)
    assert grow_text(sizes, 2, 6, always(0.9)) == range(2, 4)
    assert grow_text(sizes, 2, 6, always(0.1)) == range(1, 3)
    assert grow_text(sizes, 2, 12, always(0.9, 0.1)) == range(1, 4)
    assert grow_text(sizes, 2, 999, always(0.5)) == range(5)  # all there is
    assert grow_text(sizes, 4, 999, always(0.9)) == range(5)  # nothing is left on the coin's side
    assert grow_text(sizes, 0, 8, always(0.1)) == range(3)


def test_a_clip_grows_around_its_moment() -> None:
    assert grow_clip(10, 1, 4, always(0.9)) == range(4, 5)
    assert grow_clip(10, 3, 4, always(0.9)) == range(4, 7)
    assert grow_clip(10, 3, 4, always(0.1)) == range(2, 5)
    assert grow_clip(10, 4, 9, always(0.9)) == range(6, 10)
    assert grow_clip(10, 4, 0, always(0.1)) == range(4)
    assert grow_clip(3, 32, 1, always(0.9)) == range(3)


def test_numbers_are_drawn_from_both_ends_with_equal_chances() -> None:
    draws = np.random.default_rng(0).random(30_000)
    counts = np.bincount([pick(3, 5, draw) for draw in draws], minlength=6)
    assert counts[:3].sum() == 0 and abs(counts[3:] / 30_000 - 1 / 3).max() < 0.015


def test_moments_follow_the_frames_own_times() -> None:
    """At four frames a second, a text from 2 s to 3 s meets frames 8 to 12."""
    times = np.arange(40, dtype=np.float32) / 4
    overlap = Overlap(budget=(1, 1), clip_frames=(1, 1))
    found = {
        pair.centre
        for epoch in range(40)
        for pair in overlap.pairs(16, 0, epoch, 0, np.array([[2.0, 3.0]]), [4], times)
    }
    assert found == set(range(8, 13))


def test_texts_beyond_the_video_meet_its_last_frame() -> None:
    pairs = Overlap().pairs(8, 0, 0, 0, np.array([[50.0, 55.0]]), [4], np.arange(5, dtype=np.float32))
    assert {pair.centre for pair in pairs} == {4} and {pair.frames for pair in pairs} <= {
        range(5),
        range(1, 5),
        range(2, 5),
    }


@pytest.mark.parametrize("change", [{"budget": (0, 4)}, {"budget": (5, 4)}, {"clip_frames": (0, 3)}])
def test_impossible_sizes_are_refused(change: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(SettingError, match=next(iter(change))):
        Overlap(**change)
