"""Where trials compute: on a part of a GPU each where the cluster has some."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import SettingError
from pipeline.runs.few_shot import Place, find_place
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


def at_a_time(times: list[list[float]]) -> int:
    """Most tasks that ran at the same moment."""
    return max(sum(began <= start < ended for _, began, ended in times) for _, start, _ in times)


@pytest.mark.slow
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
