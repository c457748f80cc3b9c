"""Every method's forward pass with tensors on a GPU that is not there: shapes and devices without contents.

A tensor that a step makes on the CPU meets one of the GPU and raises. An operation that needs contents raises too: on a
GPU it would wait. Where a method must find objects first, the pass is only followed up to there.
"""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from pipeline.models.method import Method, method_names
from pipeline.shards.snapshot import Snapshot
from pipeline.training.flops import _shapes_of
from tests.models.test_method_contract import build, first_batch, make_data

NEEDS_CONTENTS = (DataDependentOutputException, DynamicOutputShapeException)


@pytest.fixture(scope="module")
def snapshot(make_snapshot: Callable[..., Snapshot]) -> Snapshot:
    return make_data(make_snapshot)


def on_gpu(method: Method, mode: FakeTensorMode) -> Method:
    """A copy of ``method`` with fake tensors of the GPU."""
    moved = _shapes_of(method, mode)
    with mode:
        for module in moved.modules():
            for name, value in [*module._parameters.items()]:
                if value is not None:
                    module._parameters[name] = nn.Parameter(value.detach().to("cuda"), value.requires_grad)
            for name, buffer in [*module._buffers.items()]:
                module._buffers[name] = None if buffer is None else buffer.to("cuda")
    return moved


@pytest.mark.parametrize("name", method_names())
def test_a_step_stays_on_the_device(name: str, snapshot: Snapshot) -> None:
    method, mode = build(name), FakeTensorMode()
    method.prepare_training()
    batch, moved = first_batch(method, snapshot), on_gpu(method.train(), mode)
    with mode:
        on_device = {key: mode.from_tensor(value).to("cuda") for key, value in batch.items()}
        with warnings.catch_warnings(action="ignore"):  # autocast, about the missing GPU
            try:
                losses = moved.training_step(on_device)
            except NEEDS_CONTENTS as error:
                pytest.skip(f"followed up to {str(error)[:60]}")
            except RuntimeError as error:  # autograd's engine asks the driver
                if "hasPrimaryContext" not in str(error) or torch.cuda.is_available():
                    raise
                pytest.skip("followed up to a gradient inside of the step")
    assert {loss.device.type for loss in losses.values()} == {"cuda"}


def test_a_tensor_of_the_cpu_is_noticed() -> None:
    mode = FakeTensorMode()
    with mode, pytest.raises(RuntimeError, match="device"):
        torch.ones(2, device="cuda") + torch.ones(2)
