"""Images, boxes, masks and stored regions move together; torchvision's transforms and drawn squares tell whether."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

from pipeline.errors import DataError, SettingError, SidecarError
from pipeline.loaders.batches import LoaderConfig, SamplePosition, snapshot_batches
from pipeline.loaders.detection import (
    BACKGROUND,
    DetectionReader,
    Placement,
    RandomResize,
    StoredRegions,
    padded,
)
from pipeline.loaders.samples import Samples, UnreadableSample
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import Wanted
from pipeline.shards.snapshot import Snapshot

HEIGHT, WIDTH = 90, 120
BOXES = np.array([[10.0, 20.0, 50.0, 60.0], [60.0, 5.0, 115.0, 40.0], [0.0, 70.0, 30.0, 90.0]])


def places(count: int = 40, size: int = 80) -> list[Placement]:
    resize = RandomResize(size=size, scale=(0.3, 2.0), flip=0.5)
    return [resize.place(HEIGHT, WIDTH, 3, SamplePosition(0, number)) for number in range(count)]


def by_torchvision(place: Placement, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moved boxes, and those of them with sides of a pixel, by torchvision's own operations."""
    moved = tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=(HEIGHT, WIDTH))
    if place.mirrored:
        moved = transforms.horizontal_flip(moved)
    moved = transforms.resize(moved, list(place.scaled))
    height, width = place.extent
    moved = transforms.crop(moved, *place.offset, height, width)
    plain = transforms.clamp_bounding_boxes(moved).numpy()
    return plain, (plain[:, 2:] - plain[:, :2] >= 1).all(axis=1)


def test_boxes_move_as_torchvision_moves_them() -> None:
    kinds = set()
    for place in places():
        expected, large = by_torchvision(place, BOXES)
        moved = place.boxes(BOXES)
        assert np.allclose(moved[large], expected[large], atol=1e-3)
        kinds.add((place.mirrored, place.offset != (0, 0), bool(large.all())))
    assert len(kinds) >= 5  # mirrored and not, cut and not, with and without objects that are gone


def test_a_square_in_the_image_is_found_where_its_box_is() -> None:
    """Whatever is done to pixels is done to boxes: a white square is where its box says."""
    found = 0
    for place in places():
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        pixels[20:60, 10:50] = 255
        seen = place.image(pixels)[0].numpy()
        height, width = place.extent
        bright = np.argwhere(seen[:height, :width] > 127)
        box = place.boxes(BOXES[:1])[0]
        if (box[2:] - box[:2]).min() < 2:
            continue
        (top, left), (bottom, right) = bright.min(axis=0), bright.max(axis=0) + 1
        assert np.abs(np.array([left, top, right, bottom]) - box).max() <= 1.0, place
        assert (seen[height:] == 124).all() and (seen[:, width:] == 124).all()
        found += 1
    assert found > 20


def test_masks_move_as_images_do() -> None:
    """A triangle's mask over its box is what the moved image of that mask shows there."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for row in range(40):
        mask[20 + row, 10 : 11 + row] = 1
    compared = 0
    for place in places():
        box = place.boxes(BOXES[:1])[0]
        if (box[2:] - box[:2]).min() < 12:
            continue
        grid = place.mask(mask, box, 16)
        shown = place.image(np.repeat(mask[:, :, None] * np.uint8(255), 3, axis=2))[0].numpy() > 127
        columns = (box[0] + (np.arange(16) + 0.5) / 16 * (box[2] - box[0])).astype(int)
        rows = (box[1] + (np.arange(16) + 0.5) / 16 * (box[3] - box[1])).astype(int)
        agreement = (shown[np.ix_(rows, columns)] == grid).mean()
        assert agreement > 0.9, place
        compared += 1
    assert compared > 10


def test_the_distribution_is_large_scale_jitter() -> None:
    """Scales are even between the limits; half are mirrored; an image that is smaller than the square is not cut."""
    resize = RandomResize(size=100, scale=(0.5, 1.5), flip=0.5)
    drawn = [resize.place(100, 100, 0, SamplePosition(0, number)) for number in range(400)]
    factors = np.array([place.scaled[0] / 100 for place in drawn])
    assert factors.min() < 0.55 and factors.max() > 1.45 and factors.mean() == pytest.approx(1.0, abs=0.05)
    assert 150 < sum(place.mirrored for place in drawn) < 250
    assert all(place.offset == (0, 0) for place in drawn if place.scaled[0] <= 100)
    offsets = [place.offset[0] / (place.scaled[0] - 100) for place in drawn if place.scaled[0] > 110]
    assert np.mean(offsets) == pytest.approx(0.5, abs=0.1)
    assert (
        resize.place(100, 100, 0, SamplePosition(1, 3)) != drawn[3] == resize.place(100, 100, 0, SamplePosition(0, 3))
    )


def test_a_whole_image_fits() -> None:
    place = RandomResize(size=64).whole(30, 60)
    assert place.scaled == (32, 64) and place.extent == (32, 64) and place.offset == (0, 0) and not place.mirrored


def sample(objects: list[dict[str, Any]], side: int = 64, **more: Any) -> Sample:
    content = json.dumps({"width": side, "height": side, "objects": objects, **more}).encode()
    import simplejpeg

    pixels = np.full((64, 64, 3), 90, np.uint8)
    return Sample("000001", {"boxes.json": content, "jpg": simplejpeg.encode_jpeg(pixels)})


def reader(*keys: str, **settings: Any) -> DetectionReader:
    whole = RandomResize(size=64, scale=(1.0, 1.0), flip=0.0)
    return DetectionReader(keys=keys, **{"resize": whole, "classes": ("cat", "dog"), **settings})


FIRST = SamplePosition(0, 0)


def test_what_is_not_learnt_is_left_out() -> None:
    objects = [
        {"label": "dog", "bbox": [1, 2, 10, 20]},
        {"label": "unknown", "bbox": [1, 2, 10, 20]},
        {"label": "cat", "bbox": [5, 5, 10, 10], "iscrowd": 1},
        {"label": "cat", "bbox": [5, 5, 0, 10]},
        {"label": "cat", "bbox": [float("nan"), 5, 3, 10]},
        {"label": "cat", "bbox": [70, 5, 3, 10]},
        {"label": "cat", "bbox": [60, 60, 30, 30]},
    ]
    one = sample(objects)
    row = reader("boxes", "labels").read(one, FIRST)
    boxes, labels = row["boxes"], row["labels"]
    assert boxes.tolist() == [[1, 2, 11, 22], [60, 60, 64, 64]] and labels.tolist() == [1, 0]
    assert reader("labels", classes=()).read(one, FIRST)["labels"].tolist() == [0, 0, 0]
    assert len(reader("boxes", most=1).read(one, FIRST)["boxes"]) == 1


def test_labels_are_compared_as_words() -> None:
    one = sample([{"label": label, "bbox": [1, 2, 10, 20]} for label in ("hot dog", "CAT", "hotdog")])
    assert reader("labels", classes=("Hot_Dog", "cat")).read(one, FIRST)["labels"].tolist() == [0, 1]


def test_masks_follow_their_objects() -> None:
    objects = [
        {"label": "other", "bbox": [0, 0, 64, 64]},
        {"label": "cat", "bbox": [8, 8, 16, 16], "segmentation": [[8, 8, 24, 8, 24, 16, 8, 16]]},
        {"label": "dog", "bbox": [30, 30, 10, 10]},
    ]
    masks = reader("masks", mask_cells=8).read(sample(objects), FIRST)["masks"]
    assert masks.shape == (2, 8, 8)
    assert masks[0, :4].all() and not masks[0, 5:].any()  # the upper half of its box
    assert masks[1].all()  # without a segmentation: the box


def test_unusable_samples_are_named() -> None:
    broken = sample([{"label": "cat", "bbox": [8, 8, 16, 16], "segmentation": {"size": [9, 9], "counts": [81]}}])
    with pytest.raises(UnreadableSample, match="000001.*segmentation"):
        reader("masks", mask_cells=8).read(broken, FIRST)
    for segmentation in ([[8, 8, 16, 16]], [8, 8, 16, 8, 16, 16], [["a", 1, 2, 3, 4, 5]]):
        broken = sample([{"label": "cat", "bbox": [8, 8, 16, 16], "segmentation": segmentation}])
        with pytest.raises(UnreadableSample, match="000001.*segmentation"):
            reader("masks", mask_cells=8).read(broken, FIRST)
    with pytest.raises(UnreadableSample, match=r"no boxes\.json"):
        reader("boxes").read(Sample("000002", {}), FIRST)
    with pytest.raises(DataError, match="resize-mode no"):
        reader("image").read(sample([], side=128), FIRST)
    with pytest.raises(SettingError, match="jitter_scale"):
        RandomResize(scale=(0.0, 1.0))
    with pytest.raises(SettingError, match="some of image, extent"):
        reader("picture")
    with pytest.raises(SettingError, match="regions"):
        reader("region_boxes")


WANTED = Wanted(name="regions", job="jobs/make_them.py")
STORED = StoredRegions(wanted=WANTED, width=3)


def with_regions(boxes: list[float], features: np.ndarray, side: int = 64) -> Sample:
    one = sample([])
    row = {"height": side, "width": side, "boxes": boxes, "features": features.astype(np.float16).tobytes()}
    one.rows["regions"] = row
    return one


def test_regions_that_are_cut_away_keep_their_row_and_lose_their_box() -> None:
    zoom = RandomResize(size=64, scale=(2.0, 2.0), flip=0.0)
    place = zoom.place(64, 64, 1, FIRST)
    boxes = np.array([[0.0, 0.0, 0.1, 0.1], [0.9, 0.9, 1.0, 1.0], [0.2, 0.2, 0.8, 0.8]])
    one = with_regions(boxes.ravel().tolist(), np.eye(3))
    both = {"resize": zoom, "seed": 1}
    row = reader("region_boxes", "region_features", regions=STORED, **both).read(one, FIRST)
    moved, features = row["region_boxes"].numpy(), row["region_features"]
    assert features.tolist() == np.eye(3).tolist()
    expected = place.boxes(boxes * 64)
    gone = (expected[:, 2:] - expected[:, :2] < 1).any(axis=1)
    assert gone.any() and not gone[2]
    assert not moved[gone].any() and np.allclose(moved[~gone], expected[~gone], atol=1e-4)
    few = StoredRegions(wanted=WANTED, width=3, most=1)
    row = reader("region_boxes", "region_features", regions=few, **both).read(one, FIRST)
    assert len(row["region_boxes"]) == len(row["region_features"]) == 1


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.7, 1.9)])
def test_stored_regions_are_mirrored_as_boxes_are(scale: tuple[float, float]) -> None:
    """The objects' own boxes, stored as regions of an image that is always mirrored."""
    boxes = [[1, 2, 10, 20], [40, 30, 20, 25], [0, 50, 64, 14]]
    one = sample([{"label": "cat", "bbox": box} for box in boxes])
    corners = np.array([[x, y, x + width, y + height] for x, y, width, height in boxes]) / 64
    one.rows["regions"] = with_regions(corners.ravel().tolist(), np.eye(3)).rows["regions"]
    for number in range(5):
        resize = RandomResize(size=64, scale=scale, flip=1.0)
        both = reader("boxes", "region_boxes", resize=resize, seed=number, regions=STORED)
        row = both.read(one, SamplePosition(0, number))
        moved = row["region_boxes"]
        kept = (moved[:, 2:] > moved[:, :2]).all(dim=1)
        assert torch.allclose(moved[kept], row["boxes"], atol=1e-4)
        assert int(kept.sum()) >= 1
        if scale == (1.0, 1.0):
            assert torch.allclose(moved[0], torch.tensor([53.0, 2.0, 63.0, 22.0]), atol=1e-4)


def test_regions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SidecarError, match=r"image of 32 x 32 .*make_them"):
        reader("region_boxes", regions=STORED).read(with_regions([0, 0, 1, 1], np.eye(1), side=32), FIRST)
    with pytest.raises(SidecarError, match=r"1 boxes and 6 numbers.*make_them"):
        reader("region_features", regions=STORED).read(with_regions([0, 0, 1, 1], np.ones((2, 3))), FIRST)


def test_padding() -> None:
    whole = padded([torch.ones(2, 4), torch.ones(0, 4)], 0.0)
    assert whole.shape == (2, 2, 4) and whole[0].all() and not whole[1].any()
    assert padded([torch.zeros(0, dtype=torch.int64)], BACKGROUND).tolist() == [[BACKGROUND]]


def test_draws_belong_to_samples() -> None:
    draws, one = reader("draws", seed=5), sample([])
    first = draws.read(one, SamplePosition(0, 1))
    assert first == draws.read(one, SamplePosition(0, 1)) != draws.read(one, SamplePosition(1, 1))
    assert draws.read(one, None) == {"draws": 0}
    assert draws.collate([{"draws": 1}, {"draws": 2}])["draws"].tolist() == [1, 2]


def test_evaluation_sees_the_whole_image() -> None:
    """Without a position nothing is random, whatever the settings of training."""
    one = sample([{"label": "cat", "bbox": [8, 8, 16, 16]}])
    trains = reader("extent", "boxes", resize=RandomResize(size=64, scale=(0.5, 0.7), flip=1.0))
    row = trains.read(one, None)
    assert row["extent"] == (64, 64) and row["boxes"].tolist() == [[8, 8, 24, 24]]
    assert trains.read(one, FIRST)["extent"] != (64, 64)


@pytest.fixture(scope="module")
def regions(make_snapshot: Callable[..., Snapshot]) -> Snapshot:
    return make_snapshot((5, 4), regions=("teacher", 8))


def test_sidecars_are_joined_by_key(regions: Snapshot) -> None:
    wanted = Wanted(name="regions", job="jobs/x.py", facts={"teacher": "teacher"})
    stored = StoredRegions(wanted=wanted, width=8)
    keys = ("image", "region_boxes", "region_features")
    joined = DetectionReader(keys=keys, resize=RandomResize(size=32), regions=stored)
    batches = list(snapshot_batches(regions, [joined], batch_size=3, config=LoaderConfig(loader_workers=0)))
    given = [batch["region_features"] for batch in batches]
    features = torch.cat([some[:, :3] if some.shape[1] >= 3 else torch.zeros(1, 3, 8) for some in given])
    import pyarrow.parquet as pq

    rows = [row for n in range(2) for row in pq.read_table(f"{regions.folder}/0000{n}.regions.parquet").to_pylist()]
    assert len(features) == len(rows) == 9
    for row, found in zip(rows, features, strict=True):
        stored = torch.from_numpy(np.frombuffer(row["features"], np.float16).reshape(-1, 8).copy())
        assert torch.equal(found[: len(stored)], stored) and not found[len(stored) :].any()


def test_a_sidecar_of_another_teacher_or_tar_is_refused(
    regions: Snapshot, make_snapshot: Callable[..., Snapshot], tmp_path: Path
) -> None:
    other = Wanted(name="regions", job="jobs/extract_region_features.py", facts={"teacher": "another"})
    with pytest.raises(SidecarError, match=r"made with the teacher teacher, not another; .*extract_region_features"):
        Samples(regions, sidecars=(other,))[0]
    plain = make_snapshot((3,))
    with pytest.raises(SidecarError, match=r"no regions for 1 of its 1 shards.*extract_region_features"):
        Samples(plain, sidecars=(other,))
    moved = make_snapshot((3,), folder=tmp_path, regions=("teacher", 8))
    (tmp_path / "00000.regions.parquet").write_bytes(Path(regions.folder, "00000.regions.parquet").read_bytes())
    with pytest.raises(SidecarError, match=r"made from another 00000\.tar"):
        Samples(moved, sidecars=(Wanted(name="regions", job="jobs/x.py"),))[0]
    (tmp_path / "00000.regions.parquet").write_bytes(b"no parquet")
    with pytest.raises(SidecarError, match="is not parquet"):
        Samples(moved, sidecars=(Wanted(name="regions", job="jobs/x.py"),))[0]
