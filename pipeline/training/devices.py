"""The GPU of a training: why torch cannot use one, what it can compute, and what to do if its memory is too small."""

import re
from typing import Literal

import torch

from pipeline.config import require
from pipeline.errors import ClipmillError
from pipeline.training.measure import GIBIBYTE

RunPrecision = Literal["auto", "bf16", "fp32", "fp8"]
# In torch's errors.
NO_DRIVER, OLD_DRIVER, NO_GPU = "found no nvidia driver", "is too old (found version", "no cuda gpus are available"


class GpuMemoryError(ClipmillError):
    """The memory of a GPU is too small for a step; the sentence lists the options that need less."""


def cuda_problem() -> str:
    """Why torch cannot compute on a GPU here, and what to do; empty if it can. Initialises CUDA."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA: install a build with CUDA (https://pytorch.org)"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _explained(str(error))
    return _problem_of_code(torch.device("cuda", torch.cuda.current_device()))


def computes_in_bf16(precision: RunPrecision, device: torch.device) -> bool:
    """Whether a run computes in bfloat16 on ``device``: ``auto`` does on GPUs that have it.

    Raises:
        SettingError: the precision asks for it, and the GPU could only emulate it.
    """
    on_gpu = device.type == "cuda"
    able = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return on_gpu and able
    wants = precision in ("bf16", "fp8")
    name = torch.cuda.get_device_name(device) if on_gpu else "a CPU"
    allowed = f"auto or fp32 on {name}; bfloat16 needs a GPU such as A100, L4 or RTX 30 (compute capability 8.0)"
    require(able or not wants, "precision", precision, allowed)
    return wants


def out_of_memory(device: torch.device, rows: int, used: frozenset[str]) -> GpuMemoryError:
    """The error for a model and ``rows`` samples that do not fit; ``used`` names the memory-saving options in use."""
    options = {
        "micro_batch": "--micro-batch (rows per forward pass)",
        "checkpoint_activations": "--checkpoint-activations",
        "bf16": "--precision bf16",
        "sharding": "--sharding full (with several GPUs)",
    }
    advice = ", ".join(text for name, text in options.items() if name not in used)
    total = torch.cuda.get_device_properties(device).total_memory / GIBIBYTE
    name = torch.cuda.get_device_name(device)
    return GpuMemoryError(
        f"the {total:.0f} GiB of {name} are too small for this model and {rows} samples a step: use a smaller "
        f"--batch-size or more --workers" + (f", or {advice}" if advice else "")
    )


def _explained(message: str) -> str:
    """torch's ``message`` about CUDA as one sentence with a remedy."""
    lower = message.lower()
    if NO_DRIVER in lower:
        return "no NVIDIA driver is installed: nvidia-smi must list the GPU, also inside of a container"
    if OLD_DRIVER in lower:
        found = re.search(r"found version (\d+)", message)
        version = f" (it supports CUDA {int(found[1]) // 1000}.{int(found[1]) % 1000 // 10})" if found else ""
        return (
            f"the NVIDIA driver is too old{version} for torch {torch.__version__}, built for CUDA "
            f"{torch.version.cuda}: update the driver, or install a torch built for an older CUDA"
        )
    if NO_GPU in lower:
        return "no GPU is visible: check nvidia-smi and the variable CUDA_VISIBLE_DEVICES"
    return f"CUDA does not start: {message.strip().splitlines()[0] if message.strip() else 'no reason given'}"


def _problem_of_code(device: torch.device) -> str:
    """Whether this build of torch has code for the GPU: of its major version up to its minor, or PTX up to it."""
    major, minor = torch.cuda.get_device_capability(device)
    for name in torch.cuda.get_arch_list():
        kind, _, number = name.partition("_")
        number = number.rstrip("af")
        built = int(number[:-1]), int(number[-1])
        if kind == "compute" and built <= (major, minor):
            return ""
        if kind == "sm" and built[0] == major and built[1] <= minor:
            return ""
    has = ", ".join(torch.cuda.get_arch_list())
    return (
        f"torch {torch.__version__} has no code for {torch.cuda.get_device_name(device)} (sm_{major}{minor}; it has "
        f"{has}): install a build for this GPU (https://pytorch.org)"
    )
