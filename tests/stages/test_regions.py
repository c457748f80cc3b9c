"""Features of regions: of the right boxes, checked, made once, refused where something else made them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from pipeline.dataset import load_card
from pipeline.errors import DataError, SettingError, SidecarError
from pipeline.evaluation.models import load_model
from pipeline.evaluation.regions import LoadRegionModel, ProposerOptions
from pipeline.models.towers.crops import CropRule
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards, read_snapshot
from pipeline.shards.storage import Folder, file_digest
from pipeline.shards.tar import TarShard, TarWriter
from pipeline.stages.regions import RegionOptions, extract_regions, read_regions
from pipeline.stages.shard_tasks import Workers
from pipeline.stages.smoke import drawn_snapshot

TINY = "clipmill-tiny:untrained"
HERE = Workers(processes_count=0)
FREE = RegionOptions(floor=0.0)


def model(**settings: Any) -> LoadRegionModel:
    return LoadRegionModel(teacher=TINY, device="cpu", **settings)


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    return drawn_snapshot(Folder(tmp_path / "drawn"), samples=10, rows_per_shard=6)


def shard_of(folder: Path, *samples: Sample) -> Snapshot:
    folder.mkdir()
    with open(folder / "00000.tar", "wb") as file:
        writer = TarWriter(file)
        for sample in samples:
            writer.write(sample)
        writer.close()
    tar = folder / "00000.tar"
    shard = Shard(name="00000", samples=len(samples), bytes=tar.stat().st_size, sha256=file_digest(tar), sidecars={})
    fields = ("boxes.json", "jpg")
    return publish_shards(Folder(folder), (shard,), fields=fields, card=None, options={}, rows=len(samples), dropped={})


def plainly(sample: Sample, size: int = 64) -> tuple[np.ndarray, torch.Tensor]:
    """Boxes and features as one would write it down: Pillow, one crop at a time, both scales, added, normalised."""
    clip: Any = load_model(TINY, "cpu")
    picture = Image.open(io.BytesIO(sample.image())).convert("RGB")
    boxes, features = [], []
    for thing in json.loads(sample.fields["boxes.json"])["objects"]:
        x, y, width, height = thing["bbox"]
        boxes.append([x, y, x + width, y + height])
        encoded = []
        for scale in (1.0, 1.5):
            left, top = x + width / 2 * (1 - scale), y + height / 2 * (1 - scale)
            right, bottom = left + scale * width, top + scale * height
            box = (max(0, int(np.floor(left))), max(0, int(np.floor(top))))
            end = (min(picture.width, int(np.ceil(right))), min(picture.height, int(np.ceil(bottom))))
            crop = picture.crop((*box, *end)).resize((size, size), Image.Resampling.BICUBIC)
            with torch.no_grad():
                encoded.append(clip.encode_image(torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None])[0])
        features.append(functional.normalize(encoded[0] + encoded[1], dim=0))
    return np.array(boxes, np.float64), torch.stack(features)


def test_features_are_those_of_the_plain_way(snapshot: Snapshot) -> None:
    made = extract_regions(snapshot, model(), ("disc", "star"), FREE, HERE)
    assert made.parent == snapshot.id and all(set(shard.sidecars) == {"regions"} for shard in made.shards)
    seen = 0
    for shard in made.shards:
        stored = read_regions(Folder(made.folder), shard)
        for sample in TarShard(Path(made.folder) / shard.tar):
            boxes, features = plainly(sample)
            regions = stored[sample.key]
            found = regions.boxes * 64
            order = [int(np.abs(found - box).sum(axis=1).argmin()) for box in boxes]
            np.testing.assert_allclose(found[order], boxes, atol=1e-4)
            cosines = (torch.from_numpy(regions.features[order].astype(np.float32)) * features).sum(dim=1)
            assert cosines.min() > 0.999
            seen += len(boxes)
    assert seen == sum(read_regions(Folder(made.folder), shard).regions for shard in made.shards) > 10


def test_the_check_counts_what_the_nearest_name_says(snapshot: Snapshot) -> None:
    """Names and features against each other by hand, of the boxes with these labels alone."""
    classes = ("disc", "square", "star", "triangle", "heart")
    made = extract_regions(snapshot, model(), classes, FREE, HERE)
    clip: Any = load_model(TINY, "cpu")
    with torch.no_grad():
        names = clip.encode_text(clip.tokenizer([f"a photo of a {name}." for name in classes]))
    matched = right = 0
    for shard in made.shards:
        for sample in TarShard(Path(made.folder) / shard.tar):
            labels = [thing["label"] for thing in json.loads(sample.fields["boxes.json"])["objects"]]
            boxes, features = plainly(sample)
            known = [number for number, label in enumerate(labels) if label in classes]
            for number, feature in enumerate(features):
                shared = [_overlap(boxes[number], boxes[other]) for other in known]
                if shared and max(shared) >= 0.5:
                    matched += 1
                    truth = labels[known[int(np.argmax(shared))]]
                    right += classes[int((names @ feature).argmax())] == truth
    checks = [read_regions(Folder(made.folder), shard).check for shard in made.shards]
    assert (sum(one.matched for one in checks), sum(one.right for one in checks)) == (matched, right)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def test_below_the_floor_the_job_stops(snapshot: Snapshot) -> None:
    strict = RegionOptions(floor=0.99, least_matched=3)
    with pytest.raises(DataError, match="less than floor 0.99: the boxes do not fit"):
        extract_regions(snapshot, model(), load_card("drawn_shapes").classes, strict, HERE)


def test_made_once_and_resumed(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    first = extract_regions(snapshot, model(), (), FREE, HERE)
    (Path(snapshot.folder) / "00001.regions.parquet").unlink()
    opened: list[str] = []
    real = Folder.open
    monkeypatch.setattr(Folder, "open", lambda self, name: opened.append(name) or real(self, name))
    assert extract_regions(first, model(), (), FREE, HERE) == first and opened == ["00001.tar"]


@pytest.mark.parametrize(
    "other",
    [
        {"crop": CropRule(shape="pad")},
        {"crop": CropRule(average="raw")},
        {"proposer": ProposerOptions(most=1)},
        {"proposer": ProposerOptions(labels=("disc",))},
        {"precision": "bf16"},
    ],
)
def test_other_settings_are_refused_or_put_beside(snapshot: Snapshot, other: dict[str, Any]) -> None:
    made = extract_regions(snapshot, model(), (), FREE, HERE)
    with pytest.raises(SidecarError, match="other settings"):
        extract_regions(made, model(**other), (), FREE, HERE)
    beside = extract_regions(made, model(**other), (), RegionOptions(name="other", floor=0), HERE)
    assert all(sorted(shard.sidecars) == ["other", "regions"] for shard in beside.shards)


def test_regions_of_another_tar_or_none_at_all_are_refused(snapshot: Snapshot) -> None:
    folder = Folder(snapshot.folder)
    with pytest.raises(SidecarError, match="missing; make it with jobs/extract_region_features.py"):
        read_regions(folder, snapshot.shards[0])
    made = extract_regions(snapshot, model(), (), FREE, HERE)
    with pytest.raises(SidecarError, match="was made from another"):
        changed = Shard(name="00000", samples=6, bytes=1, sha256="0" * 64, sidecars={})
        read_regions(folder, changed)
    with pytest.raises(SidecarError, match="was made by .*, not another teacher"):
        read_regions(folder, made.shards[0], maker="another teacher")
    with pytest.raises(SidecarError, match="sample 99 has no row"):
        read_regions(folder, made.shards[0])["99"]


def test_pictures_without_regions_or_pixels_have_none(snapshot: Snapshot, tmp_path: Path) -> None:
    whole = TarShard(Path(snapshot.folder) / "00000.tar")[0]
    nothing = json.dumps({"width": 64, "height": 64, "objects": []}).encode()
    outside = json.dumps({"width": 64, "height": 64, "objects": [{"label": "x", "bbox": [90, 0, 5, 5]}]}).encode()
    jpg = whole.fields["jpg"]
    made = extract_regions(
        shard_of(
            tmp_path / "few",
            Sample("0", {"jpg": jpg, "boxes.json": nothing}),
            Sample("1", {"jpg": b"broken", "boxes.json": whole.fields["boxes.json"]}),
            Sample("2", {"jpg": jpg, "boxes.json": outside}),
            Sample("3", {"jpg": jpg, "boxes.json": whole.fields["boxes.json"]}),
        ),
        model(),
        (),
        FREE,
        HERE,
    )
    stored = read_regions(Folder(made.folder), made.shards[0])
    assert [len(stored[key].boxes) for key in "012"] == [0, 0, 0] and len(stored["3"].boxes) > 0
    assert stored["0"].features.shape == (0, 32)


def test_boxes_of_another_picture_size_are_refused(snapshot: Snapshot, tmp_path: Path) -> None:
    whole = TarShard(Path(snapshot.folder) / "00000.tar")[0]
    record = {**json.loads(whole.fields["boxes.json"]), "width": 128}
    wrong = Sample("0", {"jpg": whole.fields["jpg"], "boxes.json": json.dumps(record).encode()})
    with pytest.raises(DataError, match="64 x 64 pixels, its boxes are measured in 128 x 64"):
        extract_regions(shard_of(tmp_path / "wrong", wrong), model(), (), FREE, HERE)


def test_a_detector_of_torchvision_proposes(snapshot: Snapshot, tmp_path: Path) -> None:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    torch.manual_seed(0)
    detector = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    torch.save(detector.state_dict(), tmp_path / "ssd.pth")
    options = ProposerOptions(proposer=f"torchvision:ssdlite320_mobilenet_v3_large={tmp_path}/ssd.pth", most=5)
    made = extract_regions(snapshot, model(proposer=options), (), FREE, HERE)
    (first, *_), detector = list(TarShard(Path(made.folder) / made.shards[0].tar)), detector.eval()
    pixels = np.asarray(Image.open(io.BytesIO(first.image())).convert("RGB"))
    with torch.no_grad():
        found = detector([torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255])[0]
    sides = found["boxes"][:, 2:] - found["boxes"][:, :2]
    expected = found["boxes"][(sides >= 2).all(dim=1)][:5]
    regions = read_regions(Folder(made.folder), made.shards[0])[first.key]
    assert len(regions.boxes) == len(expected) > 0
    np.testing.assert_allclose(regions.boxes * 64, expected.numpy(), atol=0.5)  # Pillow decodes a little differently


@pytest.mark.parametrize(
    ("proposer", "said"),
    [("torchvision:fastr_rcnn", "proposer: 'fastr_rcnn'"), (TINY.replace("untrained", "x"), "clipmill-tiny")],
)
def test_unknown_proposers_are_one_sentence(snapshot: Snapshot, proposer: str, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        extract_regions(snapshot, model(proposer=ProposerOptions(proposer=proposer)), (), FREE, HERE)


def test_ray_makes_the_same_file(snapshot: Snapshot, ray_cluster: Any) -> None:
    here = extract_regions(snapshot, model(), ("disc", "star"), FREE, HERE)
    digests = [file_digest(Path(here.folder) / f"{shard.name}.regions.parquet") for shard in here.shards]
    for shard in here.shards:
        (Path(here.folder) / f"{shard.name}.regions.parquet").unlink()
    again = extract_regions(read_snapshot(here.folder), model(), ("disc", "star"), FREE, Workers())
    assert [shard.sidecars["regions"] for shard in again.shards] == digests
