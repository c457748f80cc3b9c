"""The figures of a run, drawn from its data and its model: what it reads, and what each kind of evaluation shows."""

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.evaluation.data import SnapshotData
from pipeline.evaluation.suite import PreparedSuite
from pipeline.evaluation.task import tasks
from pipeline.loaders.label_figures import label_figure
from pipeline.loaders.sample_figures import sample_figure
from pipeline.models.segments import Segmentation
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def snapshot_figure(
    snapshot: Snapshot, draw: "Callable[[Sequence[Sample], str], Figure]" = sample_figure, count: int = 16
) -> "Figure":
    """``count`` samples from all over a snapshot, as ``draw`` shows them under a title.

    Raises:
        DataError: none of these samples can be shown, or a shard is damaged.
    """
    samples = list(SnapshotData(snapshot, None).samples(count))
    name = snapshot.card or snapshot.folder.rstrip("/").rpartition("/")[2]
    return draw(samples, f"{name}: {len(samples)} of {snapshot.samples:,} samples, snapshot {snapshot.id}")


def segments_png(image: Tensor, found: Segmentation, words: Sequence[str], groups: Sequence[Tensor] = ()) -> bytes:
    """The image, uint8 [3, H, W], beside itself under the colours of its words, with a legend, as PNG.

    ``groups`` [H, W], one map for each stage of a grouping, follow to the right.
    """
    content = BytesIO()
    rows, titles = [(image, [found.labels])], ("image", "words")
    label_figure(rows, words, titles, inches=5.0, groups=[groups] if groups else ()).savefig(content, format="png")
    return content.getvalue()


def model_figures(model: object, prepared: PreparedSuite, title: str = "") -> dict[str, "Figure"]:
    """``<figure>/<set>`` for every figure that a set's task draws, of a few of its samples."""
    kinds = tasks()
    figures: dict[str, Figure] = {}
    for one in prepared.sets:
        kinds[one.kind].check(model, one)
        drawn = kinds[one.kind].figures(model, one, title)
        figures |= {f"{name}/{one.name}": figure for name, figure in drawn.items()}
    return figures


def model_files(model: object, prepared: PreparedSuite) -> dict[str, bytes]:
    """``<metric prefix>/<set>/<file>`` for every file of a set's task."""
    kinds = tasks()
    return {
        f"{kinds[one.kind].report.prefix}/{one.name}/{name}": content
        for one in prepared.sets
        for name, content in kinds[one.kind].files(model, one).items()
    }
