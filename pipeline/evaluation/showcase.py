"""The figures of a run, drawn from its data and its model: what it reads, what it finds alike, what it retrieves."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.evaluation.data import Data, SnapshotData, readable_images
from pipeline.evaluation.detection import Vocabulary, as_detector, batches_of
from pipeline.evaluation.drawing import draw_detections, draw_marked
from pipeline.evaluation.encoder import encode_tokens, inference
from pipeline.evaluation.figures import image_grid, retrieval_examples, sample_grid, similarity_matrix
from pipeline.evaluation.suite import Evaluable, Prepared, PreparedSet, as_encoder, read_captions
from pipeline.loaders.images import ImageTransform
from pipeline.loaders.samples import UnreadableSample
from pipeline.models.detections import Detector
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ImageTransform(size=(160, 160), fit="longest", fill=255)
MATRIX, GALLERY = 16, 64
PAIRS, FEWEST = 8, 5  # images of a figure of detections; detections drawn at the least


def snapshot_figure(snapshot: Snapshot, count: int = 16, caption: str = "auto") -> "Figure":
    """A grid of ``count`` samples from all over a snapshot, with their captions (``txt``, ``json:KEY`` or ``auto``).

    Raises:
        DataError: none of these samples has a readable image, or a shard is damaged.
    """
    images, captions = _pairs(SnapshotData(snapshot, None), count, SHOWN, caption)
    name = snapshot.card or snapshot.folder.rstrip("/").rpartition("/")[2]
    title = f"{name}: {len(images)} of {snapshot.samples:,} samples, snapshot {snapshot.id}"
    return sample_grid(images, captions, title=title)


def model_figures(model: object, prepared: Prepared, title: str = "") -> dict[str, "Figure"]:
    """``similarity/<set>`` and ``examples/<set>`` for every retrieval set, of a few dozen held-out samples, and
    ``detections/<set>`` for every detection set, of a few of its images."""
    figures: dict[str, Figure] = {}
    for one in prepared.sets:
        if one.vocabulary is not None:
            figures[f"detections/{one.name}"] = _detections(as_detector(model, one.name), one, one.vocabulary, title)
        if one.kind == "retrieval":
            images, captions, scores = _scores(as_encoder(model, one.name), one, min(GALLERY, one.limit or GALLERY))
            named = f"{one.name} {title}".strip()
            few = min(MATRIX, len(images))
            figures[f"similarity/{one.name}"] = similarity_matrix(
                images[:few], captions[:few], scores[:few, :few], f"{named}: similarity of held-out pairs"
            )
            figures[f"examples/{one.name}"] = retrieval_examples(
                images, captions, scores, title=f"{named}: retrieval among {len(images)} held-out pairs"
            )
    return figures


def _detections(model: Detector, one: PreparedSet, vocabulary: Vocabulary, title: str) -> "Figure":
    """Eight images: on the left of each pair what is marked, on the right the best of what is found."""
    pairs: list[Tensor] = []
    for images, marked in batches_of(one.data.samples(min(PAIRS, one.limit or PAIRS)), PAIRS, threads=2):
        with inference(model):
            found = model.predict(images, vocabulary.words, vocabulary.base)
        for image, objects, some in zip(images, marked, found, strict=True):
            known = draw_marked(image, objects, vocabulary.words)
            pairs += [known, draw_detections(image, some, vocabulary.words, most=max(FEWEST, 2 * len(objects)))]
    named = f"{one.name} {title}".strip()
    captions = ["marked", "found, with the scores"] * (len(pairs) // 2)
    return image_grid(pairs, captions, columns=4, title=f"{named}: what is marked and what is found")


def _scores(model: Evaluable, one: PreparedSet, count: int) -> tuple[Tensor, list[str], Tensor]:
    """``count`` images, their captions, and the cosines ``[count, count]`` with images first."""
    images, captions = _pairs(one.data, count, model.transforms(train=False), one.caption)
    with inference(model) as device:
        image_features = model.encode_image(images.to(device)).float()
        text_features = encode_tokens(model, model.tokenizer(captions), device)
        return images, captions, (image_features @ text_features.T).cpu()


def _pairs(data: Data, count: int, transform: ImageTransform, caption: str) -> tuple[Tensor, list[str]]:
    """Images, uint8 ``[N, 3, H, W]``, and the first caption of each; an empty one where there is none."""

    def first_caption(sample: Sample) -> str:
        try:
            return read_captions(sample, caption)[0]
        except UnreadableSample:
            return ""

    rows = list(readable_images(data.samples(count), transform, first_caption, threads=2))
    return torch.stack([image for image, _ in rows]), [text for _, text in rows]
