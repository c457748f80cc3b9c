"""Where a step's time goes, MFU, norms by tower, memory, and the trace of some steps."""

import gzip
import json
import logging
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.models.clip import Clip, Config
from pipeline.models.slip import Slip
from pipeline.training import measure
from pipeline.training.loop import run_training
from pipeline.training.measure import PHASES, SAMPLED, Clock, MeasurementConfig, memory, sizes, tower_norms, towers
from pipeline.training.run import Run, prepare

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BATCH = {"image": torch.zeros(4, 1), "text": torch.zeros(4, 7)}


class Times:
    """A clock that shows a given time."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Counted:
    """Work of a billion operations per row."""

    def of(self, batch: dict[str, Tensor]) -> float:
        return 1e9 * len(batch["image"])

    def lengths(self, batch: dict[str, Tensor]) -> dict[str, int]:
        return {}


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    fake = Times()
    monkeypatch.setattr(measure, "time", fake)
    return fake


def spend(clock: Clock, times: Times, name: str, seconds: float) -> None:
    with clock.phase(name):
        times.now += seconds


def step(clock: Clock, times: Times, *, wait: float = 0.5) -> None:
    """Three seconds and a half, if the data come after half a second."""

    def batches() -> Any:
        times.now += wait
        yield BATCH

    clock.worked(clock.waited(batches()))
    spend(clock, times, "forward", 1.0)
    spend(clock, times, "backward", 1.5)
    times.now += 0.25
    spend(clock, times, "optimizer", 0.25)


def test_parts_of_a_step_are_shares_of_its_time(times: Times) -> None:
    clock = Clock(8, CPU, Counted(), peak=0.01)  # type: ignore[arg-type]
    step(clock, times)
    assert clock.interval() == {} and clock.overall() == 0.0  # the first step ends after the start
    step(clock, times)
    step(clock, times, wait=2.0)
    spend(clock, times, "save", 1.5)
    metrics = clock.interval()
    assert metrics == pytest.approx(
        {
            "perf/samples_per_second": 2 * 8 / 10,
            "perf/step_seconds": 5.0,
            "perf/data_wait": 0.25,
            "perf/copy": 0.0,
            "perf/forward": 0.2,
            "perf/backward": 0.3,
            "perf/exchange": 0.0,
            "perf/optimizer": 0.05,
            "perf/save": 0.15,
            "perf/tflops": 2 * 4e9 / 10 / 1e12,
            "perf/mfu": 2 * 4e9 / 10 / 1e12 / 0.01,
        }
    )
    assert clock.overall() == pytest.approx(1.6)


def test_no_utilisation_without_a_peak_or_a_count(times: Times) -> None:
    clock = Clock(8, CPU, Counted())  # type: ignore[arg-type]
    for _ in range(2):
        step(clock, times)
        metrics = clock.interval()
    assert "perf/tflops" in metrics and "perf/mfu" not in metrics
    bare = Clock(8, CPU)
    for _ in range(2):
        step(bare, times)
        metrics = bare.interval()
    assert set(metrics) == {"perf/samples_per_second", "perf/step_seconds", *(f"perf/{part}" for part in PHASES)}


def test_a_gpus_parts_are_told_by_its_own_queue(times: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are recorded while the host runs ahead, read at the log alone, and only for the first steps of many."""
    made, waits = [], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            made.append(self)

        def record(self) -> None:
            self.at = times.now

        def synchronize(self) -> None:
            waits.append(self)

        def elapsed_time(self, end: "Event") -> float:
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock(8, GPU)
    step(clock, times)
    clock.interval()
    waits.clear()
    made.clear()
    for _ in range(SAMPLED + 50):
        step(clock, times)
    spend(clock, times, "save", 350.0)  # by the host's clock: it is the host that writes
    assert not waits and len(made) == 2 * 4 * SAMPLED
    metrics = clock.interval()
    assert metrics["perf/forward"] == pytest.approx((SAMPLED + 50) * 1.0 / ((SAMPLED + 50) * 3.5 + 350))
    assert metrics["perf/data_wait"] == pytest.approx((SAMPLED + 50) * 0.5 / ((SAMPLED + 50) * 3.5 + 350))
    assert metrics["perf/save"] == pytest.approx(350 / ((SAMPLED + 50) * 3.5 + 350))
    assert len(waits) == 4 * SAMPLED


@pytest.mark.parametrize("kind", [Clip, Slip])
def test_norms_by_tower_make_up_the_whole(kind: type[Clip]) -> None:
    method = kind(kind.smallest())
    for parameter in method.parameters():
        parameter.grad = torch.randn_like(parameter)
    norms = tower_norms(method, towers(method))
    assert set(norms) == {"image", "text", "logit_scale"} | ({"head"} if kind is Slip else set())
    visual = torch.cat([parameter.grad.flatten() for parameter in method.model.visual.parameters()])
    assert norms["image"].item() == pytest.approx(visual.norm().item(), rel=1e-4)
    whole = torch.cat([parameter.grad.flatten() for parameter in method.parameters() if parameter.grad is not None])
    together = torch.stack(list(norms.values())).norm()
    assert together.item() == pytest.approx(whole.norm().item(), rel=1e-4)


def test_a_locked_tower_has_no_norm_and_is_said_to_be_frozen() -> None:
    method = Clip(Config(architecture="clipmill-tiny"))
    count = 0
    for parameter in method.model.visual.parameters():
        parameter.requires_grad_(False)
        count += parameter.numel()
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    assert set(tower_norms(method, towers(method))) == {"text", "logit_scale"}
    total = sum(parameter.numel() for parameter in method.parameters())
    said = f"{total / 1e6:.1f} million parameters, {count / 1e6:.1f} million of image frozen"
    method.logit_scale.requires_grad_(False)  # a single number is not worth a word
    assert sizes(method, towers(method)) == said


def test_memory_is_that_of_this_process() -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert 0.1 < memory(CPU)["perf/memory_gb"] <= peak * 1.05


def test_the_start_says_what_a_sample_costs(
    caplog: pytest.LogCaptureFixture, run: Callable[..., Run], remember: Any
) -> None:
    caplog.set_level(logging.INFO)
    tracker = remember()
    settings = run(steps=3, measuring=MeasurementConfig(peak_tflops=0.5))
    run_training(prepare(Clip.smallest(), settings)[0], CPU, tracker)
    (line,) = [record.getMessage() for record in caplog.records if "GFLOP a sample" in record.getMessage()]
    assert "perf/mfu is the share of 0.5 TFLOP/s, the peak of cpu" in line and "0.01" in line
    assert re.search(r"GFLOP a sample, \d+ text tokens, forward and backward; ", line)
    (line,) = [record.getMessage() for record in caplog.records if "million parameters" in record.getMessage()]
    assert "float32" in line and "on cpu" in line
    last = tracker.history[3]
    assert last["perf/mfu"] == pytest.approx(last["perf/tflops"] / 0.5)
    assert 0 < sum(last[f"perf/{part}"] for part in PHASES) <= 1


def test_profiled_steps_leave_a_trace(run: Callable[..., Run], remember: Any) -> None:
    """A gzipped Chrome trace, in which our parts of a step enclose torch's operations, once for each traced step."""
    tracker = remember()
    settings = run(steps=6, micro_batch=4, measuring=MeasurementConfig(profile_steps="3:4"))
    run_training(prepare(Clip.smallest(), settings)[0], CPU, tracker)
    assert list(tracker.files) == ["profiles/steps-00000003-00000004.json.gz"]
    (content,) = tracker.files.values()
    events = [event for event in json.loads(gzip.decompress(content))["traceEvents"] if "dur" in event]
    ours = [event for event in events if event["name"] == "clipmill/forward"]
    assert len(ours) == 2
    attention = [event for event in events if "scaled_dot_product" in event["name"]]
    begin, end = ours[0]["ts"], ours[0]["ts"] + ours[0]["dur"]
    assert any(begin <= event["ts"] <= end for event in attention)
    names = {event["name"] for event in events}
    assert {f"clipmill/{part}" for part in ("data_wait", "copy", "backward", "exchange", "optimizer")} <= names


def test_a_trace_ends_where_the_training_does(run: Callable[..., Run], remember: Any) -> None:
    tracker = remember()
    settings = run(steps=3, measuring=MeasurementConfig(profile_steps="2:9"))
    plan = prepare(Clip.smallest(), settings)[0]
    run_training(plan, CPU, tracker)
    assert list(tracker.files) == ["profiles/steps-00000002-00000003.json.gz"]
    other = replace(plan.run, measuring=MeasurementConfig())
    assert prepare(Clip.smallest(), other)[1].settings == prepare(Clip.smallest(), plan.run)[1].settings


@pytest.mark.parametrize("steps", ["5", "5:", ":5", "6:5", "0:5", "a:b", "1:2:3", "-1:4"])
def test_steps_that_are_no_range_are_refused(steps: str) -> None:
    with pytest.raises(SettingError, match="profile_steps"):
        MeasurementConfig(profile_steps=steps)


def test_a_peak_is_a_number_above_zero() -> None:
    assert list(MeasurementConfig(profile_steps="2:4").profiled()) == [2, 3, 4] and not MeasurementConfig().profiled()
    with pytest.raises(SettingError, match="peak_tflops"):
        MeasurementConfig(peak_tflops=0)
