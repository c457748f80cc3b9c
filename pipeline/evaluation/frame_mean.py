"""Videos for models of images: a video's feature is the mean of the unit features of its frames, without training.

Zero-shot meanP of CLIP4Clip (Luo et al., 2021, arXiv 2104.08860, section 3.3): one frame a second, of more than 12 as
many at equal distances. It does not see the order of the frames.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.loaders.batches import Reader
from pipeline.loaders.clip_views import ClipViewsReader, clip_views
from pipeline.loaders.frames import ClipReader, FrameSampling
from pipeline.models.temporal import masked_mean, over_views

SAMPLING = FrameSampling()
AT_ONCE = 256
"""Frames that are encoded at once."""


def frames_reader(model: Any, clips: int = 1, crops: int = 1) -> Reader:
    """The reader of videos, with the model's own transform of images; with several crops a :class:`ClipViewsReader`."""
    reader = ClipReader(transform=model.transforms(train=False), sampling=SAMPLING)
    views = clip_views(reader, clips, crops)
    return reader if len(views) == 1 else ClipViewsReader(views=views)


def encode_frames(model: Any, video: Tensor, mask: Tensor | None = None) -> Tensor:
    """Features float32 [B, D], not normalised, of clips uint8 [B, T, 3, H, W] and their mask, bool [B, T].

    With V views of each clip both have a dimension V after the first: the mean of its views.
    """

    def encode(clips: Tensor, shown: Tensor | None) -> Tensor:
        images = clips.flatten(0, 1)
        frames = torch.cat([model.encode_image(part).float() for part in images.split(AT_ONCE)])
        frames = torch.nn.functional.normalize(frames, dim=-1).unflatten(0, clips.shape[:2])
        seen = frames.new_ones(frames.shape[:2], dtype=torch.bool) if shown is None else shown
        return torch.nn.functional.normalize(masked_mean(frames, seen), dim=-1)

    return over_views(encode, video, mask, 5)
