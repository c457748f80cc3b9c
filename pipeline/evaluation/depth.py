"""The metrics of depth maps, by the rules of NYUv2's evaluations."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from logging import getLogger
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.evaluation.data import evaluation_batches
from pipeline.evaluation.encoder import inference
from pipeline.loaders.depth import Box, DepthRange, DepthReader
from pipeline.loaders.depth_figures import depth_figure
from pipeline.loaders.samples import UnreadableSample
from pipeline.models.clip import Clip
from pipeline.models.depth_words import DepthEstimator, DepthWords, zero_shot_depth
from pipeline.shards.sample import Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = getLogger(__name__)

METRICS = ("delta1", "delta2", "delta3", "abs_rel", "log10", "rmse")
STEP = 1.25
LEAST = 1e-3  # metres: an estimate below it counts as this


@dataclass(frozen=True, kw_only=True)
class DepthSet:
    """What a set is evaluated on; the boxes are (top, bottom, left, right) in pixels.

    The model sees ``input_crop`` of each image. Pixels outside of it, or of ``crop``, are not counted.
    """

    words: DepthWords = DepthWords()
    depth_range: DepthRange = DepthRange()
    crop: Box | None = None
    input_crop: Box | None = None
    flip: bool = True
    scenes: bool = True
    """Whether the class of the scene is that in the samples' json; the model names it otherwise."""
    scene_key: str = "scene"


def evaluate_depth(
    model: DepthEstimator,
    samples: Iterable[Sample],
    one: DepthSet,
    *,
    batch: int = 4,
    threads: int = 4,
) -> dict[str, float]:
    """The mean over images of each of ``METRICS``, and ``samples``.

    Raises:
        DataError: no readable sample with a valid pixel.
    """
    total, count, known = dict.fromkeys(METRICS, 0.0), 0, 0
    for rows in _estimated_batches(model, samples, one, batch, threads):
        for truth, found, valid in zip(rows["depth"], rows["found"], rows["valid"], strict=True):
            for name, value in depth_metrics(truth[valid], found[valid], one.depth_range.farthest).items():
                total[name] += value
        count, known = count + len(rows["scene"]), known + int((rows["scene"] >= 0).sum())
    if one.scenes and len(model.scenes) > 1 and not known:
        message = "no %r of %d samples is one of the model's %d classes of scenes: depth is by the mean of their bins"
        logger.warning(message, one.scene_key, count, len(model.scenes))
    return {**{name: value / count for name, value in total.items()}, "samples": float(count)}


def depth_metrics(truth: Tensor, found: Tensor, farthest: float) -> dict[str, float]:
    """The metrics of an image's valid pixels, float [N] in metres; estimates are clamped to 0.001 and ``farthest``.

    ``delta1`` to ``delta3``: part of the pixels whose larger ratio of both is below 1.25, 1.25^2 and 1.25^3.
    """
    truth = truth.double()
    found = found.double().clamp(LEAST, farthest)
    ratio, gap = torch.maximum(truth / found, found / truth), found - truth
    return {
        **{f"delta{power}": float((ratio < STEP**power).double().mean()) for power in (1, 2, 3)},
        "abs_rel": float((gap.abs() / truth).mean()),
        "log10": float((found.log10() - truth.log10()).abs().mean()),
        "rmse": float((gap**2).mean().sqrt()),
    }


def estimated_images(
    model: DepthEstimator, samples: Iterable[Sample], one: DepthSet, batch: int, threads: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Image, truth, estimate and counted pixels: uint8 [3, H, W], float32 [H, W] in metres twice, bool [H, W].

    They are those of ``input_crop``. Images without a counted pixel are left out.
    """
    for rows in _estimated_batches(model, samples, one, batch, threads):
        yield from zip(rows["image"], rows["depth"], rows["found"], rows["valid"], strict=True)


def _estimated_batches(
    model: DepthEstimator, samples: Iterable[Sample], one: DepthSet, batch: int, threads: int
) -> Iterator[dict[str, Any]]:
    """Batches of :class:`CroppedDepthReader`, with the estimates as ``found``."""
    reader = CroppedDepthReader(
        size=None,
        depth_range=one.depth_range,
        crop=one.input_crop,
        counted=one.crop,
        scenes=model.scenes,
        scene_key=one.scene_key,
    )
    for rows in evaluation_batches(samples, (reader,), batch, threads):
        with inference(model):
            scenes = rows["scene"].tolist() if one.scenes else None
            found = model.estimate_depth(rows["image"], scenes, one.flip)
        yield {**rows, "found": found}


@dataclass(frozen=True, kw_only=True)
class CroppedDepthReader(DepthReader):
    """Valid pixels are also in the box ``counted`` of the stored image."""

    counted: Box | None = None

    def select(self, valid: Tensor, key: str) -> Tensor:
        """Bool [H, W] of the crop, without the pixels outside of ``counted``.

        Raises:
            UnreadableSample: all pixels are outside.
        """
        if self.counted is None:
            return valid
        top, bottom, left, right = self.counted
        above, before = (self.crop[0], self.crop[2]) if self.crop else (0, 0)
        rows, columns = valid.shape
        if top >= above + rows or left >= before + columns or bottom <= above or right <= before:
            seen = f"rows {above} to {above + rows} and columns {before} to {before + columns}"
            box = f"{top}:{bottom}:{left}:{right}"
            raise UnreadableSample(f"the counted crop {box} is outside of the image of sample {key}, {seen}")
        inside = torch.zeros_like(valid)
        inside[max(0, top - above) : max(0, bottom - above), max(0, left - before) : max(0, right - before)] = True
        return valid & inside


def depth_set_figure(model: DepthEstimator, samples: Iterable[Sample], one: DepthSet, title: str) -> "Figure":
    """Images with truth, estimate and error."""
    return depth_figure(list(estimated_images(model, samples, one, batch=2, threads=2)), title=title)


def as_depth_estimator(model: object, address: str, words: DepthWords) -> DepthEstimator:
    """``model``, if it has ``estimate_depth``, or a CLIP with these words.

    Raises:
        SettingError: neither, or a CLIP without a map.
    """
    if callable(getattr(model, "estimate_depth", None)):
        return cast(DepthEstimator, model)
    if not isinstance(model, Clip):
        raise SettingError("checkpoint", address, "a method with `estimate_depth`, or a CLIP")
    return zero_shot_depth(model, words, address)
