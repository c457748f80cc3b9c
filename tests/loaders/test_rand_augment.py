"""RandAugment and erasing: a function of seed, epoch and sample, with timm's frequencies."""

import random
from dataclasses import replace

import numpy as np
import simplejpeg
import torch

from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.images import ImageTransform, crop_bits
from pipeline.loaders.rand_augment import AugmentedImageReader, RandomChange
from pipeline.shards.sample import Sample

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
READER = AugmentedImageReader(
    transform=ImageTransform(size=(32, 32), crop="resized", scale=(0.5, 1.0), flip=0.5),
    change=RandomChange(policy="rand-m9-mstd0.5-inc1", erase=0.25, mean=MEAN, std=STD),
)


def changing(**options: object) -> AugmentedImageReader:
    return replace(READER, change=replace(READER.change, **options))


def sample(flat: bool = False) -> Sample:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)
    if flat:
        pixels[:] = 200
    return Sample("k", {"jpg": simplejpeg.encode_jpeg(pixels, quality=95)})


def test_an_image_depends_on_seed_epoch_and_sample_alone() -> None:
    at = SamplePosition(2, 5)
    random.seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = READER.read(sample(), at)["image"]
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    assert torch.equal(READER.read(sample(), at)["image"], first)
    assert first.shape == (3, 32, 32) and first.dtype == torch.uint8
    others = [replace(READER, seed=1).read(sample(), at), READER.read(sample(), SamplePosition(3, 5))]
    assert not any(torch.equal(other["image"], first) for other in others)


def test_without_operations_it_is_the_crop() -> None:
    plain, at = changing(policy="", erase=0.0), SamplePosition(0, 3)
    expected = plain.transform.read(sample().fields["jpg"], crop_bits(0, *at))
    assert torch.equal(plain.read(sample(), at)["image"], expected)


def test_a_quarter_of_the_images_is_erased() -> None:
    """Of a flat image, what differs is a rectangle of 2 to 33 % with the model's statistics."""
    plain = changing(policy="")
    changed, noise = 0, []
    for number in range(300):
        image = plain.read(sample(flat=True), SamplePosition(0, number))["image"]
        different = (image.float() - 200).abs().amax(dim=0) > 3
        if different.any():
            rows, columns = (different.any(dim=1 - axis).nonzero()[:, 0] for axis in (0, 1))
            area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1) / 1024
            assert 0.01 < area < 0.4 and different.float().mean() > 0.8 * area
            changed += 1
            noise.append(image[:, different].float())
    assert 50 < changed < 100
    values = torch.cat(noise, dim=1) / 255
    torch.testing.assert_close(values.mean(dim=1), torch.tensor(MEAN), rtol=0.06, atol=0)


def test_operations_change_images() -> None:
    plain, changed = changing(policy="", erase=0.0), changing(erase=0.0)
    positions = [SamplePosition(0, number) for number in range(60)]
    pairs = [(plain.read(sample(), at)["image"], changed.read(sample(), at)["image"]) for at in positions]
    assert sum(not torch.equal(before, after) for before, after in pairs) > 40  # two operations, each at a half
