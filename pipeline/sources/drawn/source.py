"""The source `drawn`: any split of the embedded world, rendered on the workers."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

from pipeline.config import require, to_json
from pipeline.shards.depth_values import DEPTH_FIELD
from pipeline.shards.storage import Folder
from pipeline.sources.drawn import digits, sets, truth
from pipeline.sources.drawn.annotators import MOST_ANNOTATORS
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.filmed import VIDEO_COLUMNS, draw_clip
from pipeline.sources.drawn.hearing import write_heard
from pipeline.sources.drawn.motion import FILMED_SPLITS, MOTION_SPLITS
from pipeline.sources.drawn.room_sample import ROOM_COLUMNS, ROOM_SPLITS, draw_room
from pipeline.sources.drawn.sample import Value, columns_of, draw_sample
from pipeline.sources.drawn.scenes import Scene
from pipeline.sources.drawn.solids import SOLID_COLUMNS, SOLID_SPLITS, draw_solid, solid_class
from pipeline.sources.drawn.sound import draw_sound
from pipeline.sources.drawn.truth import Record
from pipeline.sources.drawn.world import NOVEL_SHAPES, WORLD_VERSION, WRONG_CAPTIONS
from pipeline.sources.source import SOUND_UNCHANGED, UNCHANGED, VIDEO_UNCHANGED, Part, Row, Slice

logger = logging.getLogger(__name__)

SIZES = (64, 512)
SoundOption = Literal["none", "beside", "alone", "mixed"]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Samples ``first`` to ``first + samples - 1`` of a split.

    Rows carry the image as JPEG and, in ``boxes.json``, what :mod:`~pipeline.sources.drawn.truth` describes; with
    ``sound``, also or instead what is heard as FLAC, see :mod:`~pipeline.sources.drawn.sound`. With ``video`` they
    carry a clip of a moving scene as MP4 instead, see :mod:`~pipeline.sources.drawn.motion`; with ``points`` a point
    cloud of a solid, see :mod:`~pipeline.sources.drawn.solids`; with ``depth`` objects in rooms and their
    ``depth.png``, see :mod:`~pipeline.sources.drawn.rooms`.
    """

    kind: ClassVar[str] = "drawn"
    summary: ClassVar[str] = "Samples of the embedded world, drawn as they are needed."
    image_options: ClassVar[Mapping[str, Any]] = UNCHANGED
    audio_options: ClassVar[Mapping[str, Any]] = SOUND_UNCHANGED
    video_options: ClassVar[Mapping[str, Any]] = VIDEO_UNCHANGED
    has_captions: ClassVar[bool] = True

    split: str = "train"
    """Split to draw: train, val, a test split or a small set (`shapes`, `digits`, ...), see datasets/drawn*.yaml."""
    samples: int = 10_000
    """Number of samples, at least 1. Unlimited, except `digits_real` (797) and `digits_real_train` (1000)."""
    first: int = 0
    """Index of the first sample, 0 or more; raise it to draw further samples of the same split."""
    size: int = 128
    """Width and height in pixels, 64 to 512."""
    seed: int = 0
    """Random seed, 0 or more; another seed gives other samples of the same distribution."""
    truth: Literal["all", "base", "none"] = "all"
    """Annotations besides the caption: of all shapes, of the base shapes only, or none."""
    captions: int = 1
    """Captions per sample, 1 to 5; all but the first are in `boxes.json` only."""
    questions: int = 4
    """Questions per sample, 0 to 7."""
    annotators: int = 1
    """Answers per question, 1 to 10: one that is right, or those of several annotators who differ and make mistakes."""
    sound: SoundOption = "none"
    """none: images with captions; beside: a sound for each of them; alone: sounds with captions of what is heard, no
    images; mixed: image and text, sound and text, image and sound, or all three, a quarter each. In a mixed set a sound
    with a novel shape never has a text: its class can be known only by way of the image."""
    sound_seconds: float = 2.0
    """Length of the sounds, 0.5 to 60."""
    video: bool = False
    """Draw videos of moving scenes instead of images. The splits motions, motions_train, events, seen_actions,
    seen_actions_train and unseen_actions need it; train, val, shapes and shapes_train allow it."""
    clip_seconds: float = 3.0
    """Length of the videos, 1 to 60; clips of several events need a second for each."""
    points: bool = False
    """Draw point clouds of solids instead of images. The splits solids, solids_train and novel_solids need it; train
    and val allow it, without novel solids."""
    cloud_points: int = 1024
    """Points of a cloud, 16 to 100,000."""
    depth: bool = False
    """Draw objects that stand in rooms, with the distance of every pixel as depth.png and captions that say how far
    objects are. For the splits train and val."""

    def __post_init__(self) -> None:
        kind, splits = self._splits()
        require(self.split in splits, "split", self.split, kind + ", ".join(splits))
        require(self.video or self.split not in MOTION_SPLITS, "video", self.video, f"true with {self.split}")
        require(self.samples >= 1, "samples", self.samples, "at least 1")
        require(self.first >= 0, "first", self.first, "0 or more")
        require(SIZES[0] <= self.size <= SIZES[1], "size", self.size, f"{SIZES[0]} to {SIZES[1]}")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2**63 - 1")
        require(1 <= self.captions <= 5, "captions", self.captions, "1 to 5")
        require(0 <= self.questions <= 7, "questions", self.questions, "0 to 7")
        require(1 <= self.annotators <= MOST_ANNOTATORS, "annotators", self.annotators, f"1 to {MOST_ANNOTATORS}")
        require(self.sound in get_args(SoundOption), "sound", self.sound, "one of " + ", ".join(get_args(SoundOption)))
        scenes = self.points or sets.recipe_name(self.split) not in sets.IMAGE_SETS
        require(scenes or self.sound == "none", "sound", self.sound, f"none with {self.split}, which has no scenes")
        require(0.5 <= self.sound_seconds <= 60, "sound_seconds", self.sound_seconds, "0.5 to 60")
        require(1 <= self.clip_seconds <= 60, "clip_seconds", self.clip_seconds, "1 to 60")
        require(not self.video or self.sound == "none", "sound", self.sound, "none with video")
        require(not self.video or self.truth == "all", "truth", self.truth, "all with video")
        require(16 <= self.cloud_points <= 100_000, "cloud_points", self.cloud_points, "16 to 100,000")
        alone = not self.points or (self.sound == "none" and not self.video and self.truth == "all")
        require(alone, "points", self.points, "false with sound, video or another truth than all")
        self._check_depth()
        require(not self.video or self.size % 2 == 0, "size", self.size, "an even number with video")
        require(self._end() > self.first, "first", self.first, f"less than {self._end()}, the size of {self.split}")

    def _check_depth(self) -> None:
        known = not self.depth or self.split in ROOM_SPLITS
        require(known, "split", self.split, f"one of {', '.join(ROOM_SPLITS)} with depth")
        alone = not (self.depth and (self.video or self.points))
        require(alone, "depth", self.depth, "false with video or points")
        require(not self.depth or self.sound == "none", "sound", self.sound, "none with depth")

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers the world's version and the options."""
        end = self._end()
        if end < self.first + self.samples:
            logger.warning("%s ends at sample %d; the request for %d is cut", self.split, end, self.samples)
        for start in range(self.first, end, rows_per_shard):
            count = min(rows_per_shard, end - start)
            yield Slice(count=count, digest=self._digest(start, count), where={"start": start})

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; no row has a problem."""
        start = int(piece.where["start"])
        for index in range(start, start + piece.count):
            yield self._row(index)

    def schema(self) -> Mapping[str, type]:
        """The columns of :func:`~pipeline.sources.drawn.sample.columns_of`, or of a clip."""
        if self.video:
            return VIDEO_COLUMNS
        if self.points:
            return SOLID_COLUMNS
        if self.depth:
            return ROOM_COLUMNS
        columns = columns_of(self.split)
        return columns if self.sound == "none" else {**columns, "sounds": int}

    def labels(self) -> list[str]:
        """The class of every sample, in order; empty for splits whose classes are sampled by frequency."""
        numbers = range(self.first, self._end())
        if self.points:
            return [solid_class(self.split, number) for number in numbers]
        named = (sets.wanted_class(self.split, number) for number in numbers)
        return [name for name in named if name is not None]

    def _splits(self) -> tuple[str, tuple[str, ...]]:
        """The splits that the options allow, with the beginning of the message."""
        if self.points:
            return "with points one of ", tuple(SOLID_SPLITS)
        if self.video:
            return "with video one of ", FILMED_SPLITS
        return "one of ", (*sets.SPLITS, *MOTION_SPLITS)

    def _end(self) -> int:
        end = self.first + self.samples
        if not self.points and sets.recipe_name(self.split) == "digits_real":
            return min(end, len(digits.scans(self.split.endswith("_train"))))
        return end

    def _digest(self, start: int, count: int) -> str:
        # The digest leaves out the range of the request: a longer request keeps its first shards.
        one = Drawn(
            split=self.split,
            samples=count,
            first=start,
            size=self.size,
            seed=self.seed,
            truth=self.truth,
            captions=self.captions,
            questions=self.questions,
            annotators=self.annotators,
            sound=self.sound,
            sound_seconds=self.sound_seconds,
            video=self.video,
            clip_seconds=self.clip_seconds,
            points=self.points,
            cloud_points=self.cloud_points,
            depth=self.depth,
        )
        # Without sounds, videos, clouds, depth or annotators the digest is that of the versions that had none: their
        # folders stay valid.
        left_out = {"sound", "sound_seconds"} if self.sound == "none" else set()
        left_out |= set() if self.video else {"video", "clip_seconds"}
        left_out |= set() if self.points else {"points", "cloud_points"}
        left_out |= set() if self.depth else {"depth"}
        left_out |= set() if self.annotators > 1 else {"annotators"}
        options = {name: value for name, value in asdict(one).items() if name not in left_out}
        return hashlib.sha256(f"drawn {WORLD_VERSION} {to_json(options)}".encode()).hexdigest()

    @property
    def media(self) -> tuple[str, ...]:
        """The media of the rows' parts."""
        if self.video:
            return ("video",)
        if self.points:
            return ("points",)
        return {"none": ("image",), "alone": ("audio",)}.get(self.sound, ("image", "audio"))

    def _row(self, index: int) -> Row:
        url = f"drawn://{self.split}/{self.seed}/{index}"
        if self.video:
            clip = draw_clip(self.split, self.seed, index, self.size, self.clip_seconds, self.captions)
            return Row(url=url, caption=clip.caption, parts=(Part("video", clip.mp4),), columns=clip.columns)
        if self.points:
            solid = draw_solid(self.split, self.seed, index, self.cloud_points, self.captions)
            return Row(url=url, caption=solid.caption, parts=(Part("points", solid.points),), columns=solid.columns)
        if self.depth:
            return self._room(url, index)
        sample = draw_sample(self.split, self.seed, index, self.size, self.captions, self.questions, self.annotators)
        columns: dict[str, Value | float] = self._columns(sample.columns)
        members = self._members(sample.record)
        if self.sound == "none":
            parts = (Part("image", sample.image),)
            return Row(url=url, caption=sample.caption, parts=parts, columns=columns, members=members)
        scene = sets.scene_of(self.split, Draws(self.seed, self.split, index, "scene"), index, self.size)
        sound = draw_sound(scene, self.split, self.seed, index, self.sound_seconds)
        has_image, has_sound, has_text = self._kind_of(scene, index)
        image = (Part("image", sample.image),) if has_image else ()
        audio = (Part("audio", sound.flac),) if has_sound else ()
        caption = sample.caption
        if not has_image:
            wrong = WRONG_CAPTIONS if self.split in sets.CAPTIONED else 0.0
            pen = Draws(self.seed, self.split, index, "heard")
            caption, columns["caption_true"] = write_heard(scene, sound, pen, wrong)
        columns["sounds"] = len(scene.objects) if has_sound and not sound.silent else 0
        return Row(
            url=url,
            caption=caption if has_text else "",
            parts=image + audio,
            columns=columns,
            members=members if has_image else {},
        )

    def _room(self, url: str, index: int) -> Row:
        room = draw_room(self.split, self.seed, index, self.size, self.captions, self.questions, self.annotators)
        members = {DEPTH_FIELD: room.depth, **self._members(room.record)}
        columns = self._columns(room.columns)
        return Row(url=url, caption=room.caption, parts=(Part("image", room.image),), columns=columns, members=members)

    def _kind_of(self, scene: Scene, index: int) -> tuple[bool, bool, bool]:
        """Whether a sample has an image, a sound and a text."""
        if self.sound != "mixed":
            return self.sound == "beside", True, True
        kinds = [(True, False, True), (True, True, False), (False, True, True), (True, True, True)]
        novel = any(obj.look.shape in NOVEL_SHAPES for obj in scene.objects)
        return Draws(self.seed, self.split, index, "kinds").pick(kinds[:2] if novel else kinds)

    def _members(self, record: Record | None) -> dict[str, bytes]:
        if record is None or self.truth == "none":
            return {}
        return {"boxes.json": truth.to_bytes(truth.only_base(record) if self.truth == "base" else record)}

    def _columns(self, columns: Mapping[str, Value | float]) -> dict[str, Value | float]:
        """The columns; the label is null where ``truth`` hides it."""
        hidden = self.truth == "none" or (self.truth == "base" and columns.get("shape") in NOVEL_SHAPES)
        secret = ("label", "shape", "variant") if hidden else ()
        return {name: None if name in secret else value for name, value in columns.items()}
