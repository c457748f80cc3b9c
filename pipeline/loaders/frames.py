"""Frames of videos in a batch: which frames of a clip, decoded by seeking, with one augmentation for all of them.

A clip has at most ``frames`` frames. ``frame_times`` says when they are shown, as a pure function of the clip's length
and of random numbers, which are a function of (seed, epoch, sample). So a resumed run sees the same frames. The same
choice works on stored features of frames, which are a clip with fewer frames.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import require
from pipeline.errors import DataError, SampleError
from pipeline.loaders.batches import Batch, Row, SamplePosition
from pipeline.loaders.images import ImageTransform, crop_bits
from pipeline.loaders.order import RandomStream, random_bits, uniform
from pipeline.loaders.rand_augment import RandomChange
from pipeline.loaders.samples import Samples, UnreadableSample, check_fields
from pipeline.shards.media import VIDEO
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import Wanted
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.video_frames import Timeline, read_frames
from pipeline.stages.annotate.frame_features import JOB, NAME, StoredFrames, stored_frames

FrameMode = Literal["uniform", "rate", "segments", "window"]
MOST_FRAMES = 1024
DECODED = 4
"""Ratio of the shorter side of a decoded frame to the transform's size, at most: bounds the memory of large videos."""
FRAMES_NPY = "frames.npy"
"""The field with features of another model, such as S3D's: float [T, D]."""
_EARLY = 1e-6  # seconds before the end of a clip that still show its last frame


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames of a clip are read.

    - ``uniform``: of the frames at ``rate``, all, or ``frames`` of them at equal distances with the first and the last
      one (CLIP4Clip, arXiv 2104.08860, section 4.2).
    - ``rate``: the first ``frames`` frames at ``rate``.
    - ``segments``: one frame of each of ``frames`` equal parts: a random one in training, the middle one in evaluation
      (TSN, arXiv 1608.00859, section 3.1). Short clips show a frame several times.
    - ``window``: ``frames`` consecutive frames at ``rate``, from a random start in training.
    """

    mode: FrameMode = "uniform"
    """Choice of frames: uniform, rate, segments or window."""
    frames: int = 12
    """Most frames of a clip, 1 to 1024."""
    rate: float = 1.0
    """Frames per second of the modes uniform, rate and window, up to 240; 0 for every frame of the video."""

    def __post_init__(self) -> None:
        require(self.mode in get_args(FrameMode), "mode", self.mode, "one of " + ", ".join(get_args(FrameMode)))
        require(1 <= self.frames <= MOST_FRAMES, "frames", self.frames, f"1 to {MOST_FRAMES}")
        require(0 <= self.rate <= 240, "rate", self.rate, "0 to 240 frames per second")

    @property
    def random(self) -> bool:
        """Whether training chooses at random."""
        return self.mode in ("segments", "window")

    def frame_times(self, timeline: Timeline, random: Sequence[float] | None = None, place: float = 0.5) -> list[float]:
        """Seconds of the frames, rising, T of them, from 1 to ``frames``.

        ``random`` are ``frames`` numbers in [0, 1). Without them nothing is random, and ``place``, 0 to 1, is the place
        within each segment, or of the window between its first and its last start.
        """
        begin, length = timeline.begin, max(timeline.end - timeline.begin, 0.0)
        if self.mode == "segments":
            offsets = np.full(self.frames, place) if random is None else np.asarray(random[: self.frames])
            times = (np.arange(self.frames) + offsets) * (length / self.frames)
        else:
            place = place if random is None else random[0]
            times = self._at_rate(length, place) if self.rate else self._of_all(_stamps(timeline), place)
        latest = max(length - _EARLY, 0.0)
        found: list[float] = (begin + np.minimum(times, latest)).tolist()
        return found

    def _at_rate(self, length: float, place: float) -> NDArray[np.float64]:
        """Times at ``rate``; a window may start between two of them."""
        if self.mode != "window":
            return self._of_all(np.arange(max(1, math.ceil(length * self.rate - _EARLY))) / self.rate, place)
        count = min(self.frames, max(1, math.ceil(length * self.rate - _EARLY)))
        start: float = place * max(0.0, length - self.frames / self.rate)
        return start + np.arange(count) / self.rate

    def _of_all(self, stamps: NDArray[np.float64], place: float) -> NDArray[np.float64]:
        """The choice of the mode among these times, float64 [N]."""
        spare = len(stamps) - self.frames
        if self.mode == "uniform" and spare > 0:
            return stamps[np.linspace(0, len(stamps) - 1, self.frames).astype(np.int64)]
        start = min(int(place * (spare + 1)), spare) if self.mode == "window" and spare > 0 else 0
        return stamps[start : start + self.frames]


@dataclass(frozen=True, kw_only=True)
class ClipReader:
    """``video``: uint8 [B, T, 3, H, W], T frames of each clip; ``video_mask``: bool [B, T], False where a clip ends.

    Frames are padded at the end with zeros. All frames of a clip have the same crop, mirroring and ``change``.
    """

    transform: ImageTransform
    sampling: FrameSampling = FrameSampling()
    change: RandomChange | None = None
    """RandAugment and erasing in training; colour jitter is for the training's device, as for images."""
    place: float = 0.5
    """Place of the frames in evaluation, 0 to 1 (:meth:`FrameSampling.frame_times`), for several clips of a video."""
    seed: int = 0
    key: str = "video"
    fields = ("video",)

    def __post_init__(self) -> None:
        require(0 <= self.place <= 1, "place", self.place, "0 to 1")

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """``video``: uint8 [t, 3, H, W], t from 1 to T; raises :class:`UnreadableSample`."""
        body = sample.body(VIDEO)
        if body is None:
            raise UnreadableSample(f"{sample.key} has no video")
        times = partial(self.sampling.frame_times, random=frame_randoms(self.sampling, self.seed, at), place=self.place)
        try:
            pixels = read_frames(body, times, size=DECODED * min(self.transform.size)).pixels
        except SampleError as error:
            raise UnreadableSample(error.message) from error
        bits = crop_bits(self.seed, *at) if at is not None and self.transform.random else None
        frames = torch.stack([self.transform(frame, bits) for frame in pixels])
        if self.change is not None and at is not None:
            bits = random_bits(self.seed, RandomStream.AUGMENTATION, *at, 1)
            frames = torch.stack([self.change(frame, int(bits[0])) for frame in frames])
        return {self.key: frames}

    def collate(self, rows: list[Row]) -> Batch:
        """Both keys; T is the sampling's."""
        return padded_clips([row[self.key] for row in rows], self.sampling.frames, self.key)


@dataclass(frozen=True, kw_only=True)
class FrameFeatureReader:
    """``video``: float32 [B, T, D], stored features of T frames of each clip; ``video_mask``: bool [B, T], as above.

    They come from the sidecar ``name`` of ``jobs/embed_dataset.py frames``; with an empty name from members
    ``frames.npy``, float [T, D], at ``rate`` features per second. ``teacher``, if given, is the required digest of the
    model that made the sidecar; ``width``, if not 0, the required D: a member with another one is unreadable.
    """

    sampling: FrameSampling = FrameSampling()
    name: str = NAME
    rate: float = 1.0
    teacher: str = ""
    width: int = 0
    place: float = 0.5
    seed: int = 0
    key: str = "video"

    def __post_init__(self) -> None:
        require(self.name == "" or self.name.isidentifier(), "name", self.name, "the name of a sidecar, or empty")
        require(self.rate > 0, "rate", self.rate, "more than 0 features per second")
        require(0 <= self.place <= 1, "place", self.place, "0 to 1")

    @property
    def fields(self) -> tuple[str, ...]:
        """``frames.npy`` where there is no sidecar."""
        return () if self.name else (FRAMES_NPY,)

    @property
    def sidecars(self) -> tuple[Wanted, ...]:
        """The sidecar of the frames."""
        facts = {"teacher": self.teacher, "width": self.width}
        facts = {name: value for name, value in facts.items() if value}
        return (Wanted(name=self.name, job=JOB, facts=facts),) if self.name else ()

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """``video``: float32 [t, D], t from 1 to T; raises :class:`UnreadableSample`."""
        stored = self.stored(sample)
        times = self.sampling.frame_times(
            stored.timeline, frame_randoms(self.sampling, self.seed, at), place=self.place
        )
        # Stored times are rounded to single precision, perhaps upwards.
        latest = np.nextafter(np.asarray(times, np.float32) + np.float32(_EARLY), np.float32(np.inf))
        shown = np.maximum(np.searchsorted(stored.times, latest, side="right") - 1, 0)
        return {self.key: torch.from_numpy(stored.features[shown].astype(np.float32))}

    def stored(self, sample: Sample) -> StoredFrames:
        """All stored features of a sample.

        Raises:
            UnreadableSample: none are stored, since the video is not readable, or the member is broken.
        """
        if self.name and self.name not in sample.rows:
            raise UnreadableSample(f"{sample.key} has no row of a sidecar {self.name}; {JOB} makes it")
        found = stored_frames(sample.rows[self.name]) if self.name else _from_npy(sample, self.rate)
        if not len(found.times):
            raise UnreadableSample(f"{sample.key} has no features of frames")
        if self.width not in (0, found.features.shape[1]):
            raise UnreadableSample(f"{sample.key} has {found.features.shape[1]} numbers of a frame, not {self.width}")
        return found

    def collate(self, rows: list[Row]) -> Batch:
        """Both keys; T is the sampling's."""
        return padded_clips([row[self.key] for row in rows], self.sampling.frames, self.key)


def feature_width(snapshot: Snapshot, reader: FrameFeatureReader) -> int:
    """D of the stored features of a snapshot: of its first sample that has some.

    Raises:
        SidecarError: a shard has no such sidecar.
        DataError: no sample has features, or the samples have no such field.
    """
    check_fields(snapshot, reader.fields)
    samples = Samples(snapshot, sidecars=reader.sidecars)
    for number in range(len(samples)):
        try:
            width: int = reader.stored(samples[number]).features.shape[1]
            return width
        except UnreadableSample:
            continue
    raise DataError(f"{snapshot.uri} has no sample with features of frames")


def padded_clips(clips: Sequence[Tensor], frames: int, key: str = "video") -> Batch:
    """``key``: clips [t, ...] of one shape but for t, at most ``frames``, as [B, frames, ...]; ``<key>_mask``.

    Zeros follow the end of a clip, where the mask, bool [B, frames], is False.
    """
    padded = clips[0].new_zeros(len(clips), frames, *clips[0].shape[1:])
    mask = torch.zeros(len(clips), frames, dtype=torch.bool)
    for number, clip in enumerate(clips):
        padded[number, : len(clip)] = clip
        mask[number, : len(clip)] = True
    return {key: padded, f"{key}_mask": mask}


def frame_randoms(sampling: FrameSampling, seed: int, at: SamplePosition | None) -> list[float] | None:
    """The random numbers for the frames of the sample at a position; None where nothing is random."""
    if at is None or not sampling.random:
        return None
    numbers: list[float] = uniform(random_bits(seed, RandomStream.FRAMES, *at, sampling.frames)).tolist()
    return numbers


def _stamps(timeline: Timeline) -> NDArray[np.float64]:
    """From when each frame of a video is shown, in seconds after its begin: float64 [N], N at least 1."""
    if len(timeline.stamps):
        return np.asarray(timeline.stamps, np.float64) - timeline.begin
    count = max(1, timeline.frames)
    return np.arange(count, dtype=np.float64) * (max(timeline.end - timeline.begin, 0.0) / count)


def _from_npy(sample: Sample, rate: float) -> StoredFrames:
    content = sample.fields.get(FRAMES_NPY)
    if content is None:
        raise UnreadableSample(f"{sample.key} has no {FRAMES_NPY}")
    try:
        features = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise UnreadableSample(f"{sample.key}.{FRAMES_NPY} is no array: {error}") from error
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
        raise UnreadableSample(
            f"{sample.key}.{FRAMES_NPY} is {features.dtype} {list(features.shape)}, not floats [T, D]"
        )
    if not np.isfinite(features).all():
        raise UnreadableSample(f"{sample.key}.{FRAMES_NPY} has numbers that are not finite")
    return StoredFrames(np.arange(len(features), dtype=np.float32) / np.float32(rate), features, len(features) / rate)
