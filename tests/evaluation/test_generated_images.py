"""R-precision and classes in texts, by hand and against counting one by one."""

import math

import pytest
import torch
from torch.nn import functional

from pipeline.evaluation.generated_images import class_in, r_precision, texts_before


def test_ranks_are_counted_one_by_one() -> None:
    random = torch.Generator().manual_seed(3)
    images = functional.normalize(torch.randn(30, 4, generator=random), dim=1)
    texts = functional.normalize(torch.randn(12, 4, generator=random), dim=1)
    own = torch.randint(12, (30,), generator=random)
    found = texts_before(images, texts, own).tolist()
    for image, number, place in zip(images, own.tolist(), found, strict=True):
        cosines = [float(sum(a * b for a, b in zip(image, text, strict=True))) for text in texts]
        assert place == sum(other > cosines[number] for other in cosines)
    assert r_precision(found) == found.count(0) / 30 and 0 < found.count(0) < 30


def test_by_hand_with_ties_and_numbers_that_are_none() -> None:
    """The second text is as close as the first: neither of two equal texts is first. NaN is last."""
    texts = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]])
    images = torch.tensor([[1.0, 0], [0.6, 0.8], [math.nan, 0], [0.6, 0.8]])
    assert texts_before(images, texts, torch.tensor([0, 2, 2, 1])).tolist() == [1, 0, 2, 2]
    assert r_precision([1, 0, 2, 2]) == 0.25 and math.isnan(r_precision([]))


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["a red star"], "star"),
        (["a red Five-pointed star!"], "five-pointed star"),
        (["starfish"], None),
        (["a star beside a disc"], None),
        (["red", "hot_air_balloon"], "hot air balloon"),
        (["a", "star"], "star"),
        ([], None),
    ],
)
def test_a_class_is_named_by_whole_words(texts: list[str], found: str | None) -> None:
    assert class_in(texts, ["star", "five-pointed star", "disc", "hot air balloon"]) == found
