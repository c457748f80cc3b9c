"""Groups of pixels that a method makes before it names them, against the masks of the truth.

The oracle gives each group of an image the class with which it has most pixels in common, the background included. Its
mean intersection over union M* is the best that any naming of these groups can be expected to reach; with that of the
method's own words, M,

    naming error    M* - M       how much better the same groups would be with the right names
    grouping error  1 - M*       what no names can mend

``mask_miou`` is the mean, over all images and all classes in them, of the largest intersection over union of the class
with a single group. Void pixels count nowhere. The oracle is this project's definition; GroupViT (arXiv 2202.11094)
has no public code for its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.pixel_counts import PixelCounts
from pipeline.evaluation.segmentation import IMAGES_AT_ONCE, SegmentationSet, labelled_images, no_pixels
from pipeline.loaders.segmentation import VOID
from pipeline.models.segments import Grouper
from pipeline.shards.sample import Sample


def as_grouper(model: object, address: str) -> Grouper:
    """``model``, if it has ``groups``.

    Raises:
        SettingError: it has not.
    """
    allowed = f"a method that groups pixels; {type(model).__name__} has no groups"
    require(callable(getattr(model, "groups", None)), "checkpoint", address, allowed)
    return cast(Grouper, model)


@dataclass
class StageCounts:
    """What the oracle makes of the groups of one stage."""

    counts: PixelCounts
    best: list[float] = field(default_factory=list)  # of each class of an image, its IoU with the best group
    groups: list[int] = field(default_factory=list)  # of each image, its groups that have a pixel

    def add(self, truth: NDArray[Any], groups: NDArray[Any]) -> None:
        """Count an image: class numbers int16 [H, W], negative where void, and group numbers of the same shape."""
        if truth.shape != groups.shape:
            raise ValueError(f"groups of {groups.shape} for an image of {truth.shape}")
        self.groups.append(len(np.unique(groups)))
        common = shared_pixels(truth, groups, len(self.counts.right))
        self.counts.add(truth, common.argmax(axis=1)[groups])
        union = common.sum(axis=1, keepdims=True) + common.sum(axis=0) - common
        overlap = np.divide(common, union, where=union > 0, out=np.zeros(common.shape))
        self.best += overlap.max(axis=0)[common.sum(axis=0) > 0].tolist()


def shared_pixels(truth: NDArray[Any], groups: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """How many pixels each group (row) has in common with each class (column), int64 [G, C], without void pixels."""
    size = int(groups.max(initial=0)) + 1
    known = truth != VOID
    pairs = groups[known].astype(np.int64) * classes + truth[known]
    return np.bincount(pairs, minlength=size * classes).reshape(size, classes)


def evaluate_grouping(
    model: Grouper,
    samples: Iterable[Sample],
    one: SegmentationSet,
    *,
    batch: int = IMAGES_AT_ONCE,
    threads: int = 4,
    precision: str = "fp32",
) -> dict[str, float]:
    """Group and segment all images at their stored size.

    Returns:
        ``miou`` of the method's words, and for the last stage of grouping ``oracle_miou``, ``naming_error``,
        ``grouping_error``, ``mask_miou`` and ``groups``, the mean number of groups of an image; the same of every
        stage, ``oracle_miou_stage1`` and so on; ``samples``. The mean intersections over union include the background
        if the truth has one.

    Raises:
        DataError: no readable sample, labels for another image size, or no pixel with one of the words.
    """
    classes = len(one.words) + 1
    own, images, stages = PixelCounts(classes), 0, list[StageCounts]()
    for together, maps in labelled_images(samples, one, batch, threads):
        with inference(model, precision):
            found, grouped = model.segment(together, one.asked, one.views), model.groups(together)
        for truth, some, groups in zip(maps, found, grouped, strict=True):
            own.add(truth.numpy(), one.predicted(some).numpy())
            stages = stages or [StageCounts(PixelCounts(classes)) for _ in groups]
            for stage, numbers in zip(stages, groups, strict=True):
                stage.add(truth.numpy(), numbers.numpy())
        images += len(together)
    measured = own.metrics(one.words, one.has_ground)
    if not measured:
        raise no_pixels(images, one.words)
    miou, named = measured["miou"], [_stage_metrics(stage, one, measured["miou"]) for stage in stages]
    numbered = {f"{key}_stage{place}": value for place, some in enumerate(named, 1) for key, value in some.items()}
    return {"miou": miou, **(named[-1] if named else {}), **numbered, "samples": float(images)}


def _stage_metrics(stage: StageCounts, one: SegmentationSet, miou: float) -> dict[str, float]:
    oracle = stage.counts.metrics(one.words, one.has_ground)["miou"]
    errors = {"naming_error": oracle - miou, "grouping_error": 1 - oracle}
    return {
        "oracle_miou": oracle,
        **errors,
        "mask_miou": float(np.mean(stage.best)),
        "groups": float(np.mean(stage.groups)),
    }
