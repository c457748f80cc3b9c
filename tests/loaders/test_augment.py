"""Several crops of one decoding against the crops one by one, and what they depend on."""

import io

import numpy as np
import torch
from PIL import Image

from pipeline.loaders.augment import ColourReader, Colours, ViewsReader
from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.images import ImageTransform, read_crops
from pipeline.loaders.order import random_bits
from pipeline.shards.sample import Sample


def image(form: str, height: int, width: int) -> bytes:
    """A smooth image, so that decoding it smaller changes little."""
    down, right = np.mgrid[0:height, 0:width]
    pixels = np.stack([down * 255 // height, right * 255 // width, (down + right) * 255 // (height + width)], axis=2)
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, form, **({"quality": 95} if form == "JPEG" else {}))
    return stream.getvalue()


WIDE = ImageTransform(size=(32, 32), crop="resized", scale=(0.5, 1.0))
SMALL = ImageTransform(size=(32, 32), crop="resized", scale=(0.08, 1.0), flip=0.5)


def test_crops_of_one_decoding_are_the_crops_one_by_one() -> None:
    """Equal where nothing is decoded smaller; near for a JPEG, whose common size is that of the smallest crop."""
    for number in range(12):
        crops = [(t, random_bits(1, 50 + v, 0, number, 41)) for v, t in enumerate((WIDE, SMALL, SMALL))]
        png, jpeg = image("PNG", 120, 90), image("JPEG", 700, 500)
        for found, (transform, words) in zip(read_crops(png, crops), crops, strict=True):
            assert torch.equal(found, transform.read(png, words))
        for found, (transform, words) in zip(read_crops(jpeg, crops), crops, strict=True):
            assert (found.int() - transform.read(jpeg, words).int()).abs().float().mean() < 3


def test_views_are_a_function_of_seed_epoch_and_sample() -> None:
    sample = Sample("0", {"png": image("PNG", 120, 90)})
    reader = ViewsReader(transforms=(WIDE, SMALL, SMALL), seed=4)
    views = reader.read(sample, SamplePosition(2, 7))["views"]
    assert views.shape == (3, 3, 32, 32) and views.dtype == torch.uint8
    assert torch.equal(views, reader.read(sample, SamplePosition(2, 7))["views"])
    assert not torch.equal(views[1], views[2])
    assert not torch.equal(views, reader.read(sample, SamplePosition(3, 7))["views"])
    colours = ColourReader(colours=Colours(), views=2, seed=4)
    row = colours.read(sample, SamplePosition(2, 7))
    first, second = row["colours"]
    assert first != second and row == colours.read(sample, SamplePosition(2, 7))
    assert colours.collate([row] * 3)["colours"].shape == (3, 2, 10)
