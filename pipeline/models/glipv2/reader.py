"""Grounding batches with what GLIPv2's further losses need: classes of tokens, masked tokens, and masks of objects."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from pipeline.loaders.batches import Batch, Row, SamplePosition
from pipeline.loaders.detection import masks_in, padded
from pipeline.loaders.grounding import GroundedTargets, GroundingReader
from pipeline.loaders.grounding_prompts import clean_name
from pipeline.loaders.masking import mask_tokens
from pipeline.loaders.order import RandomStream, random_bits, uniform
from pipeline.shards.sample import Sample

NO_CLASS, PADDING = -1, -2
"""Labels of a token or a box without a class, and of padding."""
UNKNOWN = 255
"""Value of the pixels of a mask that is not annotated."""
MASK_CELLS = 28


@dataclass(frozen=True, kw_only=True)
class InterImageReader(GroundingReader):
    """The keys of :class:`~pipeline.loaders.grounding.GroundingReader`, and

    labels         int64 [B, G], a number of each box's class, equal in all data sets; ``NO_CLASS`` in captions
    token_labels   int64 [B, M], the same of the tokens of class names, ``NO_CLASS`` elsewhere, ``PADDING``
    draws          int64 [B], a random number of each sample, which also identifies it in the global batch
    masked_at      int64 [B, K], the tokens to be predicted, padded with 0; K is at least 1
    masked_tokens  int64 [B, K], what they were before they were masked, padded with -100
    mask_boxes     float32 [B, G, 4] and masks uint8 [B, G, 28, 28]: the objects' masks inside of slightly moved boxes,
                   of 0 and 1, or ``UNKNOWN`` without a segmentation; only with ``masks``

    ``tokens`` have masked and replaced ones. Only tokens that are true of the image are masked: its caption without
    those of other images, or the names of the classes that it shows.
    """

    share: float = 0.15
    masks: bool = False
    jitter: float = 0.1

    def values(self, sample: Sample, at: SamplePosition | None, targets: GroundedTargets) -> Row:
        """The values of one sample."""
        tokens = targets.tokens
        labels = np.full(len(tokens), NO_CLASS, np.int64)
        for name, span in targets.prompt.classes:
            labels[tokens.positive([span])] = class_number(name)
        ids, places, originals = tokens.ids, np.zeros(0, np.int64), np.zeros(0, np.int64)
        if at is not None and self.share:
            assert self.tokenizer.mask is not None
            bits = random_bits(self.seed, RandomStream.MASKED_TOKENS, *at, 3 * len(tokens)).reshape(3, -1)
            allowed = tokens.positive(targets.prompt.about)
            ids, places = mask_tokens(ids, allowed, bits, self.share, self.tokenizer.mask, self.tokenizer.vocab_size)
            originals = tokens.ids[places]
        further = {
            "tokens": ids,
            "labels": self._box_labels(targets),
            "token_labels": torch.from_numpy(labels),
            "draws": 0 if at is None else int(random_bits(self.seed, RandomStream.DRAWS, *at, 1)[0] >> np.uint64(1)),
            "masked_at": torch.from_numpy(places),
            "masked_tokens": torch.from_numpy(originals),
        }
        return {**super().values(sample, at, targets), **further, **(self._masks(targets, at) if self.masks else {})}

    def collate(self, rows: list[Row]) -> Batch:
        """The tensors named above."""
        found = super().collate(rows)
        width = found["tokens"].shape[1]
        labels = torch.full((len(rows), width), PADDING, dtype=torch.int64)
        for target, row in zip(labels, rows, strict=True):
            target[: len(row["token_labels"])] = row["token_labels"]
        found |= {
            "labels": padded([row["labels"] for row in rows], PADDING),
            "token_labels": labels,
            "draws": torch.tensor([row["draws"] for row in rows], dtype=torch.int64),
            "masked_at": padded([row["masked_at"] for row in rows], 0),
            "masked_tokens": padded([row["masked_tokens"] for row in rows], -100),
        }
        if self.masks:
            found["mask_boxes"] = padded([row["mask_boxes"] for row in rows], 0.0)
            found["masks"] = padded([row["masks"] for row in rows], UNKNOWN)
        return found

    def _box_labels(self, targets: GroundedTargets) -> torch.Tensor:
        named = [clean_name(targets.objects.labels[number]) for number in targets.numbers]
        numbers = [class_number(name) if targets.prompt.classes else NO_CLASS for name in named]
        return torch.tensor(numbers, dtype=torch.int64)

    def _masks(self, targets: GroundedTargets, at: SamplePosition | None) -> Mapping[str, Any]:
        boxes = targets.boxes
        if at is not None and len(boxes):
            bits = random_bits(self.seed, RandomStream.MASK_BOXES, *at, 4 * len(boxes)).reshape(-1, 4)
            shift = (uniform(bits) * 2 - 1) * self.jitter
            boxes = boxes + shift * np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        cut = masks_in(boxes, targets.objects, targets.numbers, targets.placement, MASK_CELLS, UNKNOWN)
        return {"mask_boxes": torch.from_numpy(boxes).float(), "masks": cut}


@lru_cache(65_536)
def class_number(name: str) -> int:
    """A number of 62 bits for a class name, the same for all data sets, runs and machines."""
    return int.from_bytes(hashlib.blake2b(name.lower().encode(), digest_size=8).digest()) >> 2
