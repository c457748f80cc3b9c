"""The job that trains LSeg: its smoke preset end to end, evaluated; the presets against the paper."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import from_json, to_json
from pipeline.dataset import load_card
from pipeline.errors import SettingError
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.loaders.samples import Samples
from pipeline.loaders.segmentation import VOID
from pipeline.models.clip import Config as ClipConfig
from pipeline.models.lseg import Lseg, PixelNetwork
from pipeline.models.method import build_method
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Shard, publish_shards, read_snapshot
from pipeline.shards.storage import Folder, file_digest
from pipeline.shards.tar import TarWriter
from pipeline.tracking.runs import Tracking
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.optimizer import AdamW, make_optimizer
from tests.jobs.conftest import load_job
from tests.loaders.test_segmentation import png


def test_smoke_trains_a_segmenter(tmp_path: Path, own_store: str) -> None:
    """Base classes of the card and the background; any words afterwards."""
    script = load_job("train_lseg")
    smoke = script["PRESETS"]["smoke"][1]
    store = Tracking(tracking_uri=own_store, system_metrics=False)
    script["main"](replace(smoke, tracking=store, run=replace(smoke.run, output_folder=str(tmp_path / "run"))))
    (saved,) = Checkpoints(str(tmp_path / "run")).whole()
    method: Any = load_method(saved.folder.uri)
    assert saved.meta.step == 3 and method.config.class_names == (*load_card("drawn_base").classes, "background")
    (found,) = method.segment([torch.full((3, 40, 60), 90, dtype=torch.uint8)], ["disc", "zebra"])
    assert found.labels.shape == (40, 60)
    sets = ("drawn_val,words=drawn_base,unlabelled=background,background_word=background,samples=4",)
    metrics = evaluate(method, Evaluations(segmentation=sets).prepare())
    assert 0 <= metrics["seg/drawn_val/miou"] <= 1 and metrics["seg/drawn_val/samples"] == 4
    from mlflow import MlflowClient

    assert [model.name for model in MlflowClient(own_store).search_registered_models()] == ["lseg"]


def test_presets_are_the_papers() -> None:
    """SGD, 0.004 / 16 for each of a process's four images, ten times that for the decoder, poly 0.9."""
    presets = load_job("train_lseg")["PRESETS"]
    for name, backbone in (("paper-vit-l-16", "vit_large_patch16_384"), ("paper-resnet-101", "resnet101")):
        preset = presets[name][1]
        optimizer: Any = preset.run.optimizer
        assert preset.method.backbone == backbone and preset.method.text_tower == "ViT-B-32-quickgelu:openai"
        assert optimizer.learning_rate == 0.004 / 16 * preset.run.batch_size / preset.run.workers
        assert (optimizer.momentum, optimizer.weight_decay, optimizer.decay_power) == (0.9, 1e-4, 0.9)
        assert optimizer.tower_rates == {"decoder": 10.0} and preset.run.precision == "fp32"
        assert preset.method.image_size == 480 and preset.method.norm == "batch"


@pytest.fixture
def tiny_clip(tmp_path: Path) -> str:
    """A run of a CLIP without training: what --text-tower takes."""
    method = build_method(ClipConfig(architecture="clipmill-tiny"))
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=1, seed=0, snapshot="x")
    return Checkpoints(str(tmp_path / "clip")).save(method, make_optimizer(AdamW(), method), meta).folder.uri


def labelled(folder: Path, names: Sequence[str], values: Sequence[int], count: int = 8) -> str:
    """A snapshot with classes, whose images of 32 pixels have a mask.png of four vertical stripes of ``values``."""
    stripes = np.repeat(np.repeat(np.array([values], np.uint8), 8, axis=1), 32, axis=0)
    members = {"png": png(np.repeat(stripes[:, :, None] * 20, 3, axis=2)), "mask.png": png(stripes)}
    folder.mkdir()
    with open(folder / "00000.tar", "wb") as file:
        writer = TarWriter(file)
        for number in range(count):
            writer.write(Sample(f"{number:05d}", members))
        writer.close()
    tar = folder / "00000.tar"
    shard = Shard(name="00000", samples=count, bytes=tar.stat().st_size, sha256=file_digest(tar), sidecars={})
    options = {"classes": dict.fromkeys(names, "")}
    described = {"fields": ("mask.png", "png"), "card": None, "options": options, "rows": count, "dropped": {}}
    return publish_shards(Folder(folder), (shard,), **described).folder


def test_two_data_sets_train_with_their_own_classes(tmp_path: Path, tiny_clip: str, own_store: str) -> None:
    """Value 1 is a dog in one and a car in the other; cats are in both. Trained against the labels of each."""
    data = [labelled(tmp_path / name, classes, (0, 1, 2, 2)) for name, classes in SETS.items()]
    script = load_job("train_lseg")
    smoke = script["PRESETS"]["smoke"][1]
    job = replace(
        smoke,
        method=replace(smoke.method, text_tower=tiny_clip, labels="mask.png", label_list="dataset"),
        base="data",
        draw=0,
        tracking=Tracking(tracking_uri=own_store, system_metrics=False),
        run=replace(smoke.run, data=f"{data[0]}=1,{data[1]}=1", batch_size=4, output_folder=str(tmp_path / "run")),
    )
    script["main"](job)
    (saved,) = Checkpoints(str(tmp_path / "run")).whole()
    config = load_method(saved.folder.uri).config
    assert config.class_names == ("dog", "cat", "car", "background")
    assert config.dataset_classes == (("dog", "cat"), ("car", "cat"))
    with pytest.raises(SettingError, match="dataset_classes: got 1.*each of the 2 data sets"):
        script["main"](replace(job, method=replace(job.method, dataset_classes=(("dog", "cat"),))))


SETS = {"animals": ("dog", "cat"), "street": ("car", "cat")}


def test_values_of_held_out_classes_keep_their_meaning(tmp_path: Path, tiny_clip: str) -> None:
    """Fold 1 holds out classes 6 to 10 of VOC: value 6 is void, and value 11 still a dining table."""
    script, seen = load_job("train_lseg"), []
    script["pretrain"] = lambda job, keeps: seen.append(job.method)
    voc = load_card("pascal_5i_fold1")
    data = labelled(tmp_path / "voc", voc.classes, (0, 1, 6, 11))
    for preset, card in (("pascal-5i", "pascal_5i_fold1"), ("two-words", "pascal_5i_fold1")):
        job = script["PRESETS"][preset][1]
        method = replace(job.method, text_tower=tiny_clip)
        script["main"](replace(job, method=method, base=card, run=replace(job.run, data=data)))
    ours, theirs = seen
    assert ours.class_names == (*voc.classes[:5], *voc.classes[10:], "others") and ours.dataset_classes == (
        voc.classes,
    )
    sample = Samples(read_snapshot(data))[0]
    read = [config.classes()[0].label_map(sample, 32, 32)[0, ::8].tolist() for config in (ours, theirs)]
    assert read == [[15, 0, VOID, 5], [15, 0, 15, 5]]


@pytest.mark.parametrize("name", sorted(load_job("train_lseg")["PRESETS"]))
def test_the_network_of_every_preset_can_be_built(name: str) -> None:
    """Its settings are good, its text tower and backbone exist; without weights, on the meta device."""
    script, seen = load_job("train_lseg"), []
    script["pretrain"] = lambda job, keeps: seen.append(job)
    job = script["PRESETS"][name][1]
    script["main"](replace(job, base=job.base if job.base != "data" else "drawn_base"))
    config = seen[0].method
    Lseg.check(replace(config, text_tower=config.text_tower or "clipmill-tiny:untrained"))
    with torch.device("meta"):
        network = PixelNetwork(replace(config, pretrained_backbone=False), 512)
        size = config.image_size // 2
        assert network(torch.empty(1, 3, 2 * size, 2 * size)).shape == (1, 512, size, size)
    assert len(config.class_names) >= 16 and config.two_words == (name == "two-words")


@pytest.mark.parametrize("fold", range(4))
def test_folds_hold_out_the_classes_of_the_protocols(fold: int) -> None:
    """torchvision's lists of VOC's and COCO's classes, without spaces in VOC's; 5f to 5f + 4, and f + 4v."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights
    from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights

    voc, coco = (load_card(f"{name}_fold{fold}") for name in ("pascal_5i", "coco_20i"))
    plain = [name.replace(" ", "") for name in voc.classes]
    assert plain == DeepLabV3_ResNet50_Weights.DEFAULT.meta["categories"][1:]
    assert voc.novel == voc.classes[5 * fold : 5 * fold + 5]
    categories = MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"][1:]
    assert list(coco.classes) == [name for name in categories if name != "N/A"]
    assert coco.novel == tuple(coco.classes[fold + 4 * number] for number in range(20))


def test_presets_go_through_json() -> None:
    script = load_job("train_lseg")
    for _, preset in script["PRESETS"].values():
        assert from_json(script["Train"], to_json(preset)) == preset


def test_wrong_options_are_one_sentence(job: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert job("train_lseg", "drawn") != 0
    assert "Traceback" not in capsys.readouterr().err
    assert job("train_lseg", "smoke", "--decay-power", "0") == 2
    assert "--decay-power" in capsys.readouterr().err
    assert job("train_lseg", "smoke", "--block", "none") == 2
    assert "block_depth" in capsys.readouterr().err
    assert job("train_lseg", "smoke", "--text-tower", "runs/none") == 2
    assert "--text-tower: got 'runs/none'" in capsys.readouterr().err
