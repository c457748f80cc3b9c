"""Pseudo boxes in the report: their counts, and the boxes of the samples that are shown."""

from collections.abc import Iterable, Iterator, Mapping

from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import read_sidecar, read_sidecar_schema
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.pseudo_boxes import COLUMNS, JOB, PseudoBoxCounts, read_counts

MAKER = "the job that made it"


def pseudo_box_names(folder: Folder, shard: Shard) -> list[str]:
    """The names of the sidecars of ``shard`` that hold pseudo boxes, sorted; reads their footers."""
    names = sorted(shard.sidecars)
    return [name for name in names if set(COLUMNS) <= set(read_sidecar_schema(folder, shard, name, MAKER).names)]


def pseudo_box_counts(snapshot: Snapshot) -> Mapping[str, PseudoBoxCounts]:
    """The counts of each sidecar with pseudo boxes, summed over the shards that have it.

    Raises:
        SidecarError: a sidecar is missing or stale.
    """
    folder = Folder(snapshot.folder)
    found: dict[str, PseudoBoxCounts] = {}
    for shard in snapshot.shards:
        for name in pseudo_box_names(folder, shard):
            found[name] = found.get(name, PseudoBoxCounts()) + read_counts(folder, shard, name)
    return found


def with_pseudo_boxes(folder: Folder, shard: Shard, samples: Iterable[Sample]) -> Iterator[Sample]:
    """``samples`` of ``shard`` with their rows of its sidecars with pseudo boxes."""
    tables = {name: read_sidecar(folder, shard, name, JOB) for name in pseudo_box_names(folder, shard)}
    places = {name: {key: row for row, key in enumerate(table["key"].to_pylist())} for name, table in tables.items()}
    for sample in samples:
        for name, table in tables.items():
            place = places[name].get(sample.key)
            if place is not None:
                sample.rows[name] = table.slice(place, 1).to_pylist()[0]
        yield sample
