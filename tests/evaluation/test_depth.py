"""Depth: metrics by hand, crops pixel by pixel, options of a set, and its figure."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import DataError, SettingError
from pipeline.evaluation.depth import (
    DepthSet,
    as_depth_estimator,
    depth_metrics,
    estimated_images,
    evaluate_depth,
)
from pipeline.evaluation.showcase import model_figures
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.evaluation.tasks.depth import NAMED_CROPS, Config, read_crop, read_words
from pipeline.loaders.depth import DepthRange
from pipeline.models.class_vectors import untrained
from pipeline.models.clip import Clip
from pipeline.models.clip import Config as ClipConfig
from pipeline.models.depth_words import BINS, WORDS, DepthWords, WordDepth
from pipeline.shards.depth_values import encode_depth
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot


class Ramp:
    """Says that the red of a pixel is its distance in decimetres; ``seen`` are the scenes that it was given."""

    scenes: tuple[str, ...] = ("kitchen", "office")

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def estimate_depth(
        self, images: Sequence[Tensor], scenes: Sequence[int] | None = None, flip: bool = True
    ) -> list[Tensor]:
        """Float32 [H, W] for each image."""
        self.seen.append((scenes, flip))
        return [image[0].float() / 10 for image in images]


def sample(red: np.ndarray, depth: np.ndarray, key: str = "1", **fields: Any) -> Sample:
    pixels = np.zeros((*red.shape, 3), np.uint8)
    pixels[..., 0] = red
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    made = {"png": buffer.getvalue(), "depth.png": encode_depth(depth), "json": json.dumps(fields).encode()}
    return Sample(key, made)


def test_metrics_of_four_pixels_by_hand() -> None:
    """Ratios 1, 1.2, 2 and 4; errors 0, 0.2, 1 and 3 m."""
    truth, found = torch.tensor([1.0, 1.0, 2.0, 1.0]), torch.tensor([1.0, 1.2, 1.0, 4.0])
    measured = depth_metrics(truth, found, 10.0)
    assert measured == pytest.approx(
        {
            "delta1": 0.5,
            "delta2": 0.5,
            "delta3": 0.5,
            "abs_rel": (0 + 0.2 + 0.5 + 3) / 4,
            "log10": (0 + np.log10(1.2) + np.log10(2) + np.log10(4)) / 4,
            "rmse": np.sqrt((0 + 0.04 + 1 + 9) / 4),
        }
    )
    ratios = torch.tensor([1.25, 1.5, 1.5625, 1.9, 1.96])
    steps = depth_metrics(torch.ones(5), ratios, 10.0)
    assert (steps["delta1"], steps["delta2"], steps["delta3"]) == (0.0, 0.4, 0.8)


def test_estimates_are_clamped_to_the_range() -> None:
    measured = depth_metrics(torch.tensor([2.0, 2.0]), torch.tensor([-1.0, 50.0]), 10.0)
    assert measured["rmse"] == pytest.approx(np.sqrt((1.999**2 + 8**2) / 2))


def test_metrics_are_means_over_images_not_pixels() -> None:
    """A large image with errors counts as much as a small one without."""
    good = sample(np.full((2, 2), 20), np.full((2, 2), 2.0), "1")
    bad = sample(np.full((8, 8), 40), np.full((8, 8), 2.0), "2")
    measured = evaluate_depth(Ramp(), [good, bad], DepthSet())
    assert measured["rmse"] == pytest.approx(1.0) and measured["abs_rel"] == pytest.approx(0.5)
    assert measured["delta1"] == 0.5 and measured["samples"] == 2


def test_missing_and_far_pixels_are_not_counted() -> None:
    red = np.array([[20, 99, 99], [99, 20, 20]])
    depth = np.array([[2.0, 0.0, 12.0], [np.nan, 2.0, 2.0]])
    assert evaluate_depth(Ramp(), [sample(red, depth)], DepthSet())["rmse"] == 0
    near = DepthSet(depth_range=DepthRange(farthest=20.0))
    assert evaluate_depth(Ramp(), [sample(red, depth)], near)["rmse"] == pytest.approx(np.sqrt(2.1**2 / 4))


def by_hand(found: np.ndarray, truth: np.ndarray) -> float:
    """RMSE on NYUv2, pixel by pixel: estimated in one box, counted in another, of valid pixels."""
    total, count = 0.0, 0
    for row in range(480):
        for column in range(640):
            estimated = 56 <= row < 472 and 60 <= column < 604
            counted = 45 <= row < 471 and 46 <= column < 601
            if estimated and counted and 1e-3 < truth[row, column] < 10:
                total, count = total + (found[row, column] - truth[row, column]) ** 2, count + 1
    return (total / count) ** 0.5


def test_the_eigen_crop_pixel_by_pixel() -> None:
    numbers = np.random.default_rng(0)
    red = numbers.integers(1, 100, (480, 640))
    depth = np.round(numbers.uniform(0, 12, (480, 640)), 3)
    depth[numbers.random((480, 640)) < 0.1] = 0
    one = DepthSet(crop=NAMED_CROPS["eigen"], input_crop=NAMED_CROPS["nyu"])
    ((image, truth, found, valid),) = estimated_images(Ramp(), [sample(red, depth)], one, 1, 1)
    assert image.shape == (3, 416, 544) and truth.shape == found.shape == valid.shape == (416, 544)
    assert not valid[-1].any() and valid[-2].any() and not valid[:, 541:].any() and valid[:, 540].any()
    measured = evaluate_depth(Ramp(), [sample(red, depth)], one)
    assert measured["rmse"] == pytest.approx(by_hand(red / 10, depth), rel=1e-6)


def test_images_smaller_than_the_crop_are_an_error() -> None:
    one = DepthSet(crop=NAMED_CROPS["eigen"], input_crop=NAMED_CROPS["nyu"])
    with pytest.raises(DataError, match="less than the crop to row 472 and column 604"):
        evaluate_depth(Ramp(), [sample(np.ones((48, 64)), np.ones((48, 64)))], one)


@pytest.mark.parametrize(
    ("crop", "input_crop", "seen"),
    [
        ((0, 4, 9, 12), None, "rows 0 to 4 and columns 0 to 8"),
        ((4, 9, 0, 4), None, "rows 0 to 4 and columns 0 to 8"),
        ((0, 2, 0, 8), (2, 4, 0, 8), "rows 2 to 4 and columns 0 to 8"),
    ],
)
def test_a_counted_crop_outside_of_the_image_is_named(crop: Any, input_crop: Any, seen: str) -> None:
    one = DepthSet(crop=crop, input_crop=input_crop)
    with pytest.raises(DataError, match=f"counted crop {':'.join(map(str, crop))} is outside .*, {seen}"):
        evaluate_depth(Ramp(), [sample(np.ones((4, 8)), np.ones((4, 8)))], one)


def test_a_set_without_a_valid_pixel_is_an_error_with_the_range() -> None:
    """As depth in metres where millimetres are expected: 2 mm for 2 m."""
    with pytest.raises(DataError, match="no pixel of 0.01 to 10.0 m"):
        one = DepthSet(depth_range=DepthRange(nearest=0.01))
        evaluate_depth(Ramp(), [sample(np.ones((4, 4)), np.full((4, 4), 0.002))], one)


def test_scenes_are_those_of_the_json_or_left_to_the_model() -> None:
    some = [sample(np.ones((4, 4)), np.ones((4, 4)), scene=name) for name in ("office", "attic")]
    model = Ramp()
    evaluate_depth(model, some, DepthSet())
    evaluate_depth(model, some, DepthSet(scenes=False, flip=False))
    assert model.seen == [([1, -1], True), (None, False)]


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """A CLIP whose tower normalises by statistics of batches."""
    place = tmp_path_factory.mktemp("configs") / "depth-set-resnet.json"
    tower = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    place.write_text(json.dumps({"embed_dim": 16, "vision_cfg": tower, "text_cfg": text}))
    open_clip.add_model_config(place.parent)
    torch.manual_seed(0)
    return Clip(ClipConfig(architecture=place.stem))


def test_a_clip_in_training_mode_is_evaluated_as_in_evaluation_mode(resnet: Clip) -> None:
    """Statistics of the evaluated images neither change the estimate nor are kept."""
    numbers = np.random.default_rng(0)
    some = [sample(numbers.integers(0, 256, (64, 64)), numbers.uniform(1, 3, (64, 64)), str(key)) for key in range(3)]
    one = DepthSet(words=DepthWords(mode="projected", word_temperature=0.02))

    def measured() -> dict[str, float]:
        return evaluate_depth(as_depth_estimator(resnet, "here", one.words), some, one, batch=3)

    resnet.eval()
    expected = measured()
    before = {name: value.clone() for name, value in resnet.state_dict().items()}
    resnet.train().model.visual.bn1.eval()
    assert measured() == expected
    assert all(torch.equal(value, before[name]) for name, value in resnet.state_dict().items())
    assert resnet.training and resnet.model.visual.bn2.training and not resnet.model.visual.bn1.training


def test_a_set_without_known_scenes_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """Not where one sample has a known class, the model names them or has only one."""
    unknown = [sample(np.ones((4, 4)), np.ones((4, 4)), str(key), scene="attic") for key in range(6)]
    known = sample(np.ones((4, 4)), np.ones((4, 4)), "7", scene="office")
    single = Ramp()
    single.scenes = ("kitchen",)
    evaluate_depth(Ramp(), [*unknown, known], DepthSet(), batch=2)
    evaluate_depth(Ramp(), unknown, DepthSet(scenes=False), batch=2)
    evaluate_depth(single, unknown, DepthSet(), batch=2)
    assert not caplog.records
    evaluate_depth(Ramp(), unknown, DepthSet(), batch=2)
    (record,) = caplog.records
    assert "no 'scene' of 6 samples is one of the model's 2 classes" in record.getMessage()


# Options


def test_crops_by_name_or_by_numbers() -> None:
    assert read_crop("depth_crop", "none") is None and read_crop("depth_crop", "eigen") == (45, 471, 46, 601)
    assert read_crop("depth_crop", "1:2:3:40") == (1, 2, 3, 40)
    for bad in ("", "1:2:3", "2:1:3:4", "1:2:4:4", "a:b:c:d", "-1:2:3:4", "garg"):
        with pytest.raises(SettingError, match="depth_crop"):
            read_crop("depth_crop", bad)


def test_words_from_a_file(tmp_path: Path) -> None:
    plain, scenes, other = (tmp_path / name for name in ("plain.json", "scenes.json", "other.json"))
    plain.write_text(json.dumps({"near": 1, "far": 4.5}))
    found = read_words(Config(words=str(plain), mode="projected", temperature=0.1))
    assert (found.words, found.bins) == (("near", "far"), (1, 4.5))
    assert (found.mode, found.word_temperature) == ("projected", 0.1)
    scenes.write_text(json.dumps({"bath": {"near": 1, "far": 2}, "hall": {"near": 3, "far": 8}}))
    found = read_words(Config(words=str(scenes)))
    assert found.scenes == ("bath", "hall") and found.scene_bins == ((1, 2), (3, 8)) and found.bins == (2, 5)
    assert (read_words(Config()).words, read_words(Config()).bins) == (WORDS, BINS)
    other.write_text(json.dumps({"bath": {"near": 1, "far": 2}, "hall": {"far": 3, "near": 8}}))
    for content, match in ((None, "in this order"), ("[1]", "dict"), ('{"near": "x"}', "near"), ("{", "JSON")):
        if content is not None:
            other.write_text(content)
        with pytest.raises(SettingError, match=match):
            read_words(Config(words=str(other)))
    with pytest.raises(SettingError, match="no such file"):
        read_words(Config(words=str(tmp_path / "missing.json")))


def test_data_without_depth_are_refused(make_snapshot: Callable[..., Snapshot]) -> None:
    pixels = sample(np.ones((4, 4)), np.ones((4, 4))).fields["png"]
    snapshot = make_snapshot([{"png": pixels}])
    with pytest.raises(SettingError, match="data with depth.png"):
        Evaluations(depth=(snapshot.folder,)).prepare()  # type: ignore[call-arg]


def test_a_clip_is_evaluated_with_its_words_and_drawn() -> None:
    """The set's own options; figures of four rows with image, truth, estimate and error."""
    clip = untrained("clipmill-tiny")
    sets = (
        "drawn_depth,samples=6,mode=projected,farthest=4",
        "all=drawn_depth,samples=6,mode=projected,crop=0:128:0:128",
    )
    prepared = Evaluations(depth=sets).prepare()  # type: ignore[call-arg]
    measured = evaluate(clip, prepared)
    assert measured["depth/all/samples"] == 6 and 0.5 < measured["depth/all/rmse"] < 4
    assert measured["depth/drawn_depth/rmse"] < measured["depth/all/rmse"]  # without the walls of halls
    figures = model_figures(clip, prepared)
    assert set(figures) == {"depth/drawn_depth", "depth/all"}
    assert len(figures["depth/all"].axes) == 4 * 7


def test_models_that_estimate_no_depth_are_refused() -> None:
    with pytest.raises(SettingError, match="estimate_depth"):
        as_depth_estimator(object(), "here", DepthSet().words)
    model = as_depth_estimator(untrained("clipmill-tiny"), "here", DepthSet().words)
    assert isinstance(model, WordDepth) and as_depth_estimator(model, "here", DepthSet().words) is model
