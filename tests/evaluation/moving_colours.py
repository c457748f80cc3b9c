"""A perfect model of videos of three colours, and its samples: the feature of a clip is the mean of its frames'."""

import json
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.loaders.clip_views import ClipViewsReader, clip_views
from pipeline.loaders.frames import ClipReader, FrameSampling
from pipeline.loaders.images import ImageTransform
from tests.evaluation.conftest import COLOURS, ColourModel
from tests.videos import encoded_video

SAMPLING = FrameSampling(mode="segments", frames=4)


class MovingColourModel(ColourModel):
    """Adds videos to the perfect model of colours."""

    encodes: tuple[str, ...] = ("video", "text")
    prompt_templates = ("{}", "a video of {}")

    def video_reader(self, clips: int = 1, crops: int = 1) -> ClipReader | ClipViewsReader:
        """Four frames of 16 pixels a side."""
        reader = ClipReader(transform=ImageTransform(size=(16, 16)), sampling=SAMPLING)
        views = clip_views(reader, clips, crops)
        return reader if len(views) == 1 else ClipViewsReader(views=views)

    def encode_video(self, video: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean of the frames that the mask shows; of several views their mean."""
        if video.ndim == 6:
            found = self.encode_video(video.flatten(0, 1), None if mask is None else mask.flatten(0, 1))
            return found.unflatten(0, video.shape[:2]).mean(dim=1)
        assert mask is not None
        frames = self.encode_image(video.flatten(0, 1)).unflatten(0, video.shape[:2]) * mask[..., None]
        return functional.normalize(frames.sum(dim=1), dim=-1)


class PairModel(MovingColourModel):
    """The same, but clips and texts are only compared pair by pair: by the largest score of a frame."""

    encodes = ()
    scores_pairs = ("video", "text")

    def pair_features(self, medium: str, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Texts [B, 3], or frames [B, T, 4] with their mask."""
        if medium == "text":
            return self.encode_text(inputs)
        assert mask is not None
        frames = self.encode_image(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
        return torch.cat([frames, mask[..., None].float()], dim=-1)

    def pair_scores(self, clips: Tensor, texts: Tensor) -> Tensor:
        """[V, N]."""
        scores = torch.einsum("vtd,nd->vtn", clips[..., :-1], texts)
        return scores.masked_fill(clips[..., -1:] == 0, -1).amax(dim=1)


def video(*colours: str, side: tuple[int, int] = (16, 16)) -> bytes:
    """A second of each colour, four frames a second."""
    frames = np.stack([np.full((*side, 3), COLOURS[colour], np.uint8) for colour in colours for _ in range(4)])
    return encoded_video(frames, unit=Fraction(1, 4), options={"crf": "1"}, pixels="yuv444p")


def sample(*colours: str, caption: str | None = None, **record: Any) -> dict[str, bytes]:
    """Fields of a video of these colours; its label is the first."""
    text = f"a {colours[0]} one" if caption is None else caption
    return {
        "mp4": video(*colours),
        "txt": text.encode(),
        "json": json.dumps({"label": colours[0], **record}).encode(),
    }
