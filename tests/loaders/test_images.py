"""Decoding and resizing against Pillow, torchvision and open_clip."""

from io import BytesIO

import cv2
import numpy as np
import open_clip
import pytest
import simplejpeg
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import RandomResizedCrop

from pipeline.errors import SettingError
from pipeline.loaders.images import (
    ATTEMPTS,
    ImageTransform,
    crop_bits,
    decode,
    random_resized_box,
    resize,
)
from pipeline.loaders.samples import UnreadableSample

SIZES = [(300, 200), (200, 300), (64, 64), (65, 67), (640, 427), (40, 31), (33, 500)]


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colour with fine detail, as photographs have."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + generator.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def signal_to_noise(first: np.ndarray, second: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((first.astype(float) - second.astype(float)) ** 2), 1e-9)))


@pytest.mark.parametrize("fit", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_evaluation_transform_is_open_clips(fit: str, size: tuple[int, int]) -> None:
    transform = ImageTransform(size=size, fit=fit)  # type: ignore[arg-type]
    theirs = open_clip.image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=fit)
    for height, width in SIZES:
        pixels = photo(height, width)
        expected = (theirs(Image.fromarray(pixels)) * 255).round().to(torch.uint8)
        difference = (transform(pixels).int() - expected.int()).abs()
        # Both resize in two passes of 8 bits; where one pass enlarges and one shrinks, their roundings add up.
        limit = 1 if (fit, size) == ("shortest", (64, 64)) else 3
        assert difference.max() <= limit, (height, width)
        assert difference.float().mean() < 0.5, (height, width)


def test_training_resize_is_pillows_bicubic_of_the_same_box() -> None:
    transform = ImageTransform(size=(64, 64), crop="resized", scale=(0.2, 1.0))
    for number, (height, width) in enumerate(SIZES):
        pixels, random_bits = photo(height, width), crop_bits(5, 1, number)
        top, left, box_height, box_width = transform.box(height, width, random_bits)
        box = Image.fromarray(pixels).crop((left, top, left + box_width, top + box_height))
        expected = np.asarray(box.resize((64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert signal_to_noise(transform(pixels, random_bits).numpy(), expected) > 45


def test_boxes_are_the_random_ones_on_the_grid_of_the_smaller_image() -> None:
    transform = ImageTransform(size=(64, 64), crop="resized", scale=(0.2, 1.0))
    met = set()
    for number in range(300):
        side, random_bits = 80 + 5 * number, crop_bits(0, 0, number)
        uniform = ((random_bits[1:] >> np.uint64(11)) * 2.0**-53).tolist()
        exact = random_resized_box(side, side + 30, (0.2, 1.0), (3 / 4, 4 / 3), uniform)
        ratio = min(exact[2], exact[3]) / 64
        grid = next((grid for grid in (8, 4, 2) if ratio >= 1.25 * grid), 1)
        assert transform.box(side, side + 30, random_bits) == tuple(length // grid * grid for length in exact)
        met.add(grid)
    assert met == {1, 2, 4, 8}


@pytest.mark.parametrize("subsampling", ["420", "444"])
def test_images_decoded_smaller_are_near_pillows_bicubic_of_the_same_box(subsampling: str) -> None:
    """Real photographs, from the JPEG's bytes; the boxes' sides are 2.5 times the result's and more."""
    for scale, limits in [((0.9, 1.0), (38, 34)), ((0.4, 1.0), (38, 34))]:
        transform = ImageTransform(size=(150, 150), crop="resized", scale=scale, flip=0.5)
        found = []
        for number in range(30):
            for image in load_sample_images().images:
                content = simplejpeg.encode_jpeg(image, quality=95, colorsubsampling=subsampling)
                random_bits = crop_bits(number, 0, 0)
                top, left, height, width = box = transform.box(*image.shape[:2], random_bits)
                if min(height, width) < 2.5 * 150:
                    continue
                assert [length % 2 for length in box] == [0, 0, 0, 0]
                whole = Image.open(BytesIO(content)).crop((left, top, left + width, top + height))
                expected = np.asarray(whole.resize((150, 150), Image.Resampling.BICUBIC))
                if random_bits[0] < 2**63:
                    expected = expected[:, ::-1]
                found.append(signal_to_noise(transform.read(content, random_bits).numpy().transpose(1, 2, 0), expected))
        assert len(found) > 5
        assert np.mean(found) > limits[0] and min(found) > limits[1], (np.mean(found), min(found))


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_all_reductions_are_in_place(shrink: int) -> None:
    """A smooth image with odd sides: a shift of a pixel would cost 15 dB."""
    smooth = cv2.GaussianBlur(photo(100, 140), (0, 0), 3)
    large = cv2.resize(smooth, (1403, 1001), interpolation=cv2.INTER_CUBIC)
    size = (round(1001 / shrink / 1.4), round(1403 / shrink / 1.4))
    transform = ImageTransform(size=size, crop="resized", scale=(0.9, 1.0), ratio=(1.3, 1.5))
    for number in range(8):
        random_bits, content = crop_bits(0, 1, number), simplejpeg.encode_jpeg(large, quality=98)
        top, left, height, width = box = transform.box(1001, 1403, random_bits)
        assert not any(length % shrink for length in box)
        whole = Image.open(BytesIO(content)).crop((left, top, left + width, top + height))
        expected = np.asarray(whole.resize(size[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert signal_to_noise(transform.read(content, random_bits).numpy(), expected) > 45


def test_reading_is_decoding_and_transforming_wherever_nothing_is_gained() -> None:
    pixels, random_bits = photo(300, 400), crop_bits(0, 0, 0)
    small = ImageTransform(size=(40, 40), crop="resized")
    for content, transform in [
        (simplejpeg.encode_jpeg(pixels), ImageTransform(size=(200, 200), crop="resized", flip=0.5)),
        (simplejpeg.encode_jpeg(pixels), ImageTransform(size=(40, 40))),
        (encoded(Image.fromarray(pixels), "PNG"), small),
    ]:
        assert torch.equal(transform.read(content, random_bits), transform(decode(content), random_bits))
    for broken in (b"", b"\xff\xd8", simplejpeg.encode_jpeg(pixels)[:2000]):
        with pytest.raises(UnreadableSample):
            small.read(broken, random_bits)


def test_random_boxes_are_distributed_as_torchvisions() -> None:
    image = torch.zeros(3, 120, 200)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    generator = np.random.default_rng(0)
    ours = np.array(
        [
            random_resized_box(120, 200, (0.2, 1.0), (3 / 4, 4 / 3), generator.random(4 * ATTEMPTS).tolist())
            for _ in range(4000)
        ]
    )
    for column in range(4):
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 0.05 * theirs[:, column].std() + 0.6
        assert ours[:, column].std() == pytest.approx(theirs[:, column].std(), rel=0.06)
    assert (ours[:, 0] + ours[:, 2]).max() <= 120 and (ours[:, 1] + ours[:, 3]).max() <= 200


def test_a_box_that_never_fits_becomes_the_largest_central_one() -> None:
    uniform = [0.99, 0.5, 0.0, 0.0] * ATTEMPTS
    assert random_resized_box(10, 1000, (1.0, 1.0), (3 / 4, 4 / 3), uniform) == (0, 493, 10, 13)
    assert random_resized_box(1000, 10, (1.0, 1.0), (3 / 4, 4 / 3), uniform) == (493, 0, 13, 10)


def test_the_papers_crop_is_a_square_of_the_short_side() -> None:
    transform = ImageTransform(size=(20, 20), crop="square")
    pixels = np.repeat(np.arange(100, dtype=np.uint8)[None, :, None], 20, axis=0).repeat(3, axis=2)
    lefts = {int(transform(pixels, crop_bits(0, 0, number))[0, 0, 0]) for number in range(2000)}
    assert lefts == set(range(81))  # every place, both ends included


def test_crops_are_a_function_of_seed_epoch_and_sample() -> None:
    assert crop_bits(1, 2, 3).tolist() == crop_bits(1, 2, 3).tolist()
    seen = {tuple(crop_bits(*place).tolist()) for place in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]}
    assert len(seen) == 4


def test_flips_happen_as_often_as_asked() -> None:
    pixels = photo(30, 30)
    transform = ImageTransform(size=(30, 30), crop="square", flip=0.25)
    straight = torch.from_numpy(pixels).permute(2, 0, 1)
    flipped = 0
    for number in range(800):
        made = transform(pixels, crop_bits(0, 0, number))
        assert torch.equal(made, straight) or torch.equal(made, straight.flip(-1))
        flipped += int(torch.equal(made, straight.flip(-1)))
    assert 150 < flipped < 250


def test_all_kinds_of_images_become_rgb() -> None:
    pixels = photo(50, 70)
    image = Image.fromarray(pixels)
    for kind, mode in [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "L"), ("WEBP", "RGB")]:
        content = encoded(image.convert(mode), kind)
        expected = np.asarray(Image.open(BytesIO(content)).convert("RGB"))
        made = decode(content)
        assert made.shape == (50, 70, 3) and made.dtype == np.uint8
        resize(made, (20, 20))  # torch warns of arrays that it may not write to
        assert signal_to_noise(made, expected) > 45, (kind, mode)


def test_broken_images_are_unreadable_samples() -> None:
    whole = simplejpeg.encode_jpeg(photo(50, 70))
    grey = encoded(Image.new("L", (9000, 9000)), "PNG")
    for content in (b"", b"<html>not found</html>", whole[:200], whole[: len(whole) // 2], whole[:3], grey):
        with pytest.raises(UnreadableSample):
            decode(content)


def test_equal_size_is_not_resampled() -> None:
    pixels = photo(32, 48)
    assert torch.equal(resize(pixels, (32, 48)), torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize(
    "bad", [{"size": (0, 8)}, {"scale": (0.0, 1.0)}, {"scale": (0.9, 0.5)}, {"ratio": (2.0, 1.0)}, {"flip": 2.0}]
)
def test_bad_settings(bad: dict[str, object]) -> None:
    with pytest.raises(SettingError):
        ImageTransform(**{"size": (8, 8), **bad})  # type: ignore[arg-type]
