"""The reader of depth maps: sizes, crops and mirroring by hand, and what makes a sample unreadable."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import DataError, SettingError
from pipeline.loaders import depth
from pipeline.loaders.depth import DepthRange, DepthReader, read_depth
from pipeline.loaders.depth_figures import depth_figure, estimate_figure, samples_with_depth
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.depth_values import encode_depth
from pipeline.shards.sample import Sample

DEPTH = np.array([[1, 2, 3, 4], [5, 6, 0, 8]], np.float32)  # 2 x 4


def image(height: int, width: int) -> bytes:
    """A PNG whose red is the column and whose green is the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def sample(depth: np.ndarray = DEPTH, height: int = 2, width: int = 4, **fields: Any) -> Sample:
    made = {"png": image(height, width), "depth.png": encode_depth(depth), "json": json.dumps(fields).encode()}
    return Sample("000000001", made)


def test_as_stored_for_evaluation() -> None:
    reader = DepthReader(size=None, scenes=("kitchen", "office"))
    rows = [reader.read(sample(scene="office")), reader.read(sample(scene="bathroom"))]
    assert rows[0]["depth"].dtype == torch.float32 and rows[0]["depth"].tolist() == DEPTH.tolist()
    assert rows[0]["valid"].tolist() == [[True] * 4, [True, True, False, True]]
    batch = reader.collate(rows)
    assert isinstance(batch["image"], list) and batch["image"][0].shape == (3, 2, 4)
    assert batch["scene"].tolist() == [1, -1]
    assert tuple(reader.fields) == ("image", "depth.png", "json")
    assert tuple(DepthReader(size=None).fields) == ("image", "depth.png")


def test_the_range_is_open_at_both_ends() -> None:
    valid = DepthReader(size=None, depth_range=DepthRange(nearest=1, farthest=6)).read(sample())["valid"]
    assert valid.tolist() == [[False, True, True, True], [True, False, False, False]]
    assert not DepthRange().valid(torch.tensor([float("nan"), 0.0, 1e-3, 10.0])).any()
    with pytest.raises(SettingError, match="depth_range"):
        DepthRange(nearest=2, farthest=1)


def test_crop_then_squash_with_the_nearest_pixel() -> None:
    reader = DepthReader(size=(4, 2), crop=(0, 2, 1, 3))
    row = reader.read(sample())
    assert row["depth"].tolist() == [[2, 3], [2, 3], [6, 0], [6, 0]]
    assert row["image"].shape == (3, 4, 2) and row["image"][0, 0].tolist() == [1, 2]
    assert reader.collate([row, row])["depth"].shape == (2, 4, 2)


def test_a_mirrored_image_has_mirrored_depth() -> None:
    """Half of the samples, the same ones in every run."""
    reader = DepthReader(size=(2, 4), flip=0.5)
    seen = []
    for number in range(40):
        row = reader.read(sample(), (0, number))
        turned = row["image"][0, 0].tolist() == [3, 2, 1, 0]
        assert turned or row["image"][0, 0].tolist() == [0, 1, 2, 3]
        assert row["depth"].tolist() == (DEPTH[:, ::-1] if turned else DEPTH).tolist()
        seen.append(turned)
    assert 8 <= sum(seen) <= 32
    assert [bool(reader.read(sample(), (0, n))["image"][0, 0, 0] == 3) for n in range(40)] == seen
    assert reader.read(sample())["image"][0, 0, 0] == 0  # never in evaluation


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"depth.png": b""}, "not a PNG"),
        ({"depth.png": encode_depth(np.ones((4, 2)))}, "2 x 4 pixels, its image 4 x 2"),
        ({"depth.png": encode_depth(np.zeros((2, 4)))}, "no pixel of 0.001 to 10.0 m"),
        ({"depth.png": encode_depth(np.full((2, 4), 20.0))}, "no pixel of 0.001 to 10.0 m"),
        ({"png": b"no image"}, "image"),
        ({"json": b"{"}, "no JSON"),
    ],
)
def test_unreadable_samples(broken: dict[str, bytes], reason: str) -> None:
    made = Sample("1", {**sample().fields, **broken})
    with pytest.raises(UnreadableSample, match=reason):
        DepthReader(size=(2, 2), scenes=("kitchen",)).read(made)


def test_a_sample_without_depth_or_smaller_than_the_crop() -> None:
    with pytest.raises(UnreadableSample, match="has no depth.png"):
        read_depth(Sample("1", {"png": image(2, 4)}), 2, 4)
    with pytest.raises(UnreadableSample, match="4 x 2 pixels, less than the crop to row 3"):
        DepthReader(size=None, crop=(0, 3, 0, 2)).read(sample())


def test_a_map_of_another_size_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "decode_depth", lambda content: pytest.fail("decoded"))
    made = Sample("1", {"depth.png": encode_depth(np.ones((30, 40)))})
    with pytest.raises(UnreadableSample, match="40 x 30 pixels, its image 4 x 2"):
        read_depth(made, 2, 4)


def test_figures_have_an_axis_for_each_map() -> None:
    metres = torch.from_numpy(DEPTH)
    drawn = depth_figure([(torch.zeros(3, 2, 4, dtype=torch.uint8), metres, metres + 1, metres > 0)] * 2, title="two")
    assert len(drawn.axes) == 2 * (4 + 3)  # three of four have a colour bar
    assert [axis.get_title() for axis in drawn.axes[:4]] == ["image", "truth (m)", "estimate (m)", "error 1.00 m"]
    assert len(estimate_figure(torch.zeros(3, 2, 4, dtype=torch.uint8), metres).axes) == 3
    bad = Sample("1", {"png": image(2, 4)})
    assert len(samples_with_depth([bad, sample()], DepthRange(), "one").axes) == 5
    with pytest.raises(DataError, match="none of 1 samples is readable"):
        samples_with_depth([bad], DepthRange(), "none")
