"""Matrix products in 8 bits (Micikevicius et al. 2022, arXiv 2209.05433), through torchao, on GPUs that support them.

Inputs and weights are converted to e4m3 and gradients to e5m2, each scaled by its largest value. Products are summed in
higher precision. Weights, their gradients and checkpoints stay float32; everything else is computed in bfloat16. Only
linear layers of the towers' blocks are converted. In open_clip's own transformers these are the MLPs, two thirds of a
block's work, because their attention has no linear layers for its projections; in timm's they are the whole block.
"""

import warnings
from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import nn

from pipeline.config import require

FIRST_CAPABILITY = (8, 9)  # Ada and Hopper
MULTIPLE = 16  # tensor cores require rows and columns in multiples of it


def check_installed() -> None:
    """Raise ``SettingError`` if torchao is missing."""
    require(find_spec("torchao") is not None, "precision", "fp8", "auto, bf16 or fp32 without torchao (clipmill[fp8])")


def check_device(device: torch.device) -> None:
    """Raise ``SettingError`` if ``device`` does not support 8-bit matrix products."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    require(able, "precision", "fp8", f"auto, bf16 or fp32 on {name}; fp8 needs a GPU such as H100 or L40")


def convert(blocks: Iterable[nn.Module], *, emulate: bool = False) -> int:
    """Make the linear layers of ``blocks`` multiply in 8 bits; returns their number. Their weights are not changed.

    ``emulate`` rounds to 8 bits and multiplies in float32: for tests, on any device.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own, about other parts of it
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    converted = 0

    def fits(module: nn.Module, name: str) -> bool:
        nonlocal converted
        # The output layer of torch's attention is a subclass; its weight is used without calling it.
        found = type(module) is nn.Linear and not module.in_features % MULTIPLE and not module.out_features % MULTIPLE
        converted += found
        return found

    # The weights' gradient sums over rows; their number is padded to a multiple too.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    for block in blocks:
        convert_to_float8_training(block, config=config, module_filter_fn=fits)
    return converted
