"""As many workers as there is room for."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from pipeline.errors import SettingError
from pipeline.models.clip import Config
from pipeline.training.elastic import sharing
from pipeline.training.launch import launch
from pipeline.training.run import Run, prepare

MakeRun = Callable[..., Run]


def test_the_largest_number_that_divides_the_batch() -> None:
    assert [sharing(workers, 12) for workers in range(1, 14)] == [1, 2, 3, 4, 4, 6, 6, 6, 6, 6, 6, 12, 12]
    assert sharing(7, 4096) == 4 and sharing(7, 4200) == 7


@pytest.mark.parametrize(("workers", "numbers"), [(0, (0, 0)), (3, (3, 3)), ("3", (3, 3)), ("1:3", (1, 3))])
def test_numbers_and_ranges(run: MakeRun, workers: int | str, numbers: tuple[int, int]) -> None:
    made = run(workers=workers, batch_size=6)
    assert (made.fewest_workers, made.most_workers) == numbers


@pytest.mark.parametrize("workers", ["0:2", "3:2", "2:", ":2", "two", "1:2:3", -1, "-1", 200_000, "1.5"])
def test_what_is_neither(run: MakeRun, workers: int | str) -> None:
    with pytest.raises(SettingError, match="workers: .* a range such as 2:8"):
        run(workers=workers)


def test_the_batch_suits_the_fewest(run: MakeRun) -> None:
    with pytest.raises(SettingError, match="batch_size: got 16, expected a multiple of the 3 workers"):
        run(workers="3:4", batch_size=16)


class ToFile:
    """Appends losses to a file from the first worker, with the numbers of workers that train and that there are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        workers = (torch.distributed.get_world_size(), ray.train.get_context().get_world_size())
        with open(self.path, "a") as file:
            file.write(json.dumps([step, metrics["train/loss"], *workers]) + "\n")

    def flush(self, seconds: float) -> None: ...

    def close(self) -> None: ...


@pytest.mark.slow
def test_a_number_that_does_not_divide_the_batch_trains_the_same_run(
    run: MakeRun, tiny_config: Config, remember: Any, tmp_path: Path, ray_cluster: Any
) -> None:
    """Three workers and a batch that two can share: the third waits, the losses are those of one process."""
    alone = remember()
    launch(prepare(tiny_config, run(output_folder=str(tmp_path / "alone")))[0], lambda: alone)
    plan, _ = prepare(tiny_config, run(workers="2:3"))
    assert plan.run.batch_size % 3
    path = tmp_path / "losses"
    assert launch(plan, lambda: ToFile(path)).steps == 10
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {tuple(workers) for _, _, *workers in lines} == {(2, 3)}
    losses = {step: loss for step, loss, *_ in lines}
    assert losses == pytest.approx(alone.series("train/loss"), rel=2e-3)
