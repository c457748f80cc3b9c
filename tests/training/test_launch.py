"""Starting runs: in this process, and as workers of Ray Train."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from pipeline.errors import DataError, SettingError
from pipeline.loaders.batches import LoaderConfig
from pipeline.models.clip import Config
from pipeline.models.proposals import Proposals
from pipeline.shards.snapshot import Snapshot
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.launch import _own_error, _patience, finished, follower, launch, own_threads, worker_resources
from pipeline.training.loop import TrainingError, TrainingOutcome
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Cluster, Run, prepare

MakeRun = Callable[..., Run]


def test_the_same_command_again_goes_on_and_then_says_that_it_is_finished(
    run: MakeRun, tiny_config: Config, remember: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = remember(stop_at=6), remember()
    plan, _ = prepare(tiny_config, run())
    assert finished(plan) is None
    with pytest.raises(KeyboardInterrupt):
        launch(plan, lambda: first)
    outcome = launch(prepare(tiny_config, run())[0], lambda: second)
    assert outcome.steps == 10 and min(second.history) == 5
    with caplog.at_level("INFO"):
        again = launch(prepare(tiny_config, run())[0], lambda: pytest.fail("nothing is logged"))
    assert again.checkpoint == outcome.checkpoint and "is finished: 10 steps" in caplog.text


def test_a_training_in_this_process_takes_the_first_gpu(
    run: MakeRun, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its number: torch.cuda.set_device refuses a device without one."""
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    ended = TrainingOutcome(steps=10, checkpoint="")
    monkeypatch.setattr("pipeline.training.launch.run_training", lambda plan, device, _: taken.append(device) or ended)
    assert launch(prepare(tiny_config, run())[0]) == ended
    assert taken == [torch.device("cuda", 0)] * 2


def test_a_loss_that_is_no_number_is_an_error(run: MakeRun, tiny_config: Config, remember: Any) -> None:
    plan, _ = prepare(tiny_config, run(optimizer=AdamW(learning_rate=1e30), warmup_steps=0, max_skipped_steps=0))
    with pytest.raises(TrainingError, match="not finite"):
        launch(plan, remember)


def test_a_training_in_this_process_leaves_cores_to_its_loader(
    run: MakeRun,
    tiny_config: Config,
    remember: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And a user's OMP_NUM_THREADS is left alone. Here the loader has none: all the cores are the training's."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    threads = {None: 2, 0: 6, 1: 5, 5: 1, 8: 1}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert {own_threads(LoaderConfig(loader_workers=workers)) for workers in threads} == {None}
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert {workers: own_threads(LoaderConfig(loader_workers=workers)) for workers in threads} == threads

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    before = torch.get_num_threads()
    try:
        with caplog.at_level("INFO"):
            launch(prepare(tiny_config, run(steps=1))[0], remember)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert "1 processes on cpu, each with 2 threads and 0 loader processes, in float32" in caplog.text


def test_workers_ask_for_what_the_cluster_has(run: MakeRun, tiny_config: Config) -> None:
    plan, _ = prepare(tiny_config, run(workers=2, cluster=Cluster(cpus_per_worker=3)))
    assert worker_resources(plan, {"CPU": 8}) == {"CPU": 3}
    assert worker_resources(plan, {"CPU": 8, "GPU": 1}) == {"CPU": 3, "GPU": 1}
    assert worker_resources(plan, {"CPU": 8, "train_worker": 2}) == {"CPU": 3, "train_worker": 0.001}
    waiting = replace(plan, run=replace(plan.run, cluster=Cluster(accelerator="gpu")))
    assert worker_resources(waiting, {"CPU": 8}) == {"CPU": 1, "GPU": 1}  # a cluster that grows GPUs on demand


def test_patience(run: MakeRun, tiny_config: Config) -> None:
    """Nodes of a fixed number may have to boot; a range is asked for anew every ten seconds, for as long in all."""

    def patience(workers: int | str, **cluster: float) -> tuple[float, int]:
        return _patience(prepare(tiny_config, run(workers=workers, cluster=Cluster(**cluster)))[0])  # type: ignore[arg-type]

    assert patience(2) == (600, 2) and patience("2:2", start_timeout_seconds=7) == (7, 2)
    assert patience("1:2") == (10, 120) and patience("1:2", resize_seconds=600) == (10, 1200)
    assert patience("1:2", resize_seconds=5) == (5, 20)


def test_more_workers_than_this_machine_has(run: MakeRun, tiny_config: Config, ray_cluster: Any) -> None:
    plan, _ = prepare(tiny_config, run(workers=8))
    with pytest.raises(SettingError, match="workers: got 8, expected at most 4 here"):
        launch(plan)


def test_what_needs_gpus_is_refused_before_workers_are_asked_for(
    run: MakeRun, make_snapshot: Callable[..., Snapshot], ray_cluster: Any
) -> None:
    """In a sentence; torch's SyncBatchNorm would kill the workers again and again."""
    config = replace(Proposals.smallest(), norm="batch")
    plan, _ = prepare(config, run(workers=2, data=make_snapshot((8,), regions=("teacher", 4)).folder))
    with pytest.raises(SettingError, match="norm: got 'batch'"):
        launch(plan)


@pytest.mark.slow
@pytest.mark.alone
def test_a_killed_ray_worker_is_replaced(
    run: MakeRun, tiny_config: Config, remember: Any, tmp_path: Path, ray_cluster: Any
) -> None:
    """Two workers, and the first dies at step 6: the run ends like one without a failure."""
    alone = remember()
    launch(prepare(tiny_config, run(output_folder=str(tmp_path / "alone")))[0], lambda: alone)
    plan, _ = prepare(tiny_config, run(workers=2))
    checkpoints = Checkpoints(plan.run.output_folder)

    class ToFile:
        """Appends to a file, and kills its process once, when the checkpoint of step 4 has been written."""

        def log(self, metrics: Mapping[str, float], step: int) -> None:
            with open(tmp_path / "logged", "a") as file:
                file.write(json.dumps([step, metrics["train/loss"]]) + "\n")
            if step == 6 and not (tmp_path / "killed").exists():
                (tmp_path / "killed").touch()
                while not checkpoints.whole():
                    time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGKILL)

        def flush(self, seconds: float) -> None: ...

        def close(self) -> None: ...

    outcome = launch(plan, ToFile)
    logged = [json.loads(line) for line in (tmp_path / "logged").read_text().splitlines()]
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 10]
    assert outcome.steps == 10 and (tmp_path / "killed").exists()
    assert [found.meta.step for found in checkpoints.whole()] == [4, 8, 10]
    for step, loss in logged:
        assert loss == pytest.approx(alone.series("train/loss")[step], rel=2e-3)
    assert logged[4:6] == logged[6:8]  # the same two workers' worth of rows: bit for bit


def test_a_workers_own_error_is_what_the_user_sees() -> None:
    """Ray wraps what a worker raised; the others died of waiting for it."""
    ours = DataError("00001.tar is missing")
    wrapped = RuntimeError("worker 1 died")
    wrapped.__cause__ = ours
    assert _own_error(WorkerGroupError("two died", {0: RuntimeError("connection closed"), 1: wrapped})) is ours
    assert _own_error(WorkerGroupError("two died", {0: ours, 1: RuntimeError("connection closed")})) is ours
    assert _own_error(WorkerGroupError("died", {0: RuntimeError("out of memory")})) is None
    assert _own_error(ControllerError(ValueError("no workers"))) is None


def test_a_problem_of_all_ranks_is_raised_by_the_driver(
    run: MakeRun, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = prepare(tiny_config, run(workers=1))
    ended = TrainingOutcome(steps=3, checkpoint="", problem="the loss is not finite")
    monkeypatch.setattr("pipeline.training.launch._on_ray", lambda *_: ended)
    with pytest.raises(TrainingError, match="^the loss is not finite$"):
        launch(plan)


def test_evaluations_run_on_the_same_cluster(run: MakeRun, tiny_config: Config, ray_cluster: Any) -> None:
    """The checkpoints of a finished run that nobody evaluated yet; in a Ray task, and in this process."""

    def evaluate(uri: str, step: int) -> dict[str, float]:
        return {"process": float(os.getpid())}

    plan, _ = prepare(tiny_config, run(steps=1), evaluates=True)
    launch(plan)
    at_end = follower(plan, evaluate)
    at_end._ending.set()  # so that its thread cannot look before the training has ended
    with at_end as here:
        pass
    assert here.results == {1: {"process": float(os.getpid())}}
    Checkpoints(plan.run.output_folder).at(1).delete("evaluation.json")
    with follower(replace(plan, run=replace(plan.run, workers=1)), evaluate) as there:
        pass
    assert there.results[1]["process"] not in (0.0, float(os.getpid()))
