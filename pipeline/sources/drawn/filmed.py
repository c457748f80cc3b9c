"""One sample with a video: a moving scene as MP4, its captions, and its columns."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.sources.drawn import sets, world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.film import draw_frames, encode_frames
from pipeline.sources.drawn.motion import ACTION_SPLITS, MOTION_SPLITS, MovingScene, action_name, moving_scene
from pipeline.sources.drawn.story import tell
from pipeline.sources.source import Cell, TimedCaption

VIDEO_COLUMNS: Mapping[str, type] = {
    "index": int,
    "split": str,
    "label": str,
    "motion": str,
    "shape": str,
    "variant": str,
    "colour": str,
    "texture": str,
    "style": str,
    "ground": str,
    "objects": int,
    "caption_true": bool,
    "captions": list,
    "timed_captions": TimedCaption,
}


@dataclass(frozen=True, slots=True)
class DrawnClip:
    """The video, the caption and the columns of a sample; ``motion`` is that of its first event."""

    mp4: bytes
    caption: str
    columns: dict[str, Cell]


def draw_clip(split: str, seed: int, index: int, size: int, seconds: float, captions: int = 1) -> DrawnClip:
    """Sample ``index`` of ``split``: a pure function of its arguments.

    ``captions`` of a sample are true of the same clip, but for the wrong ones of ``train`` and ``val``.
    """
    moving = moving_scene(split, Draws(seed, split, index, "motion"), index, size, seconds)
    mp4 = encode_frames(draw_frames(moving, split, seed, index), Draws(seed, split, index, "encoding"))
    pen, plain = Draws(seed, split, index, "story"), split == "events"
    wrong = world.WRONG_CAPTIONS if split in sets.CAPTIONED else 0.0
    stories = [tell(moving, pen, wrong, plain) for _ in range(captions)]
    first = stories[0]
    columns = _columns(split, index, moving)
    columns |= {"caption_true": first.truthful, "captions": [story.text for story in stories]}
    columns["timed_captions"] = [
        TimedCaption(start=round(event.begin, 3), end=round(event.end, 3), text=text)
        for event, text in zip(moving.events, first.events, strict=True)
    ]
    return DrawnClip(mp4, first.text, columns)


def _columns(split: str, index: int, moving: MovingScene) -> dict[str, Cell]:
    look, motion = moving.actors[moving.main].look, moving.events[0].motion
    label = motion if split in MOTION_SPLITS else look.shape
    return {
        "index": index,
        "split": split,
        "label": action_name(look.shape, motion) if split in ACTION_SPLITS else label,
        "motion": motion,
        "shape": look.shape,
        "variant": look.variant,
        "colour": look.colour,
        "texture": look.texture,
        "style": moving.style,
        "ground": moving.ground,
        "objects": len(moving.actors),
    }
