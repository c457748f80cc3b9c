"""Semantic segmentation by words: exact counts, their metrics, and plain CLIP as a baseline.

The counts are those of all pixels of a set, so metrics do not depend on the batches. The intersection over union of a
class is its number of right pixels over those that have the class in the truth or in the prediction. The mean is over
all classes that occur in either, as in mmsegmentation: a class that is only predicted counts with 0.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, cast

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.evaluation.background import Background, ThresholdCounts
from pipeline.evaluation.data import evaluation_batches
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.pixel_counts import CountedPart, PixelCounts, sum_of_parts
from pipeline.loaders.images import resize
from pipeline.loaders.label_figures import label_figure
from pipeline.loaders.segmentation import LabelClasses, SegmentationReader
from pipeline.models.class_vectors import class_vectors
from pipeline.models.clip import Clip
from pipeline.models.segments import (
    Grouper,
    ImageViews,
    Segmentation,
    Segmenter,
    best_words,
    check_segment_words,
)
from pipeline.shards.sample import Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES_AT_ONCE = 4
WHOLE = CountedPart()
PATCH_TEMPLATES = ("a photo of a {}.",)
GROUND = "(background)"  # name of the background where no word stands for it


@dataclass(frozen=True)
class SegmentationSet:
    """What a set is evaluated on.

    ``words`` are the classes. ``ground_word``, if there is one, is a further word for the background. ``background`` is
    the rule by which other pixels are background. ``classes`` makes the truth; its last class is the background, which
    is void unless it is ``classes.unlabelled``.
    """

    words: tuple[str, ...]
    classes: LabelClasses
    ground_word: str = ""
    background: Background = Background()
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
        return torch.where(self.background.where(found), ground, found.labels)


def evaluate_segmentation(
    model: Segmenter,
    samples: Iterable[Sample],
    one: SegmentationSet,
    *,
    batch: int = IMAGES_AT_ONCE,
    threads: int = 4,
    precision: str = "fp32",
    part: CountedPart = WHOLE,
    identity: str = "",
) -> dict[str, float]:
    """Segment all images, or those of a part, at their stored size.

    ``identity`` is the digest of the model, which all parts must share.

    Returns:
        ``miou``, with the background if the truth has one; ``miou_foreground``, without it; ``pixel_accuracy``;
        ``mean_accuracy``, over the classes of the truth; ``iou_background``; ``iou/<word>`` of the words that occur;
        ``samples``. All but the last are 0 to 1. With parts they are those of all parts that exist by now.

    Raises:
        DataError: no readable sample, labels for another image size, or no pixel with one of the words.
    """
    counts, images = PixelCounts(len(one.words) + 1), 0
    for truth, found in segmented_images(model, samples, one, batch, threads, precision, part):
        counts.add(truth.numpy(), one.predicted(found).numpy())
        images += 1
    if part.count > 1:
        counts, images = sum_of_parts(counts, images, part, {"words": list(one.names), "model": identity})
    measured = counts.metrics(one.words, one.has_ground)
    if not measured:
        raise no_pixels(images, one.words)
    return {**measured, "samples": float(images)}


def learned_background(
    model: Segmenter,
    samples: Iterable[Sample],
    one: SegmentationSet,
    *,
    batch: int = IMAGES_AT_ONCE,
    threads: int = 4,
    precision: str = "fp32",
) -> Background:
    """The threshold of each word with its largest intersection over union on ``samples``.

    Raises:
        DataError: no readable sample, or no pixel with one of the words.
    """
    counts, images = ThresholdCounts(len(one.words)), 0
    for truth, found in segmented_images(model, samples, one, batch, threads, precision):
        counts.add(truth.numpy(), found, one.background.relative)
        images += 1
    if not counts.labelled.any():
        raise no_pixels(images, one.words)
    return Background((*counts.best(), *(0.0 for _ in one.asked[len(one.words) :])), one.background.relative)


def no_pixels(images: int, words: Sequence[str]) -> DataError:
    """The error for labels that have none of the words."""
    return DataError(f"no pixel of {images} images has one of the {len(words)} words ({', '.join(words[:5])})")


def segmented_images(
    model: Segmenter,
    samples: Iterable[Sample],
    one: SegmentationSet,
    batch: int,
    threads: int,
    precision: str,
    part: CountedPart = WHOLE,
) -> Iterator[tuple[Tensor, Segmentation]]:
    """The label map of every image of a part, int16 [H, W], and what the model finds."""
    mine = islice(samples, part.number, None, part.count)
    for images, maps in labelled_images(mine, one, batch, threads):
        with inference(model, precision):
            found = model.segment(images, one.asked, one.views)
        yield from zip(maps, found, strict=True)


def labelled_images(
    samples: Iterable[Sample], one: SegmentationSet, batch: int, threads: int
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Images, uint8 [3, H, W] in their stored size, and their label maps; unreadable samples are left out."""
    reader = SegmentationReader(classes=one.classes, resize=None)
    for rows in evaluation_batches(samples, (reader,), batch, threads):
        yield rows["image"], rows["labels"]


def segmentation_figure(model: Segmenter, samples: Iterable[Sample], one: SegmentationSet, title: str) -> "Figure":
    """Images, their label maps and what the model finds; of a ``Grouper`` also the groups of each stage."""
    rows: list[tuple[Tensor, list[Tensor]]] = []
    for images, maps in labelled_images(samples, one, IMAGES_AT_ONCE, threads=2):
        with inference(model):
            found = model.segment(images, one.asked, one.views)
        rows += [(image, [truth, one.predicted(some)]) for image, truth, some in zip(images, maps, found, strict=True)]
    groups = groups_of(model, [image for image, _ in rows])
    return label_figure(rows, one.names, ("image", "labels", "found"), title, per_row=2, groups=groups)


def groups_of(model: object, images: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The groups of each image by stage, as :meth:`Grouper.groups` gives them; none for a method without groups."""
    if not images or not callable(getattr(model, "groups", None)):
        return [() for _ in images]
    with inference(model):
        return cast(Grouper, model).groups(images)


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
        check_segment_words(words)
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
        """[D, r, w] to [W, r, w], in float32: bfloat16 would round logits to halves."""
        with torch.autocast(rows.device.type, enabled=False):
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
    allowed = (
        "a method with `segment`, or a CLIP with open_clip's vision transformer and without attention pooling, such as "
        "clipmill-small-vit or ViT-B-32"
    )
    require(plain, "checkpoint", address, allowed)
    return PatchSegmenter(cast(Clip, model))
