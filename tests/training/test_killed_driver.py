"""A driver that is killed fourteen times, also between the making of its MLflow run and the storing of the run's id."""

import io
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Shard, publish_shards
from pipeline.shards.storage import Folder, file_digest
from pipeline.shards.tar import TarWriter
from pipeline.training.checkpoint import Checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.alone]

TOYS = Path(__file__).parents[1] / "models" / "toys"
STEPS = 40
CONTEXT: Any = multiprocessing.get_context("forkserver")  # imports once, then each process starts in a few ms
CONTEXT.set_forkserver_preload(["pipeline.runs.train", "mlflow", "mlflow.store.tracking.sqlalchemy_store"])


def signals(folder: Path) -> str:
    folder.mkdir()
    path, numbers = folder / "00000.tar", np.random.default_rng(0)
    with open(path, "wb") as file:
        writer = TarWriter(file)
        for number in range(20):
            content = io.BytesIO()
            np.save(content, numbers.standard_normal(8).astype(np.float32))
            writer.write(Sample(f"{number:09d}", {"npy": content.getvalue()}))
        writer.close()
    shard = Shard(name="00000", samples=20, bytes=path.stat().st_size, sha256=file_digest(path))
    publish_shards(Folder(folder), (shard,), fields=("npy",), card=None, options={}, rows=20, dropped={})
    return str(folder)


def train(data: str, output: str, store: str, dies: str, begun: Any) -> None:
    """Train the toy, 25 ms a step; ``dies`` names where this process kills itself."""
    import pipeline.models
    from pipeline.loaders.batches import LoaderConfig

    pipeline.models.__path__ = [*pipeline.models.__path__, str(TOYS)]
    from pipeline.models.method import method_class
    from pipeline.runs import train as module
    from pipeline.tracking import runs
    from pipeline.tracking.runs import Tracking
    from pipeline.training.run import Run

    method: Any = method_class("signals")
    compare = method.compare
    method.compare = lambda *arguments: (time.sleep(0.025), compare(*arguments))[1]
    die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    if dies == "before the id is stored":
        module.keep_tracking_run = die
    elif dies == "before the parameters":
        runs._log_params = die
    run = Run(
        output_folder=output,
        data=data,
        steps=STEPS,
        batch_size=4,
        warmup_steps=0,
        log_every_steps=1,
        checkpoint_every_steps=8,
        loader=LoaderConfig(loader_workers=0),
    )
    tracking = Tracking(tracking_uri=store, experiment="killed", system_metrics=False)
    begun.set()
    module.pretrain(module.Pretraining(method=method.smallest(), run=run, tracking=tracking))


def test_one_run_and_each_step_once_after_fourteen_kills(own_store: str, tmp_path: Path) -> None:
    data, moments = signals(tmp_path / "data"), random.Random(0)

    def started(output: Path, store: str, dies: str = "", after: float | None = None) -> int:
        begun = CONTEXT.Event()
        process = CONTEXT.Process(target=train, args=(data, str(output), store, dies, begun))
        process.start()
        assert begun.wait(60)
        process.join(120 if after is None else after)
        process.kill()
        process.join()
        return int(process.exitcode)

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for dies in ("before the id is stored", "before the parameters", "before the id is stored"):
        assert started(killed, own_store, dies) == -signal.SIGKILL
        assert json.loads((killed / "run.json").read_text())["tracking_run"] == ""
    codes = [started(killed, own_store, after=moments.uniform(0.3, 1.5)) for _ in range(11)]
    assert codes.count(-signal.SIGKILL) >= 6
    assert started(killed, own_store) == 0
    client = MlflowClient(own_store)
    (run,) = client.search_runs([client.get_experiment_by_name("killed").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_id == json.loads((killed / "run.json").read_text())["tracking_run"]
    assert run.data.params["run.steps"] == str(STEPS)
    for name in ("train/loss", "train/lr"):
        points = client.get_metric_history(run.info.run_id, name)
        assert sorted(point.step for point in points) == list(range(1, STEPS + 1))
    experiment = run.info.experiment_id
    assert len(client.search_logged_models([experiment])) == len(client.search_model_versions("name='signals'")) == 1

    assert started(whole, own_store) == 0
    first, second = (Path(Checkpoints(str(place)).at(STEPS).path) for place in (killed, whole))
    assert (first / "method.safetensors").read_bytes() == (second / "method.safetensors").read_bytes()
