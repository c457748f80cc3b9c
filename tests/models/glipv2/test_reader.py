"""What the reader adds to grounding batches: classes of tokens, masked tokens, and masks in moved boxes."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.detection import RandomResize
from pipeline.loaders.grounding import GroundingData, GroundingOptions, GroundingReader
from pipeline.loaders.grounding_prompts import MASK, SpanTokenizer
from pipeline.loaders.masking import mask_tokens
from pipeline.loaders.order import random_bits
from pipeline.models.glipv2.reader import (
    MASK_CELLS,
    NO_CLASS,
    PADDING,
    UNKNOWN,
    InterImageReader,
    class_number,
)
from tests.grounded import SIDE, grounded, obj

TOKENIZER = SpanTokenizer.load("drawn")
AT = SamplePosition(0, 3)


def reader(classes: tuple[str, ...] = ("star", "disc", "moon"), **changes: Any) -> InterImageReader:
    settings: dict[str, Any] = {
        "tokenizer": TOKENIZER,
        "resize": RandomResize(size=SIDE, scale=(1.0, 1.0), flip=0.0),
        "data": GroundingData(classes=(classes,)),
        "options": GroundingOptions(caption_share=0.0, mixed_captions=0),
        "masks": True,
    }
    return InterImageReader(**{**settings, **changes})


def test_masking_has_berts_shares() -> None:
    """15 % of the allowed tokens; of these 80 % masked, 10 % random, 10 % kept; what is not allowed never changes."""
    count, vocabulary, mask = 200_000, 1000, 999
    random = np.random.default_rng(0)
    ids = random.integers(0, 900, count)
    allowed = random.random(count) < 0.5
    changed, places = mask_tokens(
        ids, allowed, random_bits(1, 2, 3, 4, 3 * count).reshape(3, -1), 0.15, mask, vocabulary
    )
    assert allowed[places].all() and len(places) == pytest.approx(0.15 * allowed.sum(), rel=0.03)
    others = np.ones(count, bool)
    others[places] = False
    assert (changed[others] == ids[others]).all()
    masked = (changed[places] == mask).mean()
    kept = (changed[places] == ids[places]).mean()
    assert masked == pytest.approx(0.8, abs=0.01) and kept == pytest.approx(0.1, abs=0.01)
    replaced = changed[places][(changed[places] != mask) & (changed[places] != ids[places])]
    assert np.bincount(replaced, minlength=vocabulary).max() < 15, "uniform over the vocabulary: about 3 of each"


def test_classes_of_tokens_and_boxes() -> None:
    """Also the names of classes that the image does not show have a label, equal for all data sets and spellings."""
    sample = grounded([obj("disc"), obj("Star_(shape)", (20, 20, 30, 30))])
    row = reader(share=0.0).read(sample, AT)
    assert row["labels"].tolist() == [class_number("disc"), class_number("star")]
    found = {int(token): int(label) for token, label in zip(row["tokens"], row["token_labels"], strict=True)}
    for name in ("star", "disc", "moon"):
        assert found[int(TOKENIZER(name).ids[1])] == class_number(name)
    assert list(found.values()).count(NO_CLASS) == 3, "start, end and the full stop"
    assert 0 <= class_number("star") < 2**62 and class_number("star") != class_number("disc")


def test_a_caption_has_no_classes_and_its_negatives_are_never_masked() -> None:
    """With every token to be predicted, exactly those of the positive caption are."""
    caption = "a red star"
    phrases = [{"start": 2, "end": 10, "objects": [0]}]
    sample = grounded([obj("star", id=0)], caption=caption, phrases=phrases)
    options = GroundingOptions(caption_share=1.0, captions_alone=0.0, captions_filled=1.0, mixed_captions=3)
    others = ("a green moon on a wall", "two blue discs", "a key")
    data = GroundingData(classes=((),), captions=others)
    plain = GroundingReader(
        tokenizer=TOKENIZER, resize=RandomResize(size=SIDE, scale=(1.0, 1.0), flip=0.0), options=options, data=data
    )
    for number in range(5):
        at = SamplePosition(0, number)
        row = reader(options=options, data=data, share=1.0).read(sample, at)
        expected = plain.read(sample, at)["tokens"]
        assert row["labels"].tolist() == [NO_CLASS] and set(row["token_labels"].tolist()) == {NO_CLASS}
        assert row["masked_tokens"].tolist() == TOKENIZER(caption).ids[1:-1].tolist()
        assert (expected[row["masked_at"]] == row["masked_tokens"].numpy()).all()
        rest = np.setdiff1d(np.arange(len(expected)), row["masked_at"])
        assert (row["tokens"][rest] == expected[rest]).all() and len(rest) >= 4


def test_only_names_that_the_image_shows_are_masked() -> None:
    row = reader(share=1.0).read(grounded([obj("disc"), obj("disc", (20, 20, 30, 30))]), AT)
    assert row["masked_tokens"].tolist() == [int(TOKENIZER("disc").ids[1])]
    assert reader(share=1.0, masks=False).read(grounded([]), AT)["masked_at"].tolist() == []


def test_nothing_is_random_in_evaluation() -> None:
    sample = grounded([obj("disc")])
    row = reader(share=1.0).read(sample, None)
    assert row["masked_at"].tolist() == [] and row["draws"] == 0
    assert row["mask_boxes"].tolist() == row["boxes"].tolist()
    assert MASK in TOKENIZER.description and TOKENIZER.mask not in row["tokens"].tolist()


def test_masks_are_cut_out_of_the_moved_boxes() -> None:
    """The left half of a box is filled: so are the cells whose centre lies in it; no segmentation is no mask."""
    left = {"segmentation": [[10, 10, 30, 10, 30, 50, 10, 50]]}
    sample = grounded([obj("disc", (10, 10, 40, 40), **left), obj("star", (5, 5, 20, 20))])
    row = reader(jitter=0.2).read(sample, AT)
    boxes, masks = row["mask_boxes"], row["masks"]
    assert not torch.equal(boxes, row["boxes"])
    assert bool(((boxes - row["boxes"]).abs() <= 0.2 * torch.tensor([[40.0], [20.0]]) + 1e-4).all())
    assert bool((masks[1] == UNKNOWN).all())
    x1, y1, x2, y2 = boxes[0].tolist()
    x = x1 + (np.arange(MASK_CELLS) + 0.5) * (x2 - x1) / MASK_CELLS
    y = y1 + (np.arange(MASK_CELLS) + 0.5) * (y2 - y1) / MASK_CELLS
    expected = ((x > 10) & (x < 30))[None] & ((y > 10) & (y < 50))[:, None]
    assert float((masks[0].numpy() == expected).mean()) > 0.95, "but for the cells at the edges"


def test_a_batch_is_padded() -> None:
    one = reader()
    rows = [one.read(grounded(objects), SamplePosition(0, n)) for n, objects in enumerate([[obj("disc")], []])]
    batch = one.collate(list(rows))
    assert batch["labels"].shape == (2, 1) and batch["labels"][1].tolist() == [PADDING]
    assert batch["token_labels"].shape == batch["tokens"].shape
    assert torch.equal(batch["token_labels"] == PADDING, ~batch["token_mask"])
    assert batch["masked_at"].shape == batch["masked_tokens"].shape and batch["masked_tokens"][1, 0] == -100
    assert batch["masks"].shape == (2, 1, MASK_CELLS, MASK_CELLS) and bool((batch["masks"][1] == UNKNOWN).all())
    assert len(set(batch["draws"].tolist())) == 2
