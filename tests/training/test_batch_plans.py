"""Batches that follow from the weights: exact resume within an epoch, broken plans, several ranks, the stage on Ray.

The runs have 24 samples in batches of 8, so three steps an epoch, and a checkpoint every four steps.
"""

import io
import json
import pickle
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import DataError, SettingError
from pipeline.loaders.batches import training_batches
from pipeline.loaders.planned_order import PlannedOrder
from pipeline.models.method import Method, build_method
from pipeline.models.videoclip import Config, VideoClip
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.storage import Folder
from pipeline.training.batch_plans import FACTS
from pipeline.training.checkpoint import Checkpoints, load_method
from pipeline.training.loop import run_training
from pipeline.training.run import Run, RunPlan, prepare
from pipeline.training.sample_features import FeatureWork, MakeSampleFeatures, SamplesInTurn, sample_features
from tests.training.test_loop import start

MakeRun = Callable[..., Run]
CPU = torch.device("cpu")
RETRIEVED = replace(VideoClip.smallest(), cluster=4, candidates=6, dropout=0.1)


@pytest.fixture(scope="session")
def videos(make_snapshot: Callable[..., Snapshot]) -> Snapshot:
    """Two shards; three samples cannot be read."""
    spoil = {number: {"json": b"{", "txt": b"x"} for number in (2, 13, 14)}
    return make_snapshot((13, 11), regions=("teacher", 4), spoil=spoil)


@pytest.fixture
def plan(run: MakeRun, videos: Snapshot) -> RunPlan:
    return prepare(RETRIEVED, run(data=videos.folder, steps=8))[0]


def moved(plan: RunPlan, folder: Path) -> RunPlan:
    return replace(plan, run=replace(plan.run, output_folder=str(folder)))


def stored(plan: RunPlan, epoch: int) -> tuple[list[int], dict[str, Any]]:
    """Numbers and facts of a plan's file."""
    content = Folder(plan.run.output_folder).read_bytes(f"plans/epoch-{epoch:05d}.parquet")
    table = pq.read_table(io.BytesIO(content))
    return table["sample"].to_pylist(), json.loads(table.schema.metadata[FACTS])


def test_a_resume_in_the_middle_of_an_epoch_is_exact(plan: RunPlan, remember: Any, tmp_path: Path) -> None:
    """Bit for bit: plans, losses and weights of a run that stopped at step 5, after its checkpoint of step 4."""
    whole, first, second = remember(), remember(stop_at=5), remember()
    expected = run_training(plan, CPU, whole)
    again = moved(plan, tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        run_training(again, CPU, first)
    torch.manual_seed(99)
    outcome = run_training(again, CPU, second)
    assert sorted(second.history) == [5, 6, 7, 8]
    for name in ("train/loss", "train/grad_norm"):
        assert first.series(name) | second.series(name) == whole.series(name)
    weights = [load_method(end.checkpoint).state_dict() for end in (expected, outcome)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [stored(plan, epoch) for epoch in range(3)] == [stored(again, epoch) for epoch in range(3)]


def test_plans_follow_from_the_weights_and_are_what_is_read(plan: RunPlan, remember: Any, tmp_path: Path) -> None:
    run_training(plan, CPU, remember())
    found = [stored(plan, epoch) for epoch in range(3)]
    assert len({facts["weights"] for _, facts in found}) == 3 and [facts["epoch"] for _, facts in found] == [0, 1, 2]
    for numbers, _ in found:
        assert len(numbers) == 24 and all(0 <= number < 24 for number in numbers)
        assert all(len(set(numbers[at : at + 4])) == 4 for at in range(0, 24, 4))
    # The plan of epoch 1 is that of the weights after three steps, made here from the features of all samples.
    three = replace(moved(plan, tmp_path / "three"), steps=3)
    method = load_method(run_training(three, CPU, remember()).checkpoint)
    planner = VideoClip.batch_planner(RETRIEVED)
    assert planner is not None
    features = torch.cat([planner.features(method, batch).detach() for batch in in_turn(plan, method, epoch=1)])
    assert planner.plan(features, 3, 8, seed=0, epoch=1).ravel().tolist() == found[1][0]


def in_turn(plan: RunPlan, method: Method, epoch: int) -> list[dict[str, Any]]:
    """The batches of both shards of the plan's data, one after another."""
    readers, snapshot = method.readers(train=True, seed=0), plan.snapshot
    batches = []
    for first, stop in ((0, 13), (13, 24)):
        order = SamplesInTurn(epoch, first, stop)
        batches += list(training_batches(snapshot, readers, order, steps=range(1), config=plan.run.loader))
    return batches


def test_random_batches_make_no_plan(plan: RunPlan, remember: Any, tmp_path: Path) -> None:
    random = replace(RETRIEVED, batches="random")
    changed = prepare(random, replace(plan.run, output_folder=str(tmp_path / "random"), steps=2))[0]
    run_training(changed, CPU, remember())
    assert not (tmp_path / "random" / "plans").exists()


@pytest.mark.parametrize("harm", ["missing", "cut", "other"])
def test_an_epoch_does_not_go_on_without_its_plan(plan: RunPlan, remember: Any, harm: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_training(plan, CPU, remember(stop_at=5))
    file = Path(plan.run.output_folder) / "plans/epoch-00001.parquet"
    if harm == "missing":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:100])
    else:
        file.write_bytes(file.with_name("epoch-00000.parquet").read_bytes())
    with pytest.raises(DataError, match=r"epoch-00001.parquet is .*its epoch cannot go on"):
        run_training(plan, CPU, remember())


def test_an_epoch_that_starts_again_replaces_a_plan_of_other_weights(
    plan: RunPlan, remember: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that resumes before an epoch keeps the epoch's plan if it follows from the same weights."""
    run_training(plan, CPU, remember())
    numbers, facts = stored(plan, 1)
    for checkpoint in Checkpoints(plan.run.output_folder).whole():
        checkpoint.folder.delete("meta.json")  # no checkpoint is left: from the start
    asked: list[int] = []
    real = sample_features
    monkeypatch.setattr(
        "pipeline.training.batch_plans.sample_features", lambda *a: asked.append(a[1].epoch) or real(*a)
    )
    run_training(plan, CPU, remember())
    assert asked == [] and stored(plan, 1) == (numbers, facts)
    other = replace(plan, run=replace(plan.run, optimizer=replace(plan.run.optimizer, learning_rate=3e-3)))
    for checkpoint in Checkpoints(plan.run.output_folder).whole():
        checkpoint.folder.delete("meta.json")
    run_training(other, CPU, remember())
    assert asked == [1, 2] and stored(plan, 1)[1]["weights"] != facts["weights"]


@pytest.mark.slow
def test_two_ranks_follow_the_plans_of_one_and_train_as_one(plan: RunPlan, remember: Any, tmp_path: Path) -> None:
    """One rank stops at step 5; two go on from step 4, in the same epoch and then in one that rank 0 plans."""
    config = replace(RETRIEVED, dropout=0.0)
    plan = prepare(config, replace(plan.run, output_folder=str(tmp_path / "one")))[0]
    whole, wide = remember(), moved(plan, tmp_path / "wide")
    run_training(plan, CPU, whole)
    with pytest.raises(KeyboardInterrupt):
        run_training(wide, CPU, remember(stop_at=5))
    ranks: list[subprocess.Popen[str]] = [start(wide, tmp_path, rank, 2) for rank in range(2)]
    output = [rank.communicate(timeout=200) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], output
    logged = dict(json.loads(line) for line in output[0][0].splitlines())
    assert sorted(logged) == [5, 6, 7, 8]
    for step, metrics in logged.items():
        for name in ("train/loss", "train/grad_norm"):
            assert metrics[name] == pytest.approx(whole.history[step][name], rel=2e-3), (step, name)
    assert stored(wide, 2)[0] == stored(plan, 2)[0]


@pytest.mark.slow
def test_features_are_the_same_by_a_stage_on_ray(plan: RunPlan, ray_cluster: Any) -> None:
    method = build_method(RETRIEVED)
    planner = VideoClip.batch_planner(RETRIEVED)
    assert planner is not None and isinstance(plan.snapshot, Snapshot)
    work = FeatureWork(plan, planner, plan.snapshot, 1, method.description())
    here = sample_features(method, work, CPU)
    on_ray = replace(plan, run=replace(plan.run, workers=1))
    there = sample_features(method, replace(work, plan=on_ray), CPU)
    assert here.shape == (24, 32) and torch.allclose(here, there, atol=1e-6)


def test_the_stage_returns_a_damaged_shard_as_an_error(run: MakeRun, make_snapshot: Callable[..., Snapshot]) -> None:
    """As a value, since Ray passes on only the text of an actor's exception."""
    damaged = make_snapshot((4, 4), regions=("teacher", 4), spoil={number: {"json": b"{"} for number in range(4, 8)})
    plan = prepare(RETRIEVED, run(data=damaged.folder))[0]
    planner, method = VideoClip.batch_planner(RETRIEVED), build_method(RETRIEVED)
    assert planner is not None and isinstance(plan.snapshot, Snapshot)
    work = FeatureWork(plan, planner, plan.snapshot, 0, method.description())
    with pytest.raises(DataError, match=r"00001\.tar: no sample is readable"):
        sample_features(method, work, CPU)
    found = MakeSampleFeatures(work, method.state_dict())({"number": np.array([0, 1])})
    assert len(found["features"][0]) == 4 * 32 * 4 and found["error"][0] == b""
    assert "no sample is readable" in str(pickle.loads(found["error"][1]))


def test_ranks_share_a_batch() -> None:
    order = PlannedOrder(samples=11, batch_size=4)
    assert order.epoch_steps == 2 and order.steps(1.5) == 3 and PlannedOrder(samples=3, batch_size=4).epoch_steps == 1
    order.follow(3, np.arange(8).reshape(2, 4))
    assert order.batch(7).tolist() == [[3, 4], [3, 5], [3, 6], [3, 7]]
    assert np.concatenate([order.batch(6, rank, 2) for rank in range(2)]).tolist() == order.batch(6).tolist()
    with pytest.raises(AssertionError):
        order.batch(8)
    with pytest.raises(SettingError, match="batch_size"):
        order.batch(6, 0, 3)


def test_settings_that_allow_no_plan_are_refused(run: MakeRun, videos: Snapshot) -> None:
    def refused(config: Config, **changes: Any) -> str:
        with pytest.raises(SettingError) as error:
            prepare(config, run(data=videos.folder, **changes))
        return str(error.value)

    assert refused(RETRIEVED, batch_size=6).startswith("batch_size: got 6")
    assert refused(RETRIEVED, sharding="full").startswith("sharding: got 'full'")
    assert refused(replace(RETRIEVED, cluster=48, candidates=64), batch_size=48).startswith("batch_size: got 48")
