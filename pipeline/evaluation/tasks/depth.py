"""Depth from single images, in sets with ``depth.png``: NYUv2 by its own rules, or any other."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config import from_plain, require
from pipeline.evaluation.classes import json_of
from pipeline.evaluation.data import Data, SnapshotData
from pipeline.evaluation.depth import (
    DepthSet,
    as_depth_estimator,
    depth_set_figure,
    evaluate_depth,
)
from pipeline.evaluation.task import SAMPLES, Cache, Column, PreparedSet, Reading, Report, Task, option
from pipeline.loaders.depth import Box, DepthRange
from pipeline.models.depth_words import DepthWords, MapMode
from pipeline.shards.depth_values import DEPTH_FIELD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 4  # images of a figure
IMAGES_AT_ONCE = 4
NAMED_CROPS: dict[str, Box | None] = {
    "none": None,
    "eigen": (45, 471, 46, 601),  # the part of NYUv2's images that the authors' code counts
    "nyu": (56, 472, 60, 604),  # the part that it estimates
}
BINS = '{"word": metres} or {"scene": {"word": metres}}'


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a set. Those of words are for a plain CLIP; a trained method has its own."""

    mode: MapMode = option(
        "released", "depth_mode", "Map of a plain CLIP: released (the authors' code) or projected (into texts' space)."
    )
    words: str = option(
        "auto",
        "depth_words",
        "Words of a plain CLIP with their distances: auto (the paper's), or a JSON file: " + BINS + ".",
    )
    temperature: float = option(1e-3, "depth_temperature", "Temperature of the softmax over words.")
    pixels: Literal["imagenet", "model"] = option("imagenet", "depth_pixels", "Normalisation of a plain CLIP's pixels.")
    crop: str = option(
        "none", "depth_crop", "Counted part of the images: none, eigen (NYUv2's) or TOP:BOTTOM:LEFT:RIGHT in pixels."
    )
    input_crop: str = option("auto", "depth_input_crop", "Part that the model sees: auto (nyu with eigen), none, ...")
    nearest: float = option(1e-3, "depth_nearest", "Distance in metres from which a pixel counts.")
    farthest: float = option(10.0, "depth_farthest", "Distance in metres below which a pixel counts.")
    flip: bool = option(True, "depth_flip", "Average with the mirrored image.")
    scenes: Literal["given", "named"] = option(
        "given", "depth_scenes", "Class of the scene for bins that depend on it: given in the json, or named by CLIP."
    )
    scene_key: str = option("scene")


class DepthEstimation(Task):
    """Errors of estimated depth; ``ready`` is a :class:`~pipeline.evaluation.depth.DepthSet`."""

    report = Report(
        "depth",
        "depth",
        (
            *(Column("delta1", "d < 1.25"), Column("delta2", "d < 1.25^2"), Column("delta3", "d < 1.25^3")),
            *(Column("abs_rel", "abs rel", ".3f"), Column("log10", format=".3f"), Column("rmse", "RMSE (m)", ".3f")),
            SAMPLES,
        ),
    )
    help = "Sets with depth maps, for a method that estimates depth or a CLIP; see --zero-shot."
    rank = 4
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require an estimator or a CLIP with a map."""
        as_depth_estimator(model, type(model).__name__, one.ready.words)

    def prepare(self, config: Config, data: Data, name: str) -> DepthSet:
        """Words, crops and the range; requires data with depth maps."""
        if isinstance(data, SnapshotData):
            known, allowed = DEPTH_FIELD in data.snapshot.fields, f"data with {DEPTH_FIELD}"
            require(known, "depth", data.snapshot.folder, allowed)
        crop = read_crop("depth_crop", config.crop)
        auto = "nyu" if config.crop == "eigen" else "none"
        seen = config.input_crop if config.input_crop != "auto" else auto
        return DepthSet(
            words=read_words(config),
            depth_range=DepthRange(nearest=config.nearest, farthest=config.farthest),
            crop=crop,
            input_crop=read_crop("depth_input_crop", seen),
            flip=config.flip,
            scenes=config.scenes == "given",
            scene_key=config.scene_key,
        )

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """Means over images."""
        estimator = as_depth_estimator(model, type(model).__name__, one.ready.words)
        at_once = min(reading.evaluation_batch, IMAGES_AT_ONCE)
        return evaluate_depth(estimator, one.samples(), one.ready, batch=at_once, threads=reading.evaluation_threads)

    def figures(self, model: Any, one: PreparedSet, title: str) -> dict[str, "Figure"]:
        """``depth``: four images with truth, estimate and error."""
        estimator = as_depth_estimator(model, type(model).__name__, one.ready.words)
        title = f"{one.name} {title}".strip() + ": depth"
        return {"depth": depth_set_figure(estimator, one.samples(SHOWN), one.ready, title)}


def read_crop(field: str, setting: str) -> Box | None:
    """The box (top, bottom, left, right) of a name in ``NAMED_CROPS`` or of four numbers joined by colons.

    Raises:
        SettingError: neither.
    """
    if setting in NAMED_CROPS:
        return NAMED_CROPS[setting]
    parts = setting.split(":")
    allowed = f"one of {', '.join(NAMED_CROPS)}, or TOP:BOTTOM:LEFT:RIGHT in pixels"
    require(len(parts) == 4 and all(part.isdecimal() for part in parts), field, setting, allowed)
    top, bottom, left, right = map(int, parts)
    require(top < bottom and left < right, field, setting, allowed)
    return top, bottom, left, right


def read_words(config: Config) -> DepthWords:
    """The words of a plain CLIP.

    Raises:
        SettingError: a file of another layout.
    """
    chosen = DepthWords(mode=config.mode, word_temperature=config.temperature, pixels=config.pixels)
    if config.words == "auto":
        return chosen
    plain = json_of("depth_words", config.words, BINS)
    nested = isinstance(plain, dict) and bool(plain) and all(isinstance(one, dict) for one in plain.values())
    kind: Any = dict[str, dict[str, float]] if nested else dict[str, float]
    table = from_plain(kind, plain, origin=config.words)
    if not nested:
        return replace(chosen, words=tuple(table), bins=tuple(table.values()))
    words = tuple(next(iter(table.values())))
    same = all(tuple(one) == words for one in table.values())
    require(same, "depth_words", config.words, f"the words {', '.join(words)} in this order for every scene")
    each = tuple(tuple(one.values()) for one in table.values())
    means = tuple(sum(column) / len(column) for column in zip(*each, strict=True))
    return replace(chosen, words=words, bins=means, scenes=tuple(table), scene_bins=each)
