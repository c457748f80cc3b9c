"""The device of a run: its name, versions, what it can compute, and what keeps it from being used."""

import os
import subprocess
from typing import Any

import torch

from pipeline.errors import SettingError
from pipeline.models.method import method_names
from pipeline.training import fp8
from pipeline.training.devices import cuda_problem
from pipeline.training.flops import device_name, peak_of
from tests.gpu.child import Emit
from tests.gpu.plan import Setting

FIRST_TORCH = (2, 11)
FREE = 0.9  # of the memory, under which another process disturbs the figures


def describe(setting: Setting, emit: Emit) -> None:
    """One line of facts, the last one, after those of what is missing.

    Raises:
        SystemExit: torch is too old, or there is no GPU that it can use.
    """
    import torchvision
    import transformers

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < FIRST_TORCH:
        emit({"error": f"torch {torch.__version__} is too old: install 2.11 or newer"})
        raise SystemExit(1)
    problem = "" if setting.dry else cuda_problem()
    if problem:
        emit({"error": f"{problem}; --dry tries the script on a CPU", "forked": "re-initialize" in problem.lower()})
        raise SystemExit(1)
    device = torch.device(setting.device)
    facts = {
        "device": device_name(device),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "transformers": transformers.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "methods": method_names(),
    }
    emit(facts | (_gpu(device, emit) if device.type == "cuda" else {"bf16": True}))


def _gpu(device: torch.device, emit: Emit) -> dict[str, Any]:
    """Facts of a GPU; emits a sentence for everything that limits the run."""
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    name = device_name(device)
    if free < FREE * total:
        warn(emit, f"other processes hold {total - free:.0f} of {total:.0f} GiB: end them, or figures will be too low")
    if not bf16:
        warn(emit, f"{name} only emulates bfloat16: the figures are left out; use a GPU of compute capability 8.0")
    return {
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "capability": list(torch.cuda.get_device_capability(device)),
        "memory_gb": round(total, 1),
        "bf16": bf16,
        "fp8": fp8_problem(device) or True,
        "peak_tflops": peak_of(name, "bf16"),
    }


def fp8_problem(device: torch.device) -> str:
    """Why ``--precision fp8`` is refused on this device; empty if it is not."""
    try:
        fp8.check_installed()
        fp8.check_device(device)
    except SettingError as error:
        return str(error)
    return ""


def warn(emit: Emit, sentence: str) -> None:
    """A line that fails nothing."""
    emit({"warning": sentence})


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "not known: nvidia-smi does not answer"
