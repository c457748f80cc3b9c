"""The loop: what it logs and writes, exact resume, kills, several ranks, losses that are no numbers.

Run as a script, this file trains the plan in a pickle, as one rank or alone, and prints what it logs.
"""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pipeline.errors import LeaseLost, SettingError
from pipeline.loaders.batches import LoaderConfig
from pipeline.models.clip import Clip, Config, contrastive_loss
from pipeline.shards import lease as lease_module
from pipeline.shards.lease import LEASE, lease
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.storage import Folder
from pipeline.training.checkpoint import Checkpoints, Content, load_method
from pipeline.training.loop import TrainingOutcome, run_training, step_seed
from pipeline.training.measure import PHASES
from pipeline.training.run import Run, RunPlan, prepare

MakeRun = Callable[..., Run]
CPU = torch.device("cpu")
OTHER = json.dumps({"work": "another training", "host": "elsewhere", "process": 1, "born": 0.0, "name": "x"}).encode()


@pytest.fixture
def plan(run: MakeRun, dropout_config: Config) -> RunPlan:
    return prepare(dropout_config, run())[0]


def test_a_training_that_was_overtaken_logs_and_writes_no_more(
    run: MakeRun, dropout_config: Config, remember: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another training takes the folder after the log of step 6."""
    monkeypatch.setattr(lease_module, "SPACE_SECONDS", 0.0)
    tracker, output = remember(), Folder(run().output_folder)
    with lease(output, "a training") as held:
        plan = prepare(dropout_config, run(), guard=held.spaced)[0]

        def overtaken(metrics: Mapping[str, float], step: int) -> None:
            tracker.history[step] = dict(metrics)
            if step == 6:
                end = time.monotonic() + 20  # the checkpoint of step 4 is written beside the steps
                while not Checkpoints(output).whole() and time.monotonic() < end:
                    time.sleep(0.01)
                output.write_atomic(LEASE, OTHER)

        tracker.log = overtaken
        outcome = run_training(plan, CPU, tracker)
        assert "another training (process 1 on elsewhere) has taken over" in outcome.problem
        assert max(tracker.history) == 6
        assert [found.meta.step for found in Checkpoints(output).whole()] == [4]
        kept = Checkpoints(plan.folder)
        with pytest.raises(LeaseLost):  # suspended while it wrote
            kept.write(Content(meta=replace(kept.whole()[0].meta, step=5), weights={}, texts={}))
        with pytest.raises(LeaseLost):
            kept.write(Content(meta=kept.whole()[0].meta, weights={}, texts={}))
    assert output.read_bytes(LEASE) == OTHER
    assert [found.meta.step for found in Checkpoints(output).whole()] == [4]


def moved(plan: RunPlan, folder: Path) -> RunPlan:
    """The same run in another folder."""
    return replace(plan, run=replace(plan.run, output_folder=str(folder)))


def test_what_a_run_leaves(plan: RunPlan, remember: Any) -> None:
    tracker = remember()
    outcome = run_training(plan, CPU, tracker)
    assert outcome.steps == 10 and outcome.samples_per_second > 0 and not outcome.problem and tracker.closed == 1
    whole = Checkpoints(plan.run.output_folder).whole()
    assert [found.meta.step for found in whole] == [4, 8, 10]
    assert outcome.checkpoint == whole[-1].folder.uri
    assert whole[-1].meta.samples_seen == 80 and whole[-1].meta.snapshot == plan.snapshot.digest
    assert sorted(tracker.history) == list(range(1, 11))
    assert set(tracker.history[5]) == {
        "train/loss",
        "train/contrastive",
        "train/lr",
        "train/grad_norm",
        "train/grad_norm/image",
        "train/grad_norm/text",
        "train/grad_norm/logit_scale",
        "train/skipped_steps",
        "train/logit_scale",
        "perf/samples_per_second",
        "perf/step_seconds",
        *(f"perf/{part}" for part in PHASES),
        "perf/tflops",
        "perf/memory_gb",
        "data/unreadable",
        "perf/checkpoint_wait",
        "perf/checkpoint_copy",
    }
    losses = tracker.series("train/loss")
    assert losses[10] < losses[1]
    assert tracker.series("train/lr")[1] == pytest.approx(1e-3 / 3)
    loaded = load_method(outcome.checkpoint)
    assert loaded.encode_text(loaded.tokenizer(["red"])).shape == (1, 32)


def test_a_resume_in_the_middle_of_an_epoch_is_exact(plan: RunPlan, remember: Any, tmp_path: Path) -> None:
    """Bit for bit: losses, gradient norms and weights of a run that stopped at step 6 and one that never did."""
    whole, first, second = remember(), remember(stop_at=6), remember()
    expected = run_training(plan, CPU, whole)
    again = moved(plan, tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        run_training(again, CPU, first)
    torch.manual_seed(99)  # whatever state the new process has
    outcome = run_training(again, CPU, second)
    assert first.closed == second.closed == 1
    assert sorted(second.history) == [5, 6, 7, 8, 9, 10]
    for name in ("train/loss", "train/grad_norm", "train/logit_scale", "train/lr"):
        assert first.series(name) | second.series(name) == whole.series(name)
    weights = [load_method(end.checkpoint).state_dict() for end in (expected, outcome)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_unreadable_samples_are_counted(
    run: MakeRun, tiny_config: Config, remember: Any, make_snapshot: Callable[..., Snapshot]
) -> None:
    spoilt = make_snapshot((20, 20), spoil={number: {"jpg": b"", "txt": b"x"} for number in (3, 11, 30)})
    tracker = remember()
    run_training(prepare(tiny_config, run(data=spoilt.folder, steps=10))[0], CPU, tracker)
    counts = tracker.series("data/unreadable")
    assert counts[10] == 2 * 3 and counts[5] == 3  # two epochs of five steps


def test_loader_processes_do_not_change_a_run(plan: RunPlan, remember: Any, tmp_path: Path) -> None:
    alone, helped = remember(), remember()
    run_training(plan, CPU, alone)
    settings = replace(plan.run, output_folder=str(tmp_path / "b"), loader=LoaderConfig(loader_workers=2))
    run_training(replace(plan, run=settings), CPU, helped)
    assert alone.series("train/loss") == helped.series("train/loss")


@pytest.mark.slow
def test_kill_nine_in_the_middle(plan: RunPlan, remember: Any, tmp_path: Path) -> None:
    """A process killed while it trains; the same command again ends with the losses of a run without a kill."""
    whole, resumed, plan = remember(), remember(), replace(plan, steps=16)
    run_training(plan, CPU, whole)
    killed = moved(plan, tmp_path / "killed")
    process = start(killed, tmp_path)
    printed = {}
    assert process.stdout is not None
    for line in process.stdout:
        step, metrics = json.loads(line)
        printed[step] = metrics["train/loss"]
        if step == 9:  # checkpoint 4 is written, since 8 waited for it; 8 may be under way
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    run_training(killed, CPU, resumed)
    first = min(resumed.series("train/loss"))
    assert first in (5, 9)
    losses = whole.series("train/loss")
    assert resumed.series("train/loss") == {step: losses[step] for step in range(first, 17)}
    assert printed == {step: losses[step] for step in range(1, 10)}


@pytest.mark.slow
def test_two_ranks_train_as_one_and_go_on_from_one(plan: RunPlan, remember: Any, tmp_path: Path) -> None:
    """One rank stops at step 6; two ranks go on from step 4 with the same samples and, but for rounding, losses."""
    plan = replace(plan, method=Clip.smallest())  # patch dropout would draw per rank
    whole = remember()
    run_training(plan, CPU, whole)
    wide = moved(plan, tmp_path / "wide")
    with pytest.raises(KeyboardInterrupt):
        run_training(wide, CPU, remember(stop_at=6))
    ranks = [start(wide, tmp_path, rank, 2) for rank in range(2)]
    output = [rank.communicate(timeout=200) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert [errors for _, errors in output] == ["", ""]  # nor a warning
    logged = dict(json.loads(line) for line in output[0][0].splitlines())
    assert output[1][0] == "" and sorted(logged) == [5, 6, 7, 8, 9, 10]
    for step, metrics in logged.items():
        for name in ("train/loss", "train/grad_norm", "train/logit_scale"):
            assert metrics[name] == pytest.approx(whole.history[step][name], rel=2e-3), (step, name)
    ends = [load_method(folder.run.output_folder).state_dict() for folder in (plan, wide)]
    for name in ends[0]:
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=1e-2, atol=2e-4)


def test_a_batch_in_parts_trains_as_a_whole_one(
    run: MakeRun, tiny_config: Config, remember: Any, tmp_path: Path
) -> None:
    whole, parts = remember(), remember()
    run_training(prepare(tiny_config, run(steps=5))[0], CPU, whole)
    run_training(prepare(tiny_config, run(steps=5, micro_batch=3, output_folder=str(tmp_path / "b")))[0], CPU, parts)
    for name in ("train/loss", "train/grad_norm", "train/logit_scale"):
        assert parts.series(name) == pytest.approx(whole.series(name), rel=2e-3), name


def test_a_resume_in_parts_is_exact(run: MakeRun, dropout_config: Config, remember: Any, tmp_path: Path) -> None:
    plan = prepare(dropout_config, run(steps=8, micro_batch=3))[0]
    whole, second, again = remember(), remember(), moved(plan, tmp_path / "again")
    run_training(plan, CPU, whole)
    with pytest.raises(KeyboardInterrupt):
        run_training(again, CPU, remember(stop_at=6))
    run_training(again, CPU, second)
    assert {step: whole.history[step]["train/grad_norm"] for step in second.history} == second.series("train/grad_norm")
    assert sorted(second.history) == [5, 6, 7, 8]


@pytest.mark.slow
def test_two_ranks_in_parts_with_tiles_round_a_ring_train_as_one(
    run: MakeRun, tiny_config: Config, remember: Any, tmp_path: Path
) -> None:
    whole = remember()
    config = replace(tiny_config, loss="sigmoid", loss_tile=3)
    plan = prepare(config, run(steps=4, micro_batch=3, exchange="ring"))[0]
    run_training(plan, CPU, whole)
    wide = moved(plan, tmp_path / "wide")
    output = [rank.communicate(timeout=200) for rank in [start(wide, tmp_path, rank, 2) for rank in range(2)]]
    assert [errors for _, errors in output] == ["", ""]
    logged = dict(json.loads(line) for line in output[0][0].splitlines())
    assert sorted(logged) == [1, 2, 3, 4]
    for step, metrics in logged.items():
        for name in ("train/loss", "train/grad_norm", "train/logit_scale", "train/logit_bias"):
            assert metrics[name] == pytest.approx(whole.history[step][name], rel=2e-3), (step, name)


@pytest.mark.slow
def test_a_resume_of_three_ranks_is_exact(run: MakeRun, tiny_config: Config, tmp_path: Path) -> None:
    """Bit for bit, though the sum of three numbers depends on their order."""
    plan = prepare(tiny_config, run(batch_size=9, lanes=3, steps=8))[0]
    again = moved(plan, tmp_path / "again")

    def losses(plan: RunPlan) -> dict[int, tuple[float, float]]:
        (tmp_path / "meeting").unlink(missing_ok=True)
        output = [rank.communicate(timeout=200)[0] for rank in [start(plan, tmp_path, rank, 3) for rank in range(3)]]
        logged = dict(json.loads(line) for line in output[0].splitlines())
        return {step: (metrics["train/loss"], metrics["train/grad_norm"]) for step, metrics in logged.items()}

    whole = losses(plan)
    first = Checkpoints(plan.run.output_folder).at(4).path
    shutil.copytree(first, Checkpoints(again.run.output_folder).at(4).path)
    assert losses(again) == {step: whole[step] for step in (5, 6, 7, 8)}


@pytest.mark.parametrize(("bad_step", "what"), [(3, "loss"), (4, "gradient"), (10, "gradient")])
def test_what_is_no_number_stops_before_it_is_saved(
    run: MakeRun, tiny_config: Config, remember: Any, monkeypatch: pytest.MonkeyPatch, bad_step: int, what: str
) -> None:
    calls = 0

    def spoilt(images: Tensor, *others: Any) -> Tensor:
        nonlocal calls
        calls += not isinstance(images, FakeTensor)  # which only count a step's work
        loss = contrastive_loss(images, *others)
        if calls != bad_step:
            return loss
        # The root of 0 has the value 0 and an infinite slope: a loss that looks well, with a gradient that is not.
        return loss * torch.nan if what == "loss" else loss + (images.sum() * 0).sqrt() * 0

    monkeypatch.setattr("pipeline.models.clip.contrastive_loss", spoilt)
    plan = prepare(
        tiny_config, run(log_every_steps=5, checkpoint_every_steps=2, keep_checkpoints=9, max_skipped_steps=0)
    )[0]
    outcome = run_training(plan, CPU, remember())
    assert f"not finite at step {bad_step}" in outcome.problem
    last = 8 if bad_step == 10 else 2
    assert f"step-{last:08d}" in outcome.problem
    assert [found.meta.step for found in Checkpoints(plan.run.output_folder).whole()] == list(range(2, last + 1, 2))
    weights = load_method(plan.run.output_folder).state_dict()
    assert all(value.isfinite().all() for value in weights.values())


def test_bfloat16_trains(run: MakeRun, tiny_config: Config, remember: Any, tmp_path: Path) -> None:
    exact, rough = remember(), remember()
    run_training(prepare(tiny_config, run(steps=4))[0], CPU, exact)
    run_training(prepare(tiny_config, run(steps=4, precision="bf16", output_folder=str(tmp_path / "b")))[0], CPU, rough)
    losses = exact.series("train/loss"), rough.series("train/loss")
    assert losses[0] != losses[1]
    assert all(losses[1][step] == pytest.approx(losses[0][step], rel=0.05) for step in losses[0])


def test_clipping_limits_the_step(run: MakeRun, tiny_config: Config, remember: Any) -> None:
    tracker = remember()
    plan = prepare(tiny_config, run(steps=2, clip_grad_norm=0.01))[0]
    run_training(plan, CPU, tracker)
    assert tracker.series("train/grad_norm")[1] > 0.01  # what is logged is the norm before clipping


def test_evaluations_and_minutes_decide_what_is_saved(run: MakeRun, tiny_config: Config, remember: Any) -> None:
    changes = {"checkpoint_every_steps": None, "evaluate_every_steps": 4, "keep_checkpoints": 1}
    settings = run(checkpoint_every_minutes=1e-9, log_every_steps=3, **changes)
    plan = prepare(tiny_config, settings, evaluates=True)[0]
    run_training(plan, CPU, remember())
    found = {one.meta.step: one.waits for one in Checkpoints(plan.run.output_folder).whole()}
    assert found == {4: True, 8: True, 10: True}  # those of the minutes (1, 3, 6, 9) are pruned


def test_data_and_checkpoints_in_an_object_store(
    run: MakeRun, tiny_config: Config, remember: Any, s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Read by forked loader processes through the local cache; written, listed, resumed and pruned on S3."""
    here = remember()
    run_training(prepare(tiny_config, run(steps=6))[0], CPU, here)
    local = run().data
    store = fsspec.filesystem("s3")
    store.put(local, f"{s3}/data", recursive=True)
    monkeypatch.setenv("CLIPMILL_CACHE", str(tmp_path / "cache"))
    loader = LoaderConfig(loader_workers=2)
    changes = {"data": f"{s3}/data", "output_folder": f"{s3}/run", "loader": loader, "checkpoint_every_steps": 2}
    first, second = remember(stop_at=5), remember()
    with pytest.raises(KeyboardInterrupt):
        run_training(prepare(tiny_config, run(steps=6, keep_checkpoints=1, **changes))[0], CPU, first)
    plan, _ = prepare(tiny_config, run(steps=6, keep_checkpoints=1, **changes))
    outcome = run_training(plan, CPU, second)
    assert first.series("train/loss") | second.series("train/loss") == here.series("train/loss")
    assert outcome.checkpoint == f"{s3}/run/checkpoints/step-00000006"
    assert [name.rpartition("/")[2] for name in store.ls(f"{s3}/run/checkpoints", refresh=True)] == ["step-00000006"]
    assert load_method(f"{s3}/run").encode_text(torch.zeros(1, 77, dtype=torch.int64)).shape == (1, 32)


def test_a_checkpoint_of_another_order_is_refused(plan: RunPlan, remember: Any) -> None:
    run_training(plan, CPU, remember())
    with pytest.raises(SettingError, match="lanes: got 2, expected 4, the value of"):
        run_training(replace(plan, run=replace(plan.run, lanes=2), steps=12), CPU, remember())


def test_steps_and_ranks_have_their_own_seeds() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(5)}
    assert len(seeds) == 300 and all(0 <= seed < 2**63 for seed in seeds)


def start(plan: RunPlan, folder: Path, rank: int = 0, world: int = 1) -> "subprocess.Popen[str]":
    """Run this file as a process that trains ``plan``."""
    pickled = folder / f"plan-{rank}-{world}.pickle"
    pickled.write_bytes(pickle.dumps(plan))
    command = [sys.executable, __file__, str(pickled), str(rank), str(world)]
    errors = subprocess.PIPE if world > 1 else None
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)


class _Print:
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        print(json.dumps([step, dict(metrics)]), flush=True)

    def flush(self, seconds: float) -> None: ...

    def close(self) -> None: ...


def _train(pickled: str, rank: int, world: int) -> TrainingOutcome:
    torch.set_num_threads(1)
    if world > 1:
        meeting = f"file://{Path(pickled).parent}/meeting"
        torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=world)
    return run_training(pickle.loads(Path(pickled).read_bytes()), CPU, _Print())


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    _train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
