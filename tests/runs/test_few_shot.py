"""Where trials compute (on a part of a GPU each where the cluster has some), and which views their methods read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import SettingError
from pipeline.evaluation.embedder import LoadEmbedder, Views
from pipeline.evaluation.few_shot import DataSet
from pipeline.runs import few_shot
from pipeline.runs.few_shot import Place, Ready, Trial, TrialRunner, find_place, parse_spec
from pipeline.stages.shard_tasks import Workers

HERE = Workers(processes_count=0)
# Ray accepts a stated number of GPUs; each task reports its share.
ON_GPUS = """
import json, time
import ray
from pipeline.runs.few_shot import find_place
from pipeline.stages.shard_tasks import Workers, run_tasks

ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

def task(unit):
    import ray
    began = time.time()
    time.sleep(0.5)
    return json.dumps([ray.get_runtime_context().get_assigned_resources().get("GPU", 0), began, time.time()])

asked = (("auto", 1), ("cuda", 1), ("cpu", 1), ("auto", 2))
places = [find_place(device, 0.5, each, Workers()) for device, each in asked]
tasks = {gpus: [json.loads(text) for _, text in run_tasks(task, range(4), Workers(), gpus)] for gpus in (0.5, 0.0)}
print(json.dumps([[vars(place) for place in places], tasks[0.5], tasks[0.0]]))
"""

# Trials whose epochs log as those of pipeline.training.adapt do.
ON_A_WORKER = """
import logging
from pipeline.runs.few_shot import Place, _run
from pipeline.stages.shard_tasks import Workers

class Runner:
    def __call__(self, trial):
        logging.getLogger("pipeline.training.adapt").info("CoOp: 3 of %d epochs", trial)
        return ""

logging.basicConfig(level=logging.INFO)
print(sorted(_run(Runner(), [40, 50], Workers(processes_count=1), Place(device="cpu"))))
"""


def at_a_time(times: list[list[float]]) -> int:
    """Most tasks that ran at the same moment."""
    return max(sum(began <= start < ended for _, began, ended in times) for _, start, _ in times)


@pytest.mark.slow
@pytest.mark.alone
def test_the_progress_of_trials_on_workers_is_in_the_jobs_log() -> None:
    command = [sys.executable, "-c", ON_A_WORKER]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=200)
    assert done.returncode == 0, done.stderr
    assert "[0, 1]" in done.stdout
    for epochs in (40, 50):
        assert (done.stdout + done.stderr).count(f"INFO pipeline.training.adapt: CoOp: 3 of {epochs} epochs") == 1


@pytest.mark.slow
@pytest.mark.alone
def test_each_trial_gets_its_part_of_a_gpu() -> None:
    command = [sys.executable, "-c", ON_GPUS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=200)
    assert done.returncode == 0, done.stderr
    places, halves, none = json.loads(done.stdout.splitlines()[-1])
    assert places == [
        {"device": "cuda", "gpus": 0.5, "workers": 1},
        {"device": "cuda", "gpus": 0.5, "workers": 1},
        {"device": "cpu", "gpus": 0.0, "workers": 1},
        {"device": "cuda", "gpus": 0.5, "workers": 2},
    ]
    assert [gpus for gpus, *_ in halves] == [0.5] * 4 and at_a_time(halves) <= 2
    assert [gpus for gpus, *_ in none] == [0] * 4


def test_without_gpus(ray_cluster: Any) -> None:
    assert find_place("auto", 0.25, 1, Workers()) == Place(device="cpu")
    assert find_place("auto", 0.25, 3, HERE) == Place(device="cpu", workers=3)
    assert find_place("auto", 0.25, 1, HERE) == Place()
    with pytest.raises(SettingError, match="the cluster has no GPU"):
        find_place("cuda", 0.25, 1, Workers())
    if not torch.cuda.is_available():
        with pytest.raises(SettingError, match="no GPU that torch can use"):
            find_place("cuda", 0.25, 1, HERE)


@pytest.mark.parametrize(("method", "views"), [("linear_probe", [0]), ("tip_adapter", [1, 2]), ("coop", [1, 2])])
def test_the_probe_reads_the_evaluation_view_of_the_shots(
    method: str, views: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others read the random crops; validation images have the evaluation view."""
    names, labels = ("a", "b"), {"train": (0, 1), "val": (0, 1), "test": (0, 1)}
    data = DataSet(name="x", classes=names, templates=("{}",), sources={}, labels=labels)
    rows = {("train", 0): 0, ("train", 1): 1, ("val", 0): 2, ("val", 1): 3}
    features = torch.arange(12.0).reshape(4, 3, 1)  # image 0 has 0 in evaluation, 1 and 2 in its crops
    spec = parse_spec(method)
    runner = TrialRunner(
        embedder=LoadEmbedder(checkpoint="", views=Views(views=2)),
        ready={"x": Ready(data=data, drawn="", rows=rows, tested="")},
        specs={method: spec},
        targets=(),
        output="",
        clip="",
    )
    given: list[Any] = []
    monkeypatch.setattr(few_shot, "_features", lambda *_: features)
    monkeypatch.setattr(few_shot, "adapt", lambda *arguments, **_: given.extend(arguments))
    trial = Trial(protocol="few_shot", method=method, data="x", shots=1, seed=1)
    runner._learn(trial, spec, runner.ready["x"], None)  # type: ignore[arg-type]
    train, validation = given[-2:]
    assert train.features.flatten().tolist() == [3 * image + view for image in (0, 1) for view in views]
    assert validation.features.flatten().tolist() == [6, 9]
