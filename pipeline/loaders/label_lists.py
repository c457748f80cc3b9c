"""Label lists: the labels that the pixels of one image are compared with.

In a mixture every data set has its own classes, so images differ in their labels. A list is

- nothing for ``union``: all pixels are compared with the classes of all data sets, as on MSeg (Lambert, Liu, Sener,
  Hays, Koltun, 2020, arXiv 2112.13762). Classes of equal names are one class;
- the classes of the image's own data set for ``dataset``;
- of either, ``per_image`` labels: all labels of the image's pixels, and others that are sampled for every epoch;
- two labels with ``two_words``: one of the image's classes, and the class of unlabelled pixels, which all pixels of
  other classes have, too. This is how LSeg's authors read few-shot sets. An image without a class gets any class.

Sampling is a pure function of (seed, epoch, sample number).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.loaders.batches import Row, SamplePosition
from pipeline.loaders.order import RandomStream, permutation
from pipeline.loaders.segmentation import VOID, LabelMap, SegmentationReader
from pipeline.shards.sample import Sample

ListKind = Literal["union", "dataset"]
Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class LabelLists:
    """Which labels are in the list of an image."""

    kind: ListKind = "union"
    per_image: int = 0
    two_words: bool = False

    def __post_init__(self) -> None:
        require(self.per_image == 0 or self.per_image >= 2, "labels_per_image", self.per_image, "0, or 2 or more")
        alone = not self.two_words or self.per_image == 0
        require(alone, "labels_per_image", self.per_image, "0 with two_words, which compares with two labels")

    @property
    def differ(self) -> bool:
        """Whether images have lists of their own."""
        return self.kind == "dataset" or self.per_image > 0 or self.two_words

    def sampled(self, labels: LabelMap, known: Numbers, order: Numbers) -> Numbers:
        """The labels of an image's pixels and the first others of ``known`` in their random ``order``."""
        own = np.intersect1d(labels, known)
        others = known[order][~np.isin(known[order], own)]
        return np.sort(np.concatenate([own, others[: max(0, self.per_image - len(own))]]))

    def one_class(self, labels: LabelMap, known: Numbers, ground: int, order: Numbers) -> int:
        """The first class of the image in a random ``order`` of all classes, or the first of all."""
        classes = known[order][known[order] != ground]
        present = classes[np.isin(classes, labels)]
        return int((present if len(present) else classes)[0])


@dataclass(frozen=True, kw_only=True)
class ListedSegmentationReader:
    """Images, their label maps, and their label lists where images differ in them.

    image, labels  as :class:`SegmentationReader` reads them, with the reader of the sample's data set
    label_list     int64 [B, K], class numbers without duplicates, padded with ``VOID`` at the end; includes all labels
                   of the image

    ``datasets`` has a reader for each data set of a mixture, or one for all.
    """

    datasets: tuple[SegmentationReader, ...]
    lists: LabelLists
    seed: int = 0

    @property
    def fields(self) -> Sequence[str]:
        """The image, and the field with labels."""
        return self.datasets[0].fields

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """One image, its label map and its list; raises as :class:`SegmentationReader` does.

        Raises:
            DataError: the sample is of a data set without a reader.
        """
        part = sample.part if len(self.datasets) > 1 else 0
        if part >= len(self.datasets):
            have = f"classes of {len(self.datasets)} data sets"
            raise DataError(f"sample {sample.key} is of data set {part + 1}, but there are {have}")
        row = self.datasets[part].read(sample, at)
        if not self.lists.differ:
            return row
        return {**row, **self._listed(row["labels"].numpy(), self.datasets[part], at or SamplePosition(0, 0))}

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """The tensors named above."""
        batch = self.datasets[0].collate(rows)
        if self.lists.differ:
            lists = [row["label_list"] for row in rows]
            batch["label_list"] = pad_sequence(lists, batch_first=True, padding_value=VOID)
        return batch

    def _listed(self, labels: LabelMap, reader: SegmentationReader, at: SamplePosition) -> dict[str, Tensor]:
        """The list, and the label map where that changes, too."""
        known = self._known(reader)
        order = permutation(self.seed, RandomStream.LABELS, *at, len(known))
        if not self.lists.two_words:
            listed = self.lists.sampled(labels, known, order) if self.lists.per_image else known
            return {"label_list": torch.from_numpy(listed)}
        ground = reader.classes.ground
        chosen = self.lists.one_class(labels, known, ground, order)
        binary = np.where((labels == chosen) | (labels == VOID), labels, np.int16(ground))
        return {"labels": torch.from_numpy(binary), "label_list": torch.tensor([ground, chosen])}

    def _known(self, reader: SegmentationReader) -> Numbers:
        """The class numbers of a list before any sampling."""
        classes = reader.classes
        return np.arange(len(classes.classes)) if self.lists.kind == "union" else classes.own_numbers
