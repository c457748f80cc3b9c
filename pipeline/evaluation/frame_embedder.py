"""An image tower that computes features of the frames of videos, for ``stages/annotate/frame_features.py`` and search.

Frames are taken at a fixed rate from the start of a video, as CLIP4Clip takes one a second.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import require
from pipeline.errors import SampleError
from pipeline.evaluation.embedder import Precision
from pipeline.evaluation.encoder import Evaluable, inference
from pipeline.evaluation.media import encoded_media
from pipeline.evaluation.models import load_any
from pipeline.evaluation.zero_shot import classifier
from pipeline.loaders.frames import DECODED
from pipeline.models.adapters.adapter import FrozenClip
from pipeline.models.clip import Clip
from pipeline.models.towers.weights import digest_of
from pipeline.shards.media import VIDEO
from pipeline.shards.sample import Sample
from pipeline.shards.video_frames import Timeline, read_frames
from pipeline.stages.annotate.frame_features import DecodedFrames

PART = 64
"""Frames that are decoded at once: those of a long video are not in memory together."""
AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class FrameRate:
    """Which frames of a video get features."""

    frames_per_second: float = 1.0
    """Frames per second of video, more than 0, at most 60; counted from the start of each video."""

    def __post_init__(self) -> None:
        rate = self.frames_per_second
        require(0 < rate <= 60, "frames_per_second", rate, "more than 0, at most 60")

    def count(self, timeline: Timeline) -> int:
        """Number of frames of a video: at least one."""
        return max(1, int(np.ceil((timeline.end - timeline.begin) * self.frames_per_second - 1e-6)))

    def times(self, timeline: Timeline, part: int) -> list[float]:
        """Seconds of the frames of one part."""
        numbers = range(part * PART, min((part + 1) * PART, self.count(timeline)))
        return [timeline.begin + number / self.frames_per_second for number in numbers]


@dataclass(frozen=True, kw_only=True)
class LoadFrameEmbedder:
    """Loads the model at ``checkpoint`` (see :func:`pipeline.evaluation.models.load_any`) when it is called."""

    checkpoint: str
    device: str = "auto"
    precision: Precision = "fp32"
    rate: FrameRate = FrameRate()

    def __call__(self, threads: int) -> "FrameEmbedder":
        """``threads`` is the number of CPU threads for the model, if it does not run on a GPU.

        Raises:
            SettingError: no such checkpoint, or a model that encodes no images.
        """
        model = load_any(self.checkpoint, self.device)
        if not torch.cuda.is_available() or self.device == "cpu":
            torch.set_num_threads(threads)
        return FrameEmbedder(model, self.rate, self.precision)


class FrameEmbedder:
    """The image encoder of a model with its evaluation transform.

    Features of a CLIP are those of its tower, not normalised; those of other methods are as they encode images.
    """

    def __init__(self, model: Any, rate: FrameRate, precision: Precision = "fp32") -> None:
        able = ", ".join(encoded_media(model)) or "nothing"
        require("image" in encoded_media(model), "checkpoint", able, "a model that encodes images")
        self._model, self._rate, self._precision = cast(Evaluable, model), rate, precision
        self._clip = FrozenClip(model, classifier) if isinstance(model, Clip) else None
        self._transform = self._model.transforms(train=False)
        teacher = digest_of(model, repr(self._transform), precision)
        self.maker = digest_of(None, teacher, f"{rate.frames_per_second} frames a second")
        size = self._transform.size
        width = self.encode([torch.zeros((1, 3, *size), dtype=torch.uint8)]).shape[1]
        self.facts: Mapping[str, Any] = {
            "teacher": teacher,
            "width": width,
            "frames_per_second": rate.frames_per_second,
        }

    def decode(self, sample: Sample, part: int) -> DecodedFrames | None:
        """uint8 [t, 3, H, W], t at most ``PART``; ``None`` for a sample without a readable video."""
        body = sample.body(VIDEO)
        if body is None:
            return None
        timelines: list[Timeline] = []

        def times(timeline: Timeline) -> list[float]:
            timelines.append(timeline)
            return self._rate.times(timeline, part)

        try:
            frames = read_frames(body, times, size=DECODED * min(self._transform.size))
        except SampleError:
            return None
        pixels = torch.stack([self._transform(frame) for frame in frames.pixels])
        more = self._rate.count(timelines[0]) > (part + 1) * PART
        return DecodedFrames(pixels, frames.times, timelines[0].end, more)

    def encode(self, pixels: Sequence[Tensor]) -> NDArray[np.float32]:
        """uint8, several times [t, 3, H, W], to float32 [N, D]."""
        with inference(self._model, self._precision) as device:
            parts = torch.cat(list(pixels)).split(AT_ONCE)
            features = torch.cat([self._features(part.to(device)).float().cpu() for part in parts])
        array: NDArray[np.float32] = features.numpy()
        return array

    def _features(self, images: Tensor) -> Tensor:
        return self._model.encode_image(images) if self._clip is None else self._clip.raw_features(images)
