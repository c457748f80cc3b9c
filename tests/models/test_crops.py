"""Crops of many boxes against Pillow's crop and resize of one after the other."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from pipeline.errors import SettingError
from pipeline.models.towers import crops
from pipeline.models.towers.crops import CropRule, crop_boxes, cut_crops

HEIGHT, WIDTH, SIZE = 120, 200, 48
BOXES = torch.tensor(
    [
        [10.0, 20.0, 70.0, 110.0],  # tall
        [0.0, 0.0, 200.0, 120.0],  # all of it
        [150.0, 70.0, 199.4, 120.0],  # in a corner
        [5.2, 5.7, 9.1, 8.8],  # enlarged more than ten times
        [20.0, 10.0, 190.0, 24.0],  # flat
        [100.0, 50.0, 100.2, 50.2],  # less than a pixel
    ]
)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """A photograph's statistics: smooth, with edges, no overshoot at the ends of the range."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3))
    pixels = np.asarray(smooth).astype(np.int16)
    pixels[30:60, 40:100] += 60
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def by_pillow(image: Image.Image, box: list[int], shape: str) -> np.ndarray:
    """The definition, one box at a time."""
    crop = image.crop(tuple(box))
    width, height = crop.size
    if shape == "warp":
        return np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    side = min(width, height) if shape == "centre" else max(width, height)
    resized = crop.resize(
        (max(1, int(SIZE * width / side)), max(1, int(SIZE * height / side))), Image.Resampling.BICUBIC
    )
    if shape == "pad":
        canvas = Image.new("RGB", (SIZE, SIZE))
        canvas.paste(resized, ((SIZE - resized.width) // 2, (SIZE - resized.height) // 2))
        return np.asarray(canvas)
    left, top = round((resized.width - SIZE) / 2), round((resized.height - SIZE) / 2)
    return np.asarray(resized.crop((left, top, left + SIZE, top + SIZE)))


@pytest.mark.parametrize("outside", ["cut", "black"])
@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("shape", ["warp", "centre", "pad"])
def test_crops_are_pillows(image: Image.Image, shape: str, scale: float, outside: str) -> None:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    boxes = crop_boxes(BOXES, scale, HEIGHT, WIDTH, outside)
    expected = np.stack([by_pillow(image, box, shape) for box in boxes.tolist()]).astype(np.int16)
    one_by_one = cut_crops(pixels, boxes, SIZE, shape).permute(0, 2, 3, 1).numpy()
    at_once = crops._multiply(pixels, boxes, SIZE, shape).permute(0, 2, 3, 1).numpy()  # what GPUs run
    for made in (one_by_one, at_once):
        difference = np.abs(made - expected)
        assert difference.max() <= 2 and difference.mean() < 0.3


def test_boxes_are_rounded_outwards_and_never_empty() -> None:
    boxes = crop_boxes(torch.tensor([[1.2, 2.0, 4.0, 5.5], [9.9, 9.9, 9.9, 9.9]]), 1.0, 10, 10)
    assert boxes.tolist() == [[1, 2, 4, 6], [9, 9, 10, 10]]


def test_enlarged_boxes_end_at_the_border_or_are_black_outside(image: Image.Image) -> None:
    corner = torch.tensor([[0.0, 0.0, 40.0, 20.0]])
    assert crop_boxes(corner, 1.5, HEIGHT, WIDTH).tolist() == [[0, 0, 50, 25]]
    assert crop_boxes(corner, 1.5, HEIGHT, WIDTH, "black").tolist() == [[-10, -5, 50, 25]]


def test_no_boxes_are_no_crops() -> None:
    assert cut_crops(torch.zeros(3, 5, 5, dtype=torch.uint8), torch.zeros(0, 4, dtype=torch.int64), 8).shape == (
        0,
        3,
        8,
        8,
    )


@pytest.mark.parametrize("scales", [(), (1.0, 0.0)])
def test_scales_have_to_be_some(scales: tuple[float, ...]) -> None:
    with pytest.raises(SettingError, match="scales"):
        CropRule(scales=scales)


def test_larger_images_have_fewer_boxes_at_once(image: Image.Image) -> None:
    """Their matrices then take the same memory, whatever the longer side; the crops are the same in any number."""
    assert [crops.boxes_at_once(*size) for size in ((480, 640), (64, 48), (1280, 10), (10, 4000))] == [128, 128, 64, 20]
    assert crops.boxes_at_once(200_000, 10) == 1
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    boxes = crop_boxes(BOXES, 1.5, HEIGHT, WIDTH)
    whole = crops._multiply(pixels, boxes, SIZE, "warp")
    apart = torch.cat([crops._multiply(pixels, some, SIZE, "warp") for some in boxes.split(1)])
    assert (whole.int() - apart.int()).abs().max() <= 1
