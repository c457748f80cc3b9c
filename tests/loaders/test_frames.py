"""Frames of clips: times by hand, by CLIP4Clip's and TSN's own rules, one augmentation for all, stored features."""

import io
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import DataError, SettingError
from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.frames import ClipReader, FrameFeatureReader, FrameSampling, feature_width, padded_clips
from pipeline.loaders.images import ImageTransform, crop_bits
from pipeline.loaders.rand_augment import RandomChange
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.sample import Sample
from pipeline.shards.video_frames import Timeline, read_frames
from tests.evaluation.conftest import publish_fields
from tests.videos import encoded_video, numbered, numbers_of

TEN_SECONDS = Timeline(0.0, 10.0, 250)
WHOLE = ImageTransform(size=(48, 80))
AT = SamplePosition(1, 7)


def sample_of(count: int, rate: int = 10, **fields: bytes) -> Sample:
    """A video whose frames show their numbers."""
    return Sample("a", {"mp4": encoded_video(numbered(count), unit=Fraction(1, rate)), **fields})


def shown(clip: torch.Tensor) -> list[int]:
    return numbers_of(clip.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize(
    ("sampling", "times"),
    [
        (FrameSampling(mode="uniform", frames=4, rate=1.0), [0, 3, 6, 9]),
        (FrameSampling(mode="uniform", frames=3, rate=1.0), [0, 4, 9]),  # linspace(0, 9, 3) = 0, 4.5, 9, cut down
        (FrameSampling(mode="uniform", frames=20, rate=1.0), list(range(10))),
        (FrameSampling(mode="rate", frames=4, rate=2.0), [0, 0.5, 1.0, 1.5]),
        (FrameSampling(mode="segments", frames=4), [1.25, 3.75, 6.25, 8.75]),
        (FrameSampling(mode="window", frames=4, rate=2.0), [4.0, 4.5, 5.0, 5.5]),
        (FrameSampling(mode="window", frames=5, rate=0.0), [4.92, 4.96, 5.0, 5.04, 5.08]),
    ],
)
def test_times_in_evaluation(sampling: FrameSampling, times: list[float]) -> None:
    assert sampling.frame_times(TEN_SECONDS) == pytest.approx(times)


def test_other_places_are_other_clips_of_a_video() -> None:
    segments = FrameSampling(mode="segments", frames=2)
    assert segments.frame_times(TEN_SECONDS, place=0.0) == [0, 5]
    assert segments.frame_times(TEN_SECONDS, place=1.0) == pytest.approx([5, 10], abs=1e-5)
    window = FrameSampling(mode="window", frames=4, rate=1.0)
    starts = [window.frame_times(TEN_SECONDS, place=place)[0] for place in (0.0, 0.5, 1.0)]
    assert starts == [0, 3, 6]


@pytest.mark.parametrize("mode", ["uniform", "rate", "segments", "window"])
def test_a_single_frame_and_no_length(mode: str) -> None:
    sampling = FrameSampling(mode=mode, frames=3, rate=2.0)  # type: ignore[arg-type]
    for timeline in (Timeline(0.0, 0.04, 1), Timeline(0.0, 0.0, 1)):
        for random in (None, [0.9, 0.9, 0.9]):
            times = sampling.frame_times(timeline, random)
            assert len(times) == (3 if mode == "segments" else 1) and 0 <= min(times) <= max(times) <= 0.04


def test_a_rate_of_0_is_every_frame_also_at_a_variable_rate() -> None:
    stamps = np.cumsum(np.random.default_rng(5).integers(1, 9, 40)).tolist()
    sample = Sample("a", {"mp4": encoded_video(numbered(40), stamps)})

    def read(mode: str, frames: int, at: SamplePosition | None = None) -> list[int]:
        sampling = FrameSampling(mode=mode, frames=frames, rate=0)  # type: ignore[arg-type]
        return shown(ClipReader(transform=WHOLE, sampling=sampling).read(sample, at)["video"])

    assert read("uniform", 64) == read("rate", 40) == read("window", 40) == list(range(40))
    assert read("uniform", 7) == np.linspace(0, 39, 7, dtype=int).tolist()
    assert read("rate", 5) == [0, 1, 2, 3, 4]
    starts = set()
    for number in range(60):
        found = read("window", 30, SamplePosition(0, number))
        assert found == list(range(found[0], found[0] + 30))
        starts.add(found[0])
    assert min(starts) == 0 and max(starts) == 10


def test_segments_take_one_frame_of_each_part_as_tsn_does() -> None:
    """Frame numbers against TSN's formulas for a constant rate: its test indices, and the range of its random ones."""
    for frames, count in ((3, 30), (8, 100), (5, 31)):
        timeline, sampling = Timeline(0.0, count / 25, count), FrameSampling(mode="segments", frames=frames)
        tick = count / frames
        numbers = [int(time * 25 + 1e-6) for time in sampling.frame_times(timeline)]
        assert numbers == [int(tick / 2 + tick * part) for part in range(frames)]
        random = np.random.default_rng(0).random((200, frames))
        found = np.array([[int(time * 25 + 1e-6) for time in sampling.frame_times(timeline, row)] for row in random])
        for part in range(frames):
            low, high = int(tick * part), int(np.ceil(tick * (part + 1))) - 1
            assert found[:, part].min() == low and found[:, part].max() == high


def test_uniform_is_clip4clips_choice_for_any_length() -> None:
    """Of one frame a second, linspace over the numbers, as integers, where there are more than wanted."""
    for seconds in (0.5, 1.0, 7.2, 12.0, 12.5, 13.0, 61.3):
        timeline = Timeline(0.0, seconds, round(seconds * 30))
        there = int(np.ceil(seconds))
        wanted = np.arange(there) if there <= 12 else np.linspace(0, there - 1, num=12, dtype=int)
        assert FrameSampling(frames=12).frame_times(timeline) == pytest.approx(wanted)


def test_random_windows_reach_every_start() -> None:
    window = FrameSampling(mode="window", frames=4, rate=2.0)
    starts = [window.frame_times(TEN_SECONDS, [random])[0] for random in np.linspace(0, 0.999, 50)]
    assert starts[0] == 0 and starts[-1] == pytest.approx(8.0, abs=0.01)
    assert window.frame_times(Timeline(0.0, 1.2, 12), [0.7]) == pytest.approx([0, 0.5, 1.0])


def test_batches_hold_the_right_frames_and_a_mask() -> None:
    reader = ClipReader(transform=WHOLE, sampling=FrameSampling(frames=4, rate=1.0))
    rows = [reader.read(sample_of(50)), reader.read(sample_of(20))]
    assert shown(rows[0]["video"]) == [0, 10, 20, 40] and shown(rows[1]["video"]) == [0, 10]
    batch = reader.collate(rows)
    assert batch["video"].shape == (2, 4, 3, 48, 80) and batch["video"].dtype == torch.uint8
    assert batch["video_mask"].tolist() == [[True] * 4, [True, True, False, False]]
    assert not batch["video"][1, 2:].any() and shown(batch["video"][1, :2]) == [0, 10]
    assert reader.fields == ("video",)


def test_random_frames_follow_seed_epoch_and_sample() -> None:
    reader = ClipReader(transform=WHOLE, sampling=FrameSampling(mode="segments", frames=3))
    sample = sample_of(60)
    found = {number: shown(reader.read(sample, SamplePosition(0, number))["video"]) for number in range(12)}
    assert shown(reader.read(sample, SamplePosition(0, 5))["video"]) == found[5]
    assert len(set(map(tuple, found.values()))) > 8
    assert all(0 <= one[0] < 20 <= one[1] < 40 <= one[2] < 60 for one in found.values())
    assert shown(reader.read(sample, SamplePosition(1, 5))["video"]) != found[5]
    assert shown(replace(reader, seed=1).read(sample, SamplePosition(0, 5))["video"]) != found[5]
    assert shown(reader.read(sample)["video"]) == [10, 30, 50]


def test_all_frames_have_the_same_crop_and_mirroring() -> None:
    """As the transform gives for each frame with the bits of an image at this position."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    body = encoded_video(np.stack([noise] * 8), options={"crf": "0"})
    transform = ImageTransform(size=(32, 32), crop="resized", scale=(0.2, 0.9), flip=0.5)
    reader = ClipReader(transform=transform, sampling=FrameSampling(mode="segments", frames=4), seed=3)
    different = set()
    for number in range(6):
        at = SamplePosition(0, number)
        clip = reader.read(Sample("a", {"mp4": body}), at)["video"]
        assert (clip.float() - clip[0].float()).abs().max() <= 2
        frame = read_frames(body, [0.0]).pixels[0]
        assert (clip[0].float() - transform(frame, crop_bits(3, *at)).float()).abs().max() <= 2
        different.add(clip[0].sum().item())
    assert len(different) == 6


def test_all_frames_are_changed_alike() -> None:
    change = RandomChange(policy="rand-m9-mstd0.5-inc1", erase=1.0, mean=(0.5,) * 3, std=(0.2,) * 3)
    flat = np.full((8, 64, 64, 3), 130, np.uint8)
    flat[:, 20:40, 10:30] = (200, 40, 90)
    sample = Sample("a", {"mp4": encoded_video(flat)})
    plain = ClipReader(transform=ImageTransform(size=(64, 64)), sampling=FrameSampling(mode="segments", frames=4))
    reader, changed = replace(plain, change=change), 0
    for number in range(10):
        clip = reader.read(sample, SamplePosition(0, number))["video"].float()
        assert (clip - clip[0]).abs().max() <= 4, "the same operations, and the same erased area with the same noise"
        changed += bool((clip[0] - plain.read(sample)["video"][0]).abs().max() > 20)
    assert changed == 10
    assert torch.equal(reader.read(sample)["video"], plain.read(sample)["video"]), "nothing random in evaluation"


def test_large_videos_are_decoded_smaller() -> None:
    """The decoder scales to four times the transform's size at most; the result is that of the full size, nearly."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (9, 12, 3)).astype(np.uint8).repeat(60, 0).repeat(60, 1)
    body = encoded_video(coarse[None].repeat(3, 0), options={"crf": "10"})
    transform = ImageTransform(size=(32, 32))
    clip = ClipReader(transform=transform, sampling=FrameSampling(frames=1)).read(Sample("a", {"mp4": body}))["video"]
    full = transform(read_frames(body, [0.0]).pixels[0])
    assert (clip[0].float() - full.float()).abs().mean() < 2


@pytest.mark.parametrize("fields", [{}, {"mp4": b"\0\0\0 ftypisom and nothing more"}, {"mp4": b""}])
def test_a_broken_video_is_an_unreadable_sample(fields: dict[str, bytes]) -> None:
    with pytest.raises(UnreadableSample):
        ClipReader(transform=WHOLE).read(Sample("a", fields))


def feature_row(count: int, step: float = 1.0, width: int = 3) -> dict[str, object]:
    """Stored features [T, D]: row t is t, t, t."""
    features = np.repeat(np.arange(count, dtype=np.float16)[:, None], width, axis=1)
    times = (np.arange(count) * step).tolist()
    return {"key": "a", "seconds": count * step, "times": times, "features": features.tobytes()}


def test_stored_features_are_chosen_as_frames_are() -> None:
    for seconds in (3, 10, 30):
        sample = Sample("a", {}, rows={"frames": feature_row(seconds)})
        for mode in ("uniform", "rate", "segments", "window"):
            sampling = FrameSampling(mode=mode, frames=6, rate=1.0)  # type: ignore[arg-type]
            reader = FrameFeatureReader(sampling=sampling, seed=2)
            timeline = Timeline(0.0, float(seconds), seconds)
            assert reader.read(sample)["video"][:, 0].tolist() == [int(t) for t in sampling.frame_times(timeline)]
            rows = [reader.read(sample, SamplePosition(0, number))["video"][:, 0].tolist() for number in range(20)]
            # Of three features, a sixth of the video shows one of them: nothing is left to chance.
            assert (len(set(map(tuple, rows))) > 1) == (mode in ("segments", "window") and seconds > 6)
    batch = reader.collate([reader.read(Sample("a", {}, rows={"frames": feature_row(count)})) for count in (2, 9)])
    assert batch["video"].shape == (2, 6, 3) and batch["video"].dtype == torch.float32
    assert batch["video_mask"].sum(dim=1).tolist() == [2, 6]


def test_all_stored_features_are_read_whatever_the_length_of_the_last_frame() -> None:
    """A video of 10.04 seconds has features at 0, 1, ... 10 seconds: the last one is shown for 0.04 seconds."""
    row = {**feature_row(11), "seconds": 10.04}
    found = FrameFeatureReader(sampling=FrameSampling(frames=32, rate=0)).read(Sample("a", {}, rows={"frames": row}))
    assert found["video"][:, 0].tolist() == list(range(11))
    some = FrameFeatureReader(sampling=FrameSampling(frames=4, rate=0)).read(Sample("a", {}, rows={"frames": row}))
    assert some["video"][:, 0].tolist() == [0, 3, 6, 10]


def test_stored_times_are_rounded_to_single_precision() -> None:
    """Seconds such as 100.3 are stored as slightly more; the feature of that time is meant, not the one before."""
    sample = Sample("a", {}, rows={"frames": feature_row(2000, 0.1)})
    reader = FrameFeatureReader(sampling=FrameSampling(mode="window", frames=1000, rate=10.0), place=1.0)
    assert reader.read(sample)["video"][:, 0].tolist() == list(range(1000, 2000))


def test_features_and_frames_of_one_position_are_those_of_the_same_times() -> None:
    sampling = FrameSampling(mode="segments", frames=5)
    frames = ClipReader(transform=WHOLE, sampling=sampling, seed=4).read(sample_of(100), AT)["video"]
    stored = Sample("a", {}, rows={"frames": feature_row(100, 0.1)})
    features = FrameFeatureReader(sampling=sampling, seed=4).read(stored, AT)["video"]
    assert shown(frames) == features[:, 0].int().tolist()


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def test_features_of_members() -> None:
    reader = FrameFeatureReader(name="", rate=2.0, sampling=FrameSampling(frames=4, rate=1.0))
    features = np.arange(12, dtype=np.float64)[:, None] * np.ones((1, 512))
    found = reader.read(Sample("a", {"frames.npy": npy(features)}))["video"]
    assert found.dtype == torch.float32 and found[:, 0].tolist() == [0, 2, 6, 10] and found.shape == (4, 512)
    assert reader.fields == ("frames.npy",) and reader.sidecars == ()
    for content in (npy(np.zeros((3, 4), int)), npy(np.zeros(5)), npy(np.zeros((0, 4))), b"\x93NUMPY", b"nothing"):
        with pytest.raises(UnreadableSample):
            reader.read(Sample("a", {"frames.npy": content}))
    with pytest.raises(UnreadableSample, match=r"has no frames\.npy"):
        reader.read(Sample("a", {}))
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(UnreadableSample):
        reader.read(Sample("a", {"frames.npy": pickled.getvalue()}))


def test_the_width_of_features_is_that_of_the_first_readable_sample(tmp_path: Path) -> None:
    """Of members, a later one of another width is a bad sample, not the end of a training."""
    contents = [b"broken", npy(np.ones((4, 6))), npy(np.ones((4, 5)))]
    snapshot = publish_fields(tmp_path / "some", [{"frames.npy": content} for content in contents])
    reader = FrameFeatureReader(name="", width=6)
    assert feature_width(snapshot, replace(reader, width=0)) == 6
    assert reader.read(Sample("a", {"frames.npy": contents[1]}))["video"].shape == (4, 6)
    with pytest.raises(UnreadableSample, match="5 numbers of a frame, not 6"):
        reader.read(Sample("a", {"frames.npy": contents[2]}))
    with pytest.raises(UnreadableSample, match="not finite"):
        reader.read(Sample("a", {"frames.npy": npy(np.full((2, 6), np.nan))}))
    with pytest.raises(DataError, match="no sample with features"):
        feature_width(publish_fields(tmp_path / "broken", [{"frames.npy": b"broken"}]), reader)
    with pytest.raises(DataError, match=r"no field frames\.npy"):
        feature_width(publish_fields(tmp_path / "texts", [{"txt": b"a"}]), reader)
    assert FrameFeatureReader(width=6).sidecars[0].facts == {"width": 6}


def test_a_video_without_stored_frames_is_unreadable() -> None:
    reader = FrameFeatureReader(teacher="abc")
    empty = {"key": "a", "seconds": 0.0, "times": [], "features": b""}
    with pytest.raises(UnreadableSample, match="no features"):
        reader.read(Sample("a", {}, rows={"frames": empty}))
    (wanted,) = reader.sidecars
    assert (wanted.name, wanted.facts) == ("frames", {"teacher": "abc"})
    assert "jobs/embed_dataset.py frames" in wanted.job


def test_padding() -> None:
    batch = padded_clips([torch.ones(2, 5), torch.ones(3, 5)], 4, "clip")
    assert batch["clip"].sum().item() == 25 and batch["clip_mask"].sum(dim=1).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("field", "value"), [("mode", "all"), ("frames", 0), ("frames", 2000), ("rate", -1.0), ("rate", 1e9)]
)
def test_bad_settings(field: str, value: object) -> None:
    with pytest.raises(SettingError, match=field):
        FrameSampling(**{field: value})  # type: ignore[arg-type]
    for options in ({"place": 2.0}, {"rate": 0.0}, {"name": "a b"}):
        with pytest.raises(SettingError):
            FrameFeatureReader(**options)
