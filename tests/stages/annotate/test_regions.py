"""Features of regions: they match their boxes, are checked, are made once, and are rejected from another maker."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from pipeline.dataset import load_card
from pipeline.errors import DataError, SettingError, SidecarError
from pipeline.evaluation.models import load_model
from pipeline.evaluation.regions import LoadRegionModel, ProposerOptions
from pipeline.models.clip import Clip
from pipeline.models.method import Method
from pipeline.models.proposals import Proposals as Proposer
from pipeline.models.towers.crops import CropRule
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards, read_snapshot
from pipeline.shards.storage import Folder, file_digest
from pipeline.shards.tar import TarShard, TarWriter
from pipeline.stages.annotate.regions import (
    Check,
    Found,
    RegionMaker,
    RegionOptions,
    classes_digest,
    extract_regions,
    judge,
    read_found,
    read_regions,
    together,
)
from pipeline.stages.shard_tasks import Workers
from pipeline.training.checkpoint import Checkpoints, Meta
from pipeline.training.optimizer import AdamW, make_optimizer

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
    """Boxes and features by a simple implementation: Pillow, one crop at a time, both scales, added, normalised."""
    clip: Any = load_model(TINY, "cpu")
    image = Image.open(io.BytesIO(sample.image())).convert("RGB")
    boxes, features = [], []
    for obj in json.loads(sample.fields["boxes.json"])["objects"]:
        x, y, width, height = obj["bbox"]
        boxes.append([x, y, x + width, y + height])
        encoded = []
        for scale in (1.0, 1.5):
            left, top = x + width / 2 * (1 - scale), y + height / 2 * (1 - scale)
            right, bottom = left + scale * width, top + scale * height
            box = (max(0, int(np.floor(left))), max(0, int(np.floor(top))))
            end = (min(image.width, int(np.ceil(right))), min(image.height, int(np.ceil(bottom))))
            crop = image.crop((*box, *end)).resize((size, size), Image.Resampling.BICUBIC)
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
    assert seen == sum(read_found(Folder(made.folder), shard).regions for shard in made.shards) > 10


def test_the_check_counts_what_the_nearest_name_says(snapshot: Snapshot) -> None:
    """Names and features against each other by hand, of the boxes with these labels alone."""
    classes = ("disc", "square", "star", "triangle", "heart")
    made = extract_regions(snapshot, model(), classes, FREE, HERE)
    clip: Any = load_model(TINY, "cpu")
    with torch.no_grad():
        names = clip.encode_text(clip.tokenizer([f"a photo of a {name}." for name in classes]))
    matched = right = objects = 0
    for shard in made.shards:
        for sample in TarShard(Path(made.folder) / shard.tar):
            labels = [obj["label"] for obj in json.loads(sample.fields["boxes.json"])["objects"]]
            boxes, features = plainly(sample)
            known = [number for number, label in enumerate(labels) if label in classes]
            objects += len(known)
            for number, feature in enumerate(features):
                shared = [_overlap(boxes[number], boxes[other]) for other in known]
                if shared and max(shared) >= 0.5:
                    matched += 1
                    truth = labels[known[int(np.argmax(shared))]]
                    right += classes[int((names @ feature).argmax())] == truth
    checks = sum((read_found(Folder(made.folder), shard).check for shard in made.shards), Check())
    assert checks == Check(matched, right, objects, covered=objects)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def test_below_the_floor_the_job_stops(snapshot: Snapshot) -> None:
    strict = RegionOptions(floor=0.99, least_matched=3)
    with pytest.raises(DataError, match="less than floor 0.99: the boxes do not fit"):
        extract_regions(snapshot, model(), load_card("drawn_shapes").classes, strict, HERE)


def test_boxes_that_cover_hardly_an_object_stop_the_job(snapshot: Snapshot) -> None:
    """As those of other images do: then nothing is matched, and the floor alone would let them pass."""
    classes = load_card("drawn_shapes").classes
    elsewhere = model(proposer=ProposerOptions(labels=("no such label",)))
    with pytest.raises(DataError, match=r"0 of \d+ objects are covered, less than a tenth: the boxes do not fit"):
        extract_regions(snapshot, elsewhere, classes, RegionOptions(floor=0.01, least_matched=3), HERE)
    made = extract_regions(snapshot, elsewhere, classes, RegionOptions(floor=0.01, least_matched=10_000), HERE)
    check = read_found(Folder(made.folder), made.shards[0]).check
    assert (check.matched, check.covered) == (0, 0) and check.objects > 3


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Check(matched=50, right=4, objects=60, covered=50), "less than floor 0.1"),
        (Check(matched=50, right=5, objects=60, covered=50), ""),
        (Check(matched=49, right=0, objects=60, covered=49), ""),
        (Check(matched=0, right=0, objects=50, covered=4), "less than a tenth"),
        (Check(matched=5, right=5, objects=50, covered=5), ""),
        (Check(matched=0, right=0, objects=49, covered=0), ""),
        (Check(), ""),
    ],
)
def test_what_is_found_is_judged_from_fifty_on(found: Check, said: str) -> None:
    if said:
        with pytest.raises(DataError, match=said):
            judge(found, RegionOptions(), "00000")
    else:
        judge(found, RegionOptions(), "00000")
    judge(found, RegionOptions(floor=0), "00000")


def test_shards_that_other_classes_checked_are_told_and_not_summed(caplog: pytest.LogCaptureFixture) -> None:
    disc, star = classes_digest(("disc", "Star_")), classes_digest(("star",))
    assert disc == classes_digest(("star", "disc")) != star and classes_digest(()) == ""
    shards = [Found(9, Check(1, 1, 2, 1), disc), Found(9, Check(5, 5, 5, 5), star), Found(9, Check(2, 1, 3, 2), disc)]
    assert together(shards, ("star", "disc")) == Check(3, 2, 5, 3)
    (record,) = caplog.records
    assert "1 finished shards were not checked with these classes; --overwrite" in record.getMessage()
    assert together(shards, ()) == Check() and len(caplog.records) == 1


def tars_opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tars that are opened from now on."""
    opened: list[str] = []
    real = Folder.open

    def spied(self: Folder, name: str) -> BinaryIO:
        opened.extend([name] if name.endswith(".tar") else [])
        return real(self, name)

    monkeypatch.setattr(Folder, "open", spied)
    return opened


def test_finished_shards_are_checked_by_other_classes_only_with_overwrite(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their maker is the same; with --overwrite each is made again once, so that the command can go on, too."""
    again = RegionOptions(floor=0.0, overwrite=True)
    made = extract_regions(snapshot, model(), ("disc", "star"), FREE, HERE)
    opened = tars_opened(monkeypatch)
    assert extract_regions(made, model(), ("disc",), FREE, HERE) == made
    assert extract_regions(made, model(), (), again, HERE) == made and not opened
    other = extract_regions(made, model(), ("disc",), again, HERE)
    assert opened == ["00000.tar", "00001.tar"]
    assert extract_regions(other, model(), ("disc",), again, HERE) == other and len(opened) == 2
    found = [read_found(Folder(other.folder), shard) for shard in other.shards]
    assert {one.checked_by for one in found} == {classes_digest(("disc",))}


def test_crowds_are_no_truth_and_labels_are_words(snapshot: Snapshot, tmp_path: Path) -> None:
    """A crowd over the whole image, which a region of it covers; and a class that is written otherwise."""
    whole = TarShard(Path(snapshot.folder) / "00000.tar")[0]
    objects = [
        {"label": "disc", "bbox": [0, 0, 64, 64], "iscrowd": 1},
        {"label": "star", "bbox": [0, 0, 64, 60]},
        {"label": "Hot_Dog", "bbox": [40, 40, 20, 20]},
    ]
    record = {"width": 64, "height": 64, "objects": objects}
    one = Sample("0", {"jpg": whole.fields["jpg"], "boxes.json": json.dumps(record).encode()})
    made = extract_regions(shard_of(tmp_path / "crowd", one), model(), ("disc", "hot dog"), FREE, HERE)
    found = read_found(Folder(made.folder), made.shards[0])
    assert found.regions == 2  # the crowd is none
    assert (found.check.matched, found.check.objects, found.check.covered) == (1, 1, 1)


def test_a_table_has_a_chunk_for_each_batch_of_images(snapshot: Snapshot) -> None:
    """So that no chunk grows with the shard; what is in it does not depend on the batches."""
    samples = list(TarShard(Path(snapshot.folder) / "00000.tar"))
    few, many = (
        RegionMaker(model()(1), (), RegionOptions(floor=0.0, pictures_at_once=count), 1).table(
            iter(samples), snapshot.shards[0]
        )
        for count in (2, 100)
    )
    assert few["features"].num_chunks >= 3 > many["features"].num_chunks
    assert few.drop_columns("features") == many.drop_columns("features")
    for one, other in zip(few["features"].to_pylist(), many["features"].to_pylist(), strict=True):
        np.testing.assert_allclose(np.frombuffer(one, np.float16), np.frombuffer(other, np.float16), atol=2e-3)
    empty = RegionMaker(model()(1), (), FREE, 1).table(iter(()), snapshot.shards[0])
    assert len(empty) == 0 and empty.schema.equals(few.schema)


def test_made_once_and_resumed(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    first = extract_regions(snapshot, model(), (), FREE, HERE)
    (Path(snapshot.folder) / "00001.regions.parquet").unlink()
    opened = tars_opened(monkeypatch)
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


def test_images_without_regions_or_pixels_have_none(snapshot: Snapshot, tmp_path: Path) -> None:
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


def test_boxes_of_another_image_size_are_refused(snapshot: Snapshot, tmp_path: Path) -> None:
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


def saved(method: Method, folder: Path) -> str:
    meta = Meta(step=1, samples_seen=1, batch_size=1, lanes=1, seed=0, snapshot="x")
    return Checkpoints(str(folder)).save(method, make_optimizer(AdamW(), method), meta).folder.uri


def test_a_proposer_of_ours_proposes(snapshot: Snapshot, tmp_path: Path) -> None:
    """By its checkpoint's address: the best of what the method itself proposes of the stored image."""
    torch.manual_seed(0)
    method = Proposer(Proposer.smallest()).eval()
    address = saved(method, tmp_path / "rpn")
    options = ProposerOptions(proposer=address, most=7)
    made = extract_regions(snapshot, model(proposer=options), (), FREE, HERE)
    for shard in made.shards:
        stored = read_regions(Folder(made.folder), shard)
        for sample in TarShard(Path(made.folder) / shard.tar):
            pixels = np.asarray(Image.open(io.BytesIO(sample.image())).convert("RGB")).copy()
            ((boxes, scores),) = method.propose([torch.from_numpy(pixels).permute(2, 0, 1)])
            large = ((boxes[:, 2:] - boxes[:, :2]) >= 2).all(dim=1)
            regions = stored[sample.key]
            assert len(regions.boxes) == min(7, int(large.sum())) > 0
            np.testing.assert_allclose(regions.boxes * 64, boxes[large][:7], atol=0.5)  # JPEG decoders differ
            np.testing.assert_allclose(regions.scores, scores[large][:7], atol=1e-2)
    other = ProposerOptions(proposer=saved(Clip(Clip.smallest()), tmp_path / "clip"))
    with pytest.raises(SettingError, match="a method that proposes regions"):
        extract_regions(snapshot, model(proposer=other), (), RegionOptions(name="other"), HERE)


@pytest.mark.parametrize(
    ("proposer", "said"),
    [("torchvision:fastr_rcnn", "proposer: got 'fastr_rcnn'"), (TINY.replace("untrained", "x"), "clipmill-tiny")],
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


def test_regions_that_say_nothing_of_themselves_are_made_again(make_snapshot: Callable[..., Snapshot]) -> None:
    """As those of earlier versions are, which kept no numbers."""
    other = make_snapshot((3,), regions=("teacher", 8))
    with pytest.raises(SidecarError, match=r"00000.regions.parquet lacks the result of its check .*--overwrite"):
        read_found(Folder(other.folder), other.shards[0])
    assert len(read_regions(Folder(other.folder), other.shards[0])) == 3
