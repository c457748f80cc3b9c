"""Semantic segmentation by words: exact counts, their metrics, and plain CLIP as a baseline.

The confusion matrix counts all pixels of a set, so metrics do not depend on the batches. The intersection over union of
a class is its number of right pixels over those that have the class in the truth or in the prediction. The mean is over
all classes that occur in either, as in mmsegmentation: a class that is only predicted counts with 0.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.evaluation.data import evaluation_batches
from pipeline.evaluation.encoder import inference
from pipeline.loaders.images import resize
from pipeline.loaders.segmentation import LabelClasses, SegmentationReader
from pipeline.models.class_vectors import class_vectors
from pipeline.models.clip import Clip
from pipeline.models.detections import check_words
from pipeline.models.segments import ImageViews, Segmentation, Segmenter, best_words
from pipeline.shards.objects import plain_word
from pipeline.shards.sample import Sample

IMAGES_AT_ONCE = 4
PATCH_TEMPLATES = ("a photo of a {}.",)
GROUND = "(background)"  # name of the background where no word stands for it


@dataclass(frozen=True)
class SegmentationSet:
    """What a set is evaluated on.

    ``words`` are the classes. ``ground_word``, if there is one, is a further word for the background. Pixels whose best
    word has a probability of less than ``threshold`` are background. ``classes`` makes the truth; its last class is the
    background, which is void unless it is ``classes.unlabelled``.
    """

    words: tuple[str, ...]
    classes: LabelClasses
    ground_word: str = ""
    threshold: float = 0.0
    views: ImageViews | None = None

    @property
    def asked(self) -> tuple[str, ...]:
        """The words that the model is asked for."""
        return (*self.words, self.ground_word) if self.ground_word else self.words

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes of truth and prediction."""
        return (*self.words, self.ground_word or "background")

    @property
    def has_ground(self) -> bool:
        """Whether the truth has a background."""
        return bool(self.classes.unlabelled)

    def predicted(self, found: Segmentation) -> Tensor:
        """Class numbers int16 [H, W] of what a model found; the background is the last one."""
        ground = torch.full_like(found.labels, len(self.words))
        return torch.where(found.below(self.threshold), ground, found.labels)


class Confusion:
    """How many pixels of each class (row) were predicted as each class (column), int64 [C, C]."""

    def __init__(self, classes: int) -> None:
        self.counts = np.zeros((classes, classes), np.int64)

    def add(self, truth: NDArray[Any], predicted: NDArray[Any]) -> None:
        """Count the pixels of an image: class numbers of equal shapes; negative truth is void and left out."""
        size = len(self.counts)
        known = truth >= 0
        pairs = truth[known].astype(np.int64) * size + predicted[known]
        self.counts += np.bincount(pairs, minlength=size * size).reshape(size, size)

    def metrics(self, names: Sequence[str], has_ground: bool) -> dict[str, float]:
        """See :func:`evaluate_segmentation`; the last class is the background. Empty without any pixel."""
        right = np.diag(self.counts)
        union = self.counts.sum(axis=0) + self.counts.sum(axis=1) - right
        labelled, pixels = self.counts.sum(axis=1), self.counts.sum()
        if not pixels:
            return {}
        overlap = np.divide(right, union, where=union > 0, out=np.full(len(right), np.nan))
        counted = slice(None) if has_ground else slice(-1)
        accuracy = (right[labelled > 0] / labelled[labelled > 0]).mean()
        found = {"miou": _mean(overlap[counted]), "miou_foreground": _mean(overlap[:-1])}
        found |= {"pixel_accuracy": float(right.sum() / pixels), "mean_accuracy": float(accuracy)}
        if has_ground:
            found["iou_background"] = _mean(overlap[-1:])
        pairs = zip(names, overlap[:-1], strict=True)
        return found | {f"iou/{_metric_name(name)}": float(value) for name, value in pairs if np.isfinite(value)}


def _mean(values: NDArray[np.float64]) -> float:
    """The mean without NaN; 0 of nothing."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else 0.0


def _metric_name(word: str) -> str:
    return re.sub(r"[^\w.\- ]", "_", plain_word(word)) or "_"


def evaluate_segmentation(
    model: Segmenter,
    samples: Iterable[Sample],
    one: SegmentationSet,
    *,
    batch: int = IMAGES_AT_ONCE,
    threads: int = 4,
    precision: str = "fp32",
) -> dict[str, float]:
    """Segment all images at their stored size.

    Returns:
        ``miou``, with the background if the truth has one; ``miou_foreground``, without it; ``pixel_accuracy``;
        ``mean_accuracy``, over the classes of the truth; ``iou_background``; ``iou/<word>`` of the words that occur;
        ``samples``. All but the last are 0 to 1.

    Raises:
        DataError: no readable sample, labels for another image size, or no pixel with one of the words.
    """
    confusion, count = Confusion(len(one.words) + 1), 0
    for images, maps in labelled_images(samples, one, batch, threads):
        with inference(model, precision):
            found = model.segment(images, one.asked, one.views)
        for truth, some in zip(maps, found, strict=True):
            confusion.add(truth.numpy(), one.predicted(some).numpy())
        count += len(images)
    measured = confusion.metrics(one.words, one.has_ground)
    if not measured:
        first = ", ".join(one.words[:5])
        raise DataError(f"no pixel of {count} images has one of the {len(one.words)} words ({first})")
    return {**measured, "samples": float(count)}


def labelled_images(
    samples: Iterable[Sample], one: SegmentationSet, batch: int, threads: int
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Images, uint8 [3, H, W] in their stored size, and their label maps; unreadable samples are left out."""
    reader = SegmentationReader(classes=one.classes, resize=None)
    for rows in evaluation_batches(samples, (reader,), batch, threads):
        yield rows["image"], rows["labels"]


class PatchSegmenter:
    """Plain CLIP: each patch's token, through the projection of the image's token, is compared with the words.

    The image is squashed to the tower's input. The scores of the patches, at the scale of the CLIP, are resized. Words
    are encoded in one prompt, ``a photo of a {}.``
    """

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def segment(
        self, images: Sequence[Tensor], words: Sequence[str], views: ImageViews | None = None
    ) -> list[Segmentation]:
        """See :class:`~pipeline.models.segments.Segmenter`; views other than the whole image are refused."""
        check_words(words)
        require(views in (None, ImageViews()), "views", views, "the whole image, for the patches of a CLIP")
        new = [word for word in words if word not in self._known]
        if new:
            self._known |= dict(zip(new, class_vectors(self.clip, new, PATCH_TEMPLATES), strict=True))
        device = self.clip.mean.device
        vectors = torch.stack([self._known[word] for word in words]).to(device)
        logits = _PatchLogits(self.clip.logit_scale.exp() * vectors)
        size: tuple[int, int] = self.clip.model.visual.image_size
        squares = [resize(image.permute(1, 2, 0).cpu().numpy(), size) for image in images]
        patches = self.patches(torch.stack(squares).to(device))
        return [
            best_words([one], image.shape[1], image.shape[2], logits, aligned=False)
            for one, image in zip(patches, images, strict=True)
        ]

    def patches(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] of the tower's size to unit vectors of the patches, float32 [B, D, h, w]."""
        visual: VisionTransformer = self.clip.model.visual
        tokens = visual.transformer(visual._embeds((images.float() - self.clip.mean) / self.clip.std))
        tokens = visual.ln_post(tokens)[:, -(visual.grid_size[0] * visual.grid_size[1]) :]
        projected = (tokens if visual.proj is None else tokens @ visual.proj).float()
        unit: Tensor = functional.normalize(projected, dim=-1)
        return unit.transpose(1, 2).reshape(len(unit), -1, *visual.grid_size)


@dataclass(frozen=True)
class _PatchLogits:
    vectors: Tensor

    @property
    def words(self) -> int:
        """The number of words."""
        return len(self.vectors)

    def __call__(self, rows: Tensor) -> Tensor:
        """[D, r, w] to [W, r, w]."""
        found: Tensor = torch.einsum("nd,dhw->nhw", self.vectors, rows)
        return found


def as_segmenter(model: object, address: str) -> Segmenter:
    """``model``, if it has ``segment``, or the patches of a CLIP with open_clip's vision transformer.

    Raises:
        SettingError: neither.
    """
    if callable(getattr(model, "segment", None)):
        return cast(Segmenter, model)
    visual = model.model.visual if isinstance(model, Clip) else None
    plain = isinstance(visual, VisionTransformer) and visual.attn_pool is None
    allowed = "a method with `segment`, or a CLIP with open_clip's vision transformer and without attention pooling"
    require(plain, "checkpoint", address, allowed)
    return PatchSegmenter(cast(Clip, model))
