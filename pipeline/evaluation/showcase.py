"""The figures of a run, drawn from its data and its model: what it reads, and what each kind of evaluation shows."""

from typing import TYPE_CHECKING

from pipeline.evaluation.data import SnapshotData, evaluation_batches
from pipeline.evaluation.figures import sample_grid, sample_table
from pipeline.evaluation.readers import FirstCaptionReader, ImageReader
from pipeline.evaluation.suite import PreparedSuite
from pipeline.evaluation.task import tasks
from pipeline.loaders.images import ImageTransform
from pipeline.shards.sample import IMAGE_FIELDS, Sample
from pipeline.shards.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ImageTransform(size=(160, 160), fit="longest", fill=255)
TEXTS = ("txt", "json")  # fields that are read as text where samples have no image
LONGEST = 400  # characters of a field that are shown


def snapshot_figure(snapshot: Snapshot, count: int = 16, caption: str = "auto") -> "Figure":
    """A grid of ``count`` samples from all over a snapshot, with their captions (``txt``, ``json:KEY`` or ``auto``).

    Samples of a snapshot without images are lines of a table: their keys, texts, and the sizes of their other fields.

    Raises:
        DataError: none of these samples has a readable image, though they should, or a shard is damaged.
    """
    samples = SnapshotData(snapshot, None).samples(count)
    name = snapshot.card or snapshot.folder.rstrip("/").rpartition("/")[2]
    of_all = f"of {snapshot.samples:,} samples, snapshot {snapshot.id}"
    if not set(snapshot.fields) & set(IMAGE_FIELDS):
        rows = [[sample.key, *(_shown(sample, field) for field in snapshot.fields)] for sample in samples]
        return sample_table(["key", *snapshot.fields], rows, title=f"{name}: {len(rows)} {of_all}")
    (batch,) = evaluation_batches(samples, (ImageReader(SHOWN), FirstCaptionReader(caption)), count, threads=2)
    return sample_grid(batch["image"], batch["caption"], title=f"{name}: {len(batch['image'])} {of_all}")


def model_figures(model: object, prepared: PreparedSuite, title: str = "") -> dict[str, "Figure"]:
    """``<figure>/<set>`` for every figure that a set's task draws, of a few of its samples."""
    kinds = tasks()
    figures: dict[str, Figure] = {}
    for one in prepared.sets:
        kinds[one.kind].check(model, one)
        drawn = kinds[one.kind].figures(model, one, title)
        figures |= {f"{name}/{one.name}": figure for name, figure in drawn.items()}
    return figures


def _shown(sample: Sample, field: str) -> str:
    content = sample.fields.get(field)
    if content is None:
        return "-"
    if field in TEXTS or field.endswith(".json"):
        return content[: 4 * LONGEST].decode("utf-8", errors="replace")[:LONGEST]
    return f"{len(content):,} bytes"
