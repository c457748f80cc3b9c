"""The VQGAN jobs: training, evaluation and import by their smoke presets; presets against the authors' settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.config import from_json, to_json
from pipeline.errors import SettingError
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.loaders.batches import LoaderConfig
from pipeline.models.vqgan import Vqgan
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.storage import Folder
from pipeline.tracking.runs import Tracking
from pipeline.training.checkpoint import Checkpoints, load_method, read_evaluation
from pipeline.training.loop import run_training
from pipeline.training.run import prepare
from tests.jobs.conftest import load_job


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return load_job("train_vqgan")


def test_smoke(script: dict[str, Any], tmp_path: Path, own_store: str) -> None:
    """Trained with the discriminator from the third step on, evaluated, and shown beside the originals."""
    smoke = script["PRESETS"]["smoke"][1]
    store = Tracking(tracking_uri=own_store, system_metrics=False)
    run = replace(smoke.run, output_folder=str(tmp_path / "run"))
    script["main"](replace(smoke, tracking=store, run=run))
    (checkpoint,) = Checkpoints(str(tmp_path / "run")).whole()
    assert checkpoint.meta.step == 4
    evaluation = read_evaluation(checkpoint)
    assert evaluation is not None and evaluation.metrics["reconstruction/drawn_val/samples"] == 16
    method = load_method(checkpoint.folder.uri)
    assert isinstance(method, Vqgan) and int(method.use.steps) == 4
    import mlflow

    client = mlflow.MlflowClient(own_store)
    (found,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    figures = [one.path for one in client.list_artifacts(found.info.run_id, "figures")]
    assert any("reconstructions" in path for path in figures), figures
    assert found.data.metrics["train/codebook_usage"] > 0 and "train/discriminator_real" in found.data.metrics


def test_presets_are_the_authors(script: dict[str, Any]) -> None:
    """imagenet_vqgan.yaml of taming-transformers."""
    for name, codes in (("imagenet-f16", 1024), ("imagenet-f16-16384", 16_384)):
        preset = script["PRESETS"][name][1]
        assert preset.method.codes == codes and preset.method.discriminator_start == 250_001
        optimizer = preset.run.optimizer
        assert optimizer.learning_rate == pytest.approx(4.5e-6 * preset.run.batch_size)
        assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.5, 0.9, 0)
        assert optimizer.exponential == 1 and preset.run.warmup_steps == 0  # a constant rate
    for _, preset in script["PRESETS"].values():
        assert from_json(script["Train"], to_json(preset)) == preset


def test_released_weights_become_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = load_job("import_vqgan")
    method = Vqgan(Vqgan.smallest())
    torch.save({"state_dict": {**method.model.state_dict(), "loss.logvar": torch.zeros(1)}}, tmp_path / "last.ckpt")
    sizes = {
        "double_z": False, "z_channels": 16, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [16],
    }  # fmt: skip
    model = {"target": "VQModel", "params": {"embed_dim": 8, "n_embed": 32, "ddconfig": sizes}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": model}))
    places = {"start_from": str(tmp_path / "last.ckpt"), "settings": str(tmp_path / "model.yaml")}
    job["main"](job["ImportVqgan"](**places, output_folder=str(tmp_path / "model")))
    assert capsys.readouterr().out.strip().endswith("model")
    (tmp_path / "last.ckpt").unlink()
    loaded: Any = load_method(str(tmp_path / "model"))
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded.encode(images), method.eval().encode(images))
    job["main"](replace(job["PRESETS"]["smoke"][1], output_folder=str(tmp_path / "smoke")))
    assert isinstance(load_method(str(tmp_path / "smoke")), Vqgan)
    with pytest.raises(SettingError, match="settings"):
        job["main"](job["ImportVqgan"](start_from="x.ckpt"))


@pytest.mark.slow
def test_a_small_vqgan_learns_to_reconstruct_drawn_images(script: dict[str, Any], tmp_path: Path) -> None:
    """Against the same network before its training."""
    drawn_snapshot(Folder(str(tmp_path / "data")), 192, rows_per_shard=64, card=None)
    preset = script["PRESETS"]["drawn"][1]
    config = replace(
        preset.method, resolution=32, image_size=32, multipliers=(1, 2), attention_at=(16,), perceptual="",
        discriminator_start=180, restart_after=20,
    )  # fmt: skip
    run = replace(preset.run, data=str(tmp_path / "data"), output_folder=str(tmp_path / "run"), steps=200)
    run = replace(run, batch_size=8, loader=LoaderConfig(loader_workers=0))
    plan = prepare(config, run)[0]

    class Quiet:
        def log(self, metrics: Any, step: int) -> None: ...

        def flush(self, seconds: float) -> None: ...

        def close(self) -> None: ...

    run_training(plan, torch.device("cpu"), Quiet())
    sets = Evaluations(reconstruction=(f"it={tmp_path}/data",), evaluation_samples=48).prepare()
    before, after = (evaluate(one.eval(), sets) for one in (Vqgan(config), load_method(run.output_folder)))
    name = "reconstruction/it/"
    assert after[f"{name}psnr"] > before[f"{name}psnr"] + 4
    assert after[f"{name}ssim"] > before[f"{name}ssim"] + 0.08
    assert after[f"{name}codebook_usage"] > 0.2
