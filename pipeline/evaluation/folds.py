"""Official folds of data sets, such as the five of ESC-50 and the ten of UrbanSound8K.

The fold of a sample is a value in its json.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import DataError
from pipeline.evaluation.accuracy import fold_order
from pipeline.loaders.batches import Row, SamplePosition
from pipeline.loaders.readers import read_label
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.sample import Sample


@dataclass(frozen=True, kw_only=True)
class FoldReader:
    """``fold``: the value under ``json_key`` in the json of each sample, as text."""

    json_key: str
    key: str = "fold"
    fields: Sequence[str] = ("json",)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """One fold; raises ``DataError`` for a sample without."""
        return {self.key: str(read_label(sample, self.json_key))}

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """A list."""
        return {self.key: [row[self.key] for row in rows]}


def of_folds(samples: Iterator[Sample], json_key: str, folds: str) -> Iterator[Sample]:
    """The samples of the named ``folds``, joined by ``+``; all of them if it is empty.

    Raises:
        DataError: a sample has no fold; or at the end, none was of these.
    """
    if not folds:
        yield from samples
        return
    wanted, seen, any_found = set(folds.split("+")), set[str](), False
    for sample in samples:
        try:
            fold = str(read_label(sample, json_key))
        except UnreadableSample:
            continue
        seen.add(fold)
        if fold in wanted:
            any_found = True
            yield sample
    if not any_found:
        raise DataError(
            f"no sample of the folds {folds}; the samples have: {', '.join(sorted(seen, key=fold_order)) or 'none'}"
        )
