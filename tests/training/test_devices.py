"""Sentences for GPUs that cannot be used: torch's own messages, and devices that are described to the functions."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.errors import SettingError
from pipeline.training import launch, loop
from pipeline.training.devices import GpuMemoryError, computes_in_bf16, cuda_problem
from pipeline.training.run import prepare

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
# Word for word from torch 2.15's libraries.
MESSAGES = {
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from "
    "http://www.nvidia.com/Download/index.aspx": "no NVIDIA driver is installed: nvidia-smi must list the GPU",
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version": r"too old \(it supports CUDA 11\.4\) for torch .*: update the driver, or install",
    "The NVIDIA driver on your system is too old (found version 12080).": r"it supports CUDA 12\.8\)",
    "No CUDA GPUs are available": "no GPU is visible: check nvidia-smi and the variable CUDA_VISIBLE_DEVICES",
    "CUDA unknown error - this may be due to ...\nmore": "^CUDA does not start: CUDA unknown error - this may be due",
    "": "no reason given",
}


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], codes: tuple[str, ...] = ()) -> None:
    """A device as torch describes it."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(codes))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: capability >= (8, 0))
    memory = SimpleNamespace(total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: memory)


@pytest.mark.parametrize("message", MESSAGES)
def test_what_torch_says_becomes_a_sentence_with_a_remedy(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def fail() -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", fail)
    found = cuda_problem()
    assert re.search(MESSAGES[message], found) and "\n" not in found


def test_a_build_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert "is built without CUDA: install a build with CUDA" in cuda_problem()


@pytest.mark.parametrize(
    ("capability", "codes", "usable"),
    [
        ((9, 0), ("sm_80", "sm_90", "compute_90"), True),
        ((8, 9), ("sm_80", "sm_90"), True),  # code of the same major version runs on later minor ones
        ((8, 0), ("sm_86", "sm_90"), False),  # and not on earlier ones
        ((12, 0), ("sm_80", "compute_90"), True),  # PTX is compiled for later GPUs
        ((9, 0), ("sm_90a",), True),
        ((7, 0), ("sm_75", "sm_80", "compute_90"), False),
    ],
)
def test_a_build_must_have_code_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], codes: tuple[str, ...], usable: bool
) -> None:
    fake_gpu(monkeypatch, capability, codes)
    found = cuda_problem()
    assert (found == "") == usable
    assert usable or (f"no code for Some GPU (sm_{capability[0]}{capability[1]}; it has sm_" in found)


def test_auto_is_bfloat16_where_the_gpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, (8, 0))
    assert computes_in_bf16("auto", GPU) and computes_in_bf16("bf16", GPU) and computes_in_bf16("fp8", GPU)
    assert not computes_in_bf16("fp32", GPU) and not computes_in_bf16("auto", CPU) and computes_in_bf16("bf16", CPU)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_gpu_without_bfloat16_is_refused_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, precision: Any
) -> None:
    fake_gpu(monkeypatch, (7, 5))
    assert not computes_in_bf16("auto", GPU) and not computes_in_bf16("fp32", GPU)
    with pytest.raises(SettingError, match=f"precision: got '{precision}', expected auto or fp32 on Some GPU"):
        computes_in_bf16(precision, GPU)


def test_too_little_memory_is_a_sentence_that_lists_what_helps(
    run: Any, tiny_config: Any, remember: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu(monkeypatch, (8, 0))

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    plan, _ = prepare(tiny_config, run(precision="fp32"))
    monkeypatch.setattr(loop._TrainingState, "_step", fail)
    with pytest.raises(GpuMemoryError) as raised:
        loop.run_training(plan, CPU, remember())
    text = str(raised.value)
    rows = plan.run.batch_size
    assert f"16 GiB of Some GPU are too small for this model and {rows} samples a step: use a smaller --b" in text
    assert all(option in text for option in ("--micro-batch", "--checkpoint-activations", "--precision", "--sharding"))


def test_a_model_that_does_not_fit_gets_the_options_that_are_not_in_use(
    run: Any, tiny_config: Any, remember: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu(monkeypatch, (8, 0))

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    settings = run(precision="bf16", checkpoint_activations=True, micro_batch=2, sharding="full")
    plan, _ = prepare(tiny_config, settings)
    monkeypatch.setattr(loop._TrainingState, "_method", fail)
    with pytest.raises(GpuMemoryError, match="a smaller --batch-size or more --workers$"):
        loop.run_training(plan, CPU, remember())


def test_training_on_the_cpu_says_why_where_a_gpu_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "cuda_problem", lambda: "no GPU is visible")
    assert launch._own_device("auto") == CPU and not caplog.text
    assert launch._own_device("gpu") == CPU and "training on the CPU: no GPU is visible" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launch._own_device("cpu") == CPU and launch._own_device("gpu") == GPU
