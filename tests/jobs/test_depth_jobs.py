"""The jobs of depth: the smoke preset of the training end to end, and the depth of one image."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import SettingError
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.models.class_vectors import untrained
from pipeline.models.depth_words import DepthWords, zero_shot_depth
from pipeline.shards.depth_values import decode_depth
from pipeline.tracking.runs import Tracking
from pipeline.training.checkpoint import Checkpoints, load_method
from tests.jobs.conftest import load_job


def test_smoke_trains_bins_that_estimate_depth(tmp_path: Path, own_store: str, capsys: Any) -> None:
    """By scene; then the job that shows the depth of an image, with the run's own words."""
    script = load_job("train_depthclip")
    smoke = script["PRESETS"]["smoke"][1]
    words = replace(smoke.method.words, scenes=("shelf", "room", "hall"))
    store = Tracking(tracking_uri=own_store, system_metrics=False)
    run = replace(smoke.run, output_folder=str(tmp_path / "run"))
    script["run_pretraining"](replace(smoke, method=replace(smoke.method, words=words), tracking=store, run=run))
    (saved,) = Checkpoints(str(tmp_path / "run")).whole()
    method: Any = load_method(saved.folder.uri)
    assert saved.meta.step == 3 and method.head.bins.shape == (3, 7)
    moved = (method.head.bins - words.table()).abs()
    assert (moved.max(dim=1).values > 0.001).all()
    metrics = evaluate(method, Evaluations(depth=("drawn_depth,samples=3",)).prepare())  # type: ignore[call-arg]
    assert 0 < metrics["depth/drawn_depth/rmse"] < 5
    from mlflow import MlflowClient

    assert [model.name for model in MlflowClient(own_store).search_registered_models()] == ["depthclip"]
    show = load_job("estimate_depth")
    image, figure, depth = (str(tmp_path / name) for name in ("image.png", "figure.png", "depth.png"))
    Image.fromarray(np.full((50, 70, 3), 90, np.uint8)).save(image)
    asked = show["EstimateDepth"](
        image=image, checkpoint=str(tmp_path / "run"), scene="hall", output=figure, depth_output=depth
    )
    capsys.readouterr()
    show["main"](asked)
    assert "half of the pixels nearer than" in capsys.readouterr().out
    found = decode_depth(Path(depth).read_bytes())
    expected = method.estimate_depth([torch.full((3, 50, 70), 90, dtype=torch.uint8)], [2])[0]
    assert found.shape == (50, 70) and np.abs(found - expected.numpy()).max() < 0.00051
    with Image.open(figure) as drawn:
        assert drawn.width > 500


def test_pixels_of_a_plain_clip_are_normalised_as_asked(tmp_path: Path) -> None:
    """Against the CLIP's words with the same statistics."""
    show = load_job("estimate_depth")
    image, depth = str(tmp_path / "image.png"), tmp_path / "depth.png"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(image)
    found = {}
    for name in ("imagenet", "model"):
        asked = replace(show["PRESETS"]["smoke"][1], image=image, pixels=name, temperature=0.01)
        show["main"](replace(asked, output=str(tmp_path / "figure.png"), depth_output=str(depth)))
        found[name] = decode_depth(depth.read_bytes())
        words = DepthWords(mode="projected", word_temperature=0.01, pixels=name)  # type: ignore[arg-type]
        model = zero_shot_depth(untrained("clipmill-tiny"), words, "")
        expected = model.estimate_depth([torch.from_numpy(pixels).permute(2, 0, 1)])[0]
        assert np.abs(found[name] - expected.numpy()).max() < 0.00051
    assert np.abs(found["imagenet"] - found["model"]).max() > 0.004


def test_bad_settings_of_an_image(tmp_path: Path) -> None:
    show = load_job("estimate_depth")
    smoke = replace(show["PRESETS"]["smoke"][1], output=str(tmp_path / "figure.png"))
    for options in ({"output": "figure.jpg"}, {"depth_output": "depth.jpg"}, {"output": ""}):
        with pytest.raises(SettingError, match="png"):
            replace(smoke, **options)
    with pytest.raises(SettingError, match="scene"):
        show["main"](replace(smoke, scene="hall"))
    with pytest.raises(SettingError, match="ResNet or vision transformer"):
        show["main"](replace(smoke, checkpoint="clipmill-small:untrained"))
    assert not (tmp_path / "figure.png").exists()
