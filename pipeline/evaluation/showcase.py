"""The figures of a run, drawn from its data and its model: what it reads, what it finds alike, what it retrieves."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.evaluation.data import Data, SnapshotData, readable_pictures
from pipeline.evaluation.encoder import encode_tokens, inference
from pipeline.evaluation.figures import retrieval_examples, sample_grid, similarity_matrix
from pipeline.evaluation.suite import Evaluable, Prepared, PreparedSet, read_captions
from pipeline.loaders.images import ImageTransform
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ImageTransform(size=(160, 160), fit="longest", fill=255)
MATRIX, GALLERY = 16, 64


def snapshot_figure(snapshot: Snapshot, count: int = 16, caption: str = "auto") -> "Figure":
    """A grid of ``count`` samples from all over a snapshot, with their captions (``txt``, ``json:KEY`` or ``auto``).

    Raises:
        DataError: none of these samples has a readable picture, or a shard is damaged.
    """
    pictures, captions = _pairs(SnapshotData(snapshot, None), count, SHOWN, caption)
    name = snapshot.card or snapshot.folder.rstrip("/").rpartition("/")[2]
    title = f"{name}: {len(pictures)} of {snapshot.samples:,} samples, snapshot {snapshot.id}"
    return sample_grid(pictures, captions, title=title)


def model_figures(model: Evaluable, prepared: Prepared, title: str = "") -> dict[str, "Figure"]:
    """``similarity/<set>`` and ``examples/<set>`` for every retrieval set, of a few dozen held-out samples."""
    figures: dict[str, Figure] = {}
    for one in prepared.sets:
        if one.kind == "retrieval":
            pictures, captions, scores = _scores(model, one, min(GALLERY, one.limit or GALLERY))
            named = f"{one.name} {title}".strip()
            few = min(MATRIX, len(pictures))
            figures[f"similarity/{one.name}"] = similarity_matrix(
                pictures[:few], captions[:few], scores[:few, :few], f"{named}: similarity of held-out pairs"
            )
            figures[f"examples/{one.name}"] = retrieval_examples(
                pictures, captions, scores, title=f"{named}: retrieval among {len(pictures)} held-out pairs"
            )
    return figures


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
