"""Matrix products in eight bits (Micikevicius et al. 2022, arXiv 2209.05433), through torchao, on GPUs that have them.

Inputs and weights become e4m3 and gradients e5m2, each with the scale that its largest value asks for, and are summed
in higher precision; weights, their gradients and checkpoints stay float32, everything else is computed in bfloat16.
Only linear layers of the towers' blocks count: in open_clip's own transformers that is the MLPs, two thirds of a
block's work, since their attention projects without linear layers; in timm's it is all of it.
"""

import warnings
from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import nn

from pipeline.config import require

FIRST_CAPABILITY = (8, 9)  # Ada and Hopper
MULTIPLE = 16  # of rows and columns, which tensor cores ask for


def check_installed() -> None:
    """Raise ``SettingError`` where the library is missing."""
    require(find_spec("torchao") is not None, "precision", "fp8", "auto, bf16 or fp32 without torchao (clipmill[fp8])")


def check_device(device: torch.device) -> None:
    """Raise ``SettingError`` where ``device`` cannot multiply in eight bits."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    require(able, "precision", "fp8", f"auto, bf16 or fp32 on {name}; fp8 needs a GPU of the kind of H100 or L40")


def convert(blocks: Iterable[nn.Module], *, emulate: bool = False) -> int:
    """Let the linear layers of ``blocks`` multiply in eight bits; returns how many do. Their weights stay as they are.

    ``emulate`` rounds to eight bits and multiplies in float32: for tests, on any device.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own, of its other parts
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    converted = 0

    def fits(module: nn.Module, name: str) -> bool:
        nonlocal converted
        # The output layer of torch's attention is a subclass, whose weight is used without calling it.
        found = type(module) is nn.Linear and not module.in_features % MULTIPLE and not module.out_features % MULTIPLE
        converted += found
        return found

    # The weights' gradient sums over rows, whose number is padded to a multiple too.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    for block in blocks:
        convert_to_float8_training(block, config=config, module_filter_fn=fits)
    return converted
