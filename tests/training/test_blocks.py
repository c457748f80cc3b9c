"""Blocks that are compiled or computed again: the same losses and gradients as plain ones."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pipeline.models.clip import Clip, Config
from pipeline.models.method import Method, build_method
from pipeline.training.blocks import compile_each, recompute_each
from pipeline.training.checkpoint import Checkpoints, read_weights
from pipeline.training.loop import run_training
from pipeline.training.run import Run, prepare

CPU = torch.device("cpu")
# Tracing looks at the gradient of every input, and torch warns of that of those that have none.
TRACED = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
MakeRun = Callable[..., Run]


def built(config: Any, change: Callable[[Any], None] | None = None) -> Method:
    torch.manual_seed(0)
    method = build_method(config)
    if change:
        change(method.blocks())
    return method


def batch(method: Method, length: int = 20) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = method.transforms(True).size
    text = torch.randint(1, 400, (6, length), generator=generator)
    text[:, -1] = 49407
    return {"image": torch.randint(0, 256, (6, 3, *size), generator=generator, dtype=torch.uint8), "text": text}


def backward(method: Method, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradients, and the bytes that the forward pass leaves allocated for the backward pass."""
    torch.manual_seed(2)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        loss = torch.stack(list(method(inputs).values())).sum()
    loss.backward()
    kept = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
    gradients = {name: value.grad for name, value in method.named_parameters() if value.grad is not None}
    return loss.item(), gradients, kept


def test_computed_again_gives_the_same_gradients_with_less_memory(dropout_config: Config) -> None:
    """Bit for bit, with patch dropout."""
    plain, again = built(dropout_config), built(dropout_config, recompute_each)
    expected, found = backward(plain, batch(plain)), backward(again, batch(again))
    assert found[0] == expected[0] and found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())
    assert 0 < found[2] < expected[2] / 2
    assert plain.state_dict().keys() == again.state_dict().keys()


def test_running_statistics_count_a_batch_once() -> None:
    """The blocks of this tower normalise batches."""
    config = Config(architecture="clipmill-small")
    plain, again = built(config), built(config, recompute_each)
    expected, found = backward(plain, batch(plain)), backward(again, batch(again))
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())
    statistics = {name for name in plain.state_dict() if "running" in name or "tracked" in name}
    assert statistics and all(torch.equal(plain.state_dict()[name], again.state_dict()[name]) for name in statistics)


@pytest.mark.parametrize("changes", [{}, {"micro_batch": 3}])
def test_a_run_that_computes_again_is_the_same_run(
    run: MakeRun, dropout_config: Config, remember: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Bit for bit, also in parts; and a resume may turn it on, for it is no part of what was run."""
    plan = prepare(dropout_config, run(steps=6, **changes))[0]
    other = replace(plan, run=replace(plan.run, output_folder=str(tmp_path / "other")))
    plain, first, second = remember(), remember(stop_at=5), remember()
    run_training(plan, CPU, plain)
    with pytest.raises(KeyboardInterrupt):
        run_training(other, CPU, first)
    run_training(replace(other, run=replace(other.run, checkpoint_activations=True)), CPU, second)
    assert first.series("train/grad_norm") | second.series("train/grad_norm") == plain.series("train/grad_norm")
    ends = [read_weights(Checkpoints(one.run.output_folder).at(6)) for one in (plan, other)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.slow
@TRACED
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("architecture", ["clipmill-tiny", "clipmill-small"])
def test_compiled_blocks_give_the_same_gradients(architecture: str, again: bool) -> None:
    """Through torch's tracing and its derivatives; what its code generator adds is tested in the run below."""
    torch._dynamo.reset()

    def change(blocks: Any) -> None:
        if again:
            recompute_each(blocks)
        compile_each(blocks, backend="aot_eager")

    config = Config(architecture=architecture)
    plain, compiled = built(config), built(config, change)
    for length in (20, 12, 15, 9):
        plain.zero_grad(), compiled.zero_grad()
        expected, found = backward(plain, batch(plain, length)), backward(compiled, batch(compiled, length))
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
        for name, gradient in expected[1].items():
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@TRACED
@pytest.mark.parametrize("again", [False, True])
def test_blocks_of_one_shape_are_compiled_once(again: bool) -> None:
    """Two blocks in each tower, and captions of many lengths: one graph for images, two for captions."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    method = built(Clip.smallest(), recompute_each if again else None)
    compile_each(method.blocks(), backend="aot_eager")
    for length in (20, 12, 15, 9, 30, 25):
        backward(method, batch(method, length))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@TRACED
@pytest.mark.slow
def test_a_compiled_run(run: MakeRun, tiny_config: Config, remember: Any, tmp_path: Path) -> None:
    """With the real compiler, which needs a C++ compiler on a CPU."""
    torch._dynamo.reset()
    plain, compiled = remember(), remember()
    run_training(prepare(tiny_config, run(steps=4))[0], CPU, plain)
    settings = run(steps=4, compile_blocks=True, output_folder=str(tmp_path / "b"))
    run_training(prepare(tiny_config, settings)[0], CPU, compiled)
    for name in ("train/loss", "train/grad_norm"):
        assert compiled.series(name) == pytest.approx(plain.series(name), rel=1e-3), name
