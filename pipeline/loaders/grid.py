"""Grids of image features in a batch: stored ones, or the images from which a tower computes them.

An image is resized until it fits into the height and width of the tower's input, at the top left of it, and padded at
the right and below with the tower's mean colour. Cells that show nothing but padding are not part of its grid. A cell
is (row, column) from the top left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import require
from pipeline.errors import SidecarError
from pipeline.loaders.batches import Batch, Row, SamplePosition
from pipeline.loaders.images import decode, encoded_image, resize
from pipeline.loaders.order import RandomStream, permutation
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.pixels import Pixels
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import Wanted
from pipeline.stages.annotate.grid_features import JOB, stored_grid

Shape = tuple[int, int]


class CellAttention(NamedTuple):
    """Attention to the cells of an image."""

    weights: Tensor
    """float32 [rows, columns]."""
    cell: tuple[float, float]
    """Height and width of a cell in pixels of the image."""


@dataclass(frozen=True, kw_only=True)
class GridTransform:
    """An image for a tower that computes its grid."""

    size: Shape
    """Height and width of the tower's input in pixels, multiples of ``stride``."""
    stride: int
    """Pixels of a cell's side."""
    fill: tuple[int, ...]
    """Colour of the padding, three levels from 0 to 255."""
    interpolation: str = "bicubic"

    def fitted(self, height: int, width: int) -> Shape:
        """Height and width of an image that is resized to fit."""
        shrink = max(height / self.size[0], width / self.size[1])
        rows, columns = round(height / shrink), round(width / shrink)
        return min(max(rows, 1), self.size[0]), min(max(columns, 1), self.size[1])

    def cells(self, height: int, width: int) -> Shape:
        """Rows and columns of cells that show a part of an image of this size."""
        rows, columns = self.fitted(height, width)
        return -(-rows // self.stride), -(-columns // self.stride)

    def cell_size(self, height: int, width: int) -> tuple[float, float]:
        """Height and width of a cell in pixels of an image of this size."""
        rows, columns = self.fitted(height, width)
        return self.stride * height / rows, self.stride * width / columns

    def __call__(self, pixels: Pixels) -> tuple[Tensor, Shape]:
        """uint8 [h, w, 3] to uint8 [3, H, W], with rows and columns of its cells."""
        shape = self.fitted(*pixels.shape[:2])
        image = torch.tensor(self.fill, dtype=torch.uint8)[:, None, None].repeat(1, *self.size)
        image[:, : shape[0], : shape[1]] = resize(pixels, shape, self.interpolation)
        return image, self.cells(*pixels.shape[:2])


def chosen_cells(shape: Shape, most: int, seed: int, at: SamplePosition | None) -> NDArray[np.int64]:
    """Cells (row, column), int64 [L, 2], in the order of reading: all, or in training ``most`` of them at random.

    A pure function of the arguments: another sample or another epoch has other cells. ``most`` 0 is all.
    """
    count = shape[0] * shape[1]
    numbers = np.arange(count)
    if at is not None and 0 < most < count:
        numbers = np.sort(permutation(seed, RandomStream.CELLS, *at, count)[:most])
    return np.stack([numbers // shape[1], numbers % shape[1]], axis=1)


def padded_cells(cells: Sequence[NDArray[np.int64]]) -> Batch:
    """``cells``: int64 [B, L, 2], L the largest number in the batch; ``cell_mask``: bool [B, L], False for padding."""
    longest = max(map(len, cells))
    padded = torch.zeros(len(cells), longest, 2, dtype=torch.int64)
    mask = torch.zeros(len(cells), longest, dtype=torch.bool)
    for number, one in enumerate(cells):
        padded[number, : len(one)] = torch.from_numpy(one)
        mask[number, : len(one)] = True
    return {"cells": padded, "cell_mask": mask}


@dataclass(frozen=True, kw_only=True)
class GridFeatureReader:
    """``grid``: float16 [B, L, D], stored features of L cells of each image; ``cells`` and ``cell_mask`` say which.

    They come from the sidecar ``name`` of ``jobs/embed_dataset.py grid``. ``teacher``, if given, is the required digest
    of the tower that made them, ``width`` the required D. ``most`` limits the cells in training.
    """

    name: str
    teacher: str = ""
    width: int = 0
    most: int = 0
    seed: int = 0
    fields = ()

    def __post_init__(self) -> None:
        require(self.name.isidentifier(), "grid", self.name, "the name of a sidecar")

    @property
    def sidecars(self) -> tuple[Wanted, ...]:
        """The sidecar of the grids."""
        return (Wanted(name=self.name, job=JOB, facts={"teacher": self.teacher} if self.teacher else {}),)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """``grid``: float16 [l, D]; raises :class:`UnreadableSample` where the image was unreadable."""
        stored = stored_grid(sample.rows[self.name], sample.key)
        if not stored.size:
            raise UnreadableSample(f"{sample.key} has no grid: its image cannot be read")
        if self.width and stored.shape[2] != self.width:
            raise SidecarError(f"the grid of {sample.key} has {stored.shape[2]} features a cell, not {self.width}")
        cells = chosen_cells(stored.shape[:2], self.most, self.seed, at)
        return {"grid": torch.from_numpy(stored[cells[:, 0], cells[:, 1]]), "cells": cells}

    def collate(self, rows: list[Row]) -> Batch:
        """The three keys."""
        found = padded_cells([row["cells"] for row in rows])
        grid = rows[0]["grid"].new_zeros(*found["cell_mask"].shape, rows[0]["grid"].shape[1])
        for number, row in enumerate(rows):
            grid[number, : len(row["grid"])] = row["grid"]
        return {"grid": grid, **found}


@dataclass(frozen=True, kw_only=True)
class GridImageReader:
    """``image``: uint8 [B, 3, H, W], for a tower that computes the grid; ``cells`` and ``cell_mask`` as above."""

    transform: GridTransform
    most: int = 0
    seed: int = 0
    fields = ("image",)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """``image``: uint8 [3, H, W]; raises :class:`UnreadableSample`."""
        image, shape = self.transform(decode(encoded_image(sample)))
        return {"image": image, "cells": chosen_cells(shape, self.most, self.seed, at)}

    def collate(self, rows: list[Row]) -> Batch:
        """The three keys."""
        return {"image": torch.stack([row["image"] for row in rows]), **padded_cells([row["cells"] for row in rows])}
