"""The figures of a run, drawn from its data and its model: what it reads, what it finds alike, what it retrieves."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.evaluation.data import Data, SnapshotData, readable_pictures
from pipeline.evaluation.detection import Vocabulary, as_detector, batches_of
from pipeline.evaluation.drawing import draw_detections, draw_marked
from pipeline.evaluation.encoder import encode_tokens, inference
from pipeline.evaluation.figures import picture_grid, retrieval_examples, sample_grid, similarity_matrix
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
PAIRS, FEWEST = 8, 5  # pictures of a figure of detections; detections drawn at the least


def snapshot_figure(snapshot: Snapshot, count: int = 16, caption: str = "auto") -> "Figure":
    """A grid of ``count`` samples from all over a snapshot, with their captions (``txt``, ``json:KEY`` or ``auto``).

    Raises:
        DataError: none of these samples has a readable picture, or a shard is damaged.
    """
    pictures, captions = _pairs(SnapshotData(snapshot, None), count, SHOWN, caption)
    name = snapshot.card or snapshot.folder.rstrip("/").rpartition("/")[2]
    title = f"{name}: {len(pictures)} of {snapshot.samples:,} samples, snapshot {snapshot.id}"
    return sample_grid(pictures, captions, title=title)


def model_figures(model: object, prepared: Prepared, title: str = "") -> dict[str, "Figure"]:
    """``similarity/<set>`` and ``examples/<set>`` for every retrieval set, of a few dozen held-out samples, and
    ``detections/<set>`` for every detection set, of a few of its pictures."""
    figures: dict[str, Figure] = {}
    for one in prepared.sets:
        if one.vocabulary is not None:
            figures[f"detections/{one.name}"] = _detections(as_detector(model, one.name), one, one.vocabulary, title)
        if one.kind == "retrieval":
            pictures, captions, scores = _scores(as_encoder(model, one.name), one, min(GALLERY, one.limit or GALLERY))
            named = f"{one.name} {title}".strip()
            few = min(MATRIX, len(pictures))
            figures[f"similarity/{one.name}"] = similarity_matrix(
                pictures[:few], captions[:few], scores[:few, :few], f"{named}: similarity of held-out pairs"
            )
            figures[f"examples/{one.name}"] = retrieval_examples(
                pictures, captions, scores, title=f"{named}: retrieval among {len(pictures)} held-out pairs"
            )
    return figures


def _detections(model: Detector, one: PreparedSet, vocabulary: Vocabulary, title: str) -> "Figure":
    """Eight pictures: on the left of each pair what is marked, on the right the best of what is found."""
    pairs: list[Tensor] = []
    for pictures, marked in batches_of(one.data.samples(min(PAIRS, one.limit or PAIRS)), PAIRS, threads=2):
        with inference(model):
            found = model.predict(pictures, vocabulary.words, vocabulary.base)
        for picture, objects, some in zip(pictures, marked, found, strict=True):
            known = draw_marked(picture, objects, vocabulary.words)
            pairs += [known, draw_detections(picture, some, vocabulary.words, most=max(FEWEST, 2 * len(objects)))]
    named = f"{one.name} {title}".strip()
    captions = ["marked", "found, with the scores"] * (len(pairs) // 2)
    return picture_grid(pairs, captions, columns=4, title=f"{named}: what is marked and what is found")


def _scores(model: Evaluable, one: PreparedSet, count: int) -> tuple[Tensor, list[str], Tensor]:
    """``count`` pictures, their captions, and the cosines ``[count, count]`` with pictures first."""
    pictures, captions = _pairs(one.data, count, model.transforms(train=False), one.caption)
    with inference(model) as device:
        images = model.encode_image(pictures.to(device)).float()
        texts = encode_tokens(model, model.tokenizer(captions), device)
        return pictures, captions, (images @ texts.T).cpu()


def _pairs(data: Data, count: int, transform: ImageTransform, caption: str) -> tuple[Tensor, list[str]]:
    """Pictures, uint8 ``[N, 3, H, W]``, and the first caption of each; an empty one where there is none."""

    def first_caption(sample: Sample) -> str:
        try:
            return read_captions(sample, caption)[0]
        except UnreadableSample:
            return ""

    rows = list(readable_pictures(data.samples(count), transform, first_caption, threads=2))
    return torch.stack([picture for picture, _ in rows]), [text for _, text in rows]
