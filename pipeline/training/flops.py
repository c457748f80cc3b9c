"""The work of a training step in floating-point operations, and what a device could do at most.

The model FLOPs utilisation (MFU) is, after PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B), the work that
the model needs for what it has trained on, divided by what the device could have done in that time. Work that is done
again to save memory does not count as useful: not the second forward pass of micro-batches or checkpointed activations,
not the scores that a fused attention recomputes in its backward pass. A teacher's forward pass counts. Only matrix
products and convolutions count, by torch's counter; the logits of a large batch are left out, under 1 % of the work up
to batches of 32,768 with the paper's models.

The count is taken from a copy of the method whose tensors have shapes and no contents, so it costs neither memory nor
the device's time.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations_with_replacement
from typing import Any, Literal

import numpy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pipeline.models.method import Method

logger = logging.getLogger(__name__)

Precision = Literal["bf16", "tf32", "fp32"]
ROWS = 2  # samples that are counted; normalisation over a batch needs more than one

# Dense TFLOP/s (bfloat16 with float32 sums, TF32, float32) from NVIDIA's data sheets, which often state twice as much:
# with half of the weights zero. The first name that the device's name contains decides.
PEAKS: tuple[tuple[str, dict[Precision, float]], ...] = (
    # NVIDIA Blackwell architecture brief, HGX B200, one of eight
    ("B200", {"bf16": 2250.0, "tf32": 1125.0, "fp32": 75.0}),
    # NVIDIA H200 data sheet: NVL, SXM
    ("H200 NVL", {"bf16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    ("H200", {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    # NVIDIA H100 data sheet: PCIe, NVL, SXM
    ("H100 PCIe", {"bf16": 756.0, "tf32": 378.0, "fp32": 51.2}),
    ("H100 NVL", {"bf16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    ("H100", {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    # NVIDIA A100 data sheet; PCIe and SXM, 40 and 80 GB alike
    ("A100", {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    # NVIDIA L40S, L40 and L4 data sheets
    ("L40S", {"bf16": 362.0, "tf32": 183.0, "fp32": 91.6}),
    ("L40", {"bf16": 181.0, "tf32": 90.5, "fp32": 90.5}),
    ("L4", {"bf16": 121.0, "tf32": 60.0, "fp32": 30.3}),
    # NVIDIA A40 data sheet; NVIDIA Ada architecture paper
    ("A40", {"bf16": 149.7, "tf32": 74.8, "fp32": 37.4}),
    ("RTX 4090", {"bf16": 165.2, "tf32": 82.6, "fp32": 82.6}),
)
PARTS = {"MIG", "Laptop"}  # words of names whose devices have less than the whole one


def precision(device: torch.device, bf16: bool) -> Precision:
    """Type of matrix products: on a GPU TF32 where it is not bfloat16, unless torch is configured otherwise."""
    if bf16:
        return "bf16"
    return "tf32" if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest" else "fp32"


def device_name(device: torch.device) -> str:
    """Such as ``NVIDIA H100 80GB HBM3``, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_of(name: str, precision: Precision) -> float | None:
    """Dense TFLOP/s of the device with this name, as torch gives it; ``None`` where it is not known."""
    words = set(name.replace("-", " ").split())
    for known, peaks in PEAKS if words.isdisjoint(PARTS) else ():
        if words.issuperset(known.split()):
            return peaks[precision]
    return None


class Work:
    """Counts what the steps of a method need. Made before the method is wrapped, compiled or sharded."""

    def __init__(self, method: Method) -> None:
        self._mode = FakeTensorMode()
        self._shapes = _shapes_of(method, self._mode)
        self._counted: dict[tuple[int, ...], float] = {}
        self._known: dict[tuple[int, ...], float] = {}
        self._impossible = False

    def of(self, batch: Mapping[str, Tensor]) -> float | None:
        """Useful FLOPs, forward and backward, of this rank's ``batch``; ``None`` if they cannot be counted.

        The work differs with the batch's :meth:`~pipeline.models.method.Method.lengths`. It is a polynomial of second
        degree in them: with one, three lengths are counted and the others follow.
        """
        lengths = tuple(self.lengths(batch).values())
        if lengths not in self._known and not self._impossible:
            each = self._extrapolated(lengths)
            if each is None:
                each = self._count(batch, lengths)
            if each is not None:
                self._known[lengths] = each
        each = self._known.get(lengths)
        return None if each is None else each * len(next(iter(batch.values())))

    def lengths(self, batch: Mapping[str, Tensor]) -> Mapping[str, int]:
        """What the work of ``batch`` depends on, by unit."""
        return self._shapes.lengths(batch)

    def _extrapolated(self, lengths: tuple[int, ...]) -> float | None:
        """The work a sample, where that of the counted lengths determines it."""
        if not self._counted:
            return None
        scale = next(iter(self._counted))
        known = numpy.array([_terms(counted, scale) for counted in self._counted])
        wanted = numpy.array(_terms(lengths, scale))
        if numpy.linalg.matrix_rank(numpy.vstack([known, wanted])) > numpy.linalg.matrix_rank(known):
            return None
        factors = numpy.linalg.lstsq(known, numpy.array(list(self._counted.values())), rcond=None)[0]
        return float(wanted @ factors)

    def _count(self, batch: Mapping[str, Tensor], lengths: tuple[int, ...]) -> float | None:
        rows = {key: values[:ROWS] for key, values in batch.items()}
        try:
            total = count(self._shapes, rows, self._mode)
        except RuntimeError as error:  # torch's errors for operations that need contents, or know no shapes
            logger.warning("the work of a step is not counted: %s", str(error).partition("\n")[0])
            self._impossible = True
            return None
        self._counted[lengths] = total / len(next(iter(rows.values())))
        return self._counted[lengths]


def _terms(lengths: Sequence[int], scale: Sequence[int]) -> list[float]:
    """The terms of a polynomial of second degree in ``lengths``, each in parts of ``scale`` so that they are near 1."""
    parts = [length / max(1, unit) for length, unit in zip(lengths, scale, strict=True)]
    return [1.0, *parts, *(one * other for one, other in combinations_with_replacement(parts, 2))]


def count(method: Method, batch: Mapping[str, Tensor], mode: FakeTensorMode) -> int:
    """FLOPs of a training step of ``method``, which has fake tensors of ``mode``, with as much data as ``batch``."""
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION_BACKWARD)
    device = next((tensor.device for tensor in (*method.parameters(), *method.buffers())), torch.device("cpu"))
    with mode, _AllRows(), _plain_attention(), counter:  # type: ignore[no-untyped-call]
        losses = method.training_step({key: mode.from_tensor(values).to(device) for key, values in batch.items()})
        torch.stack(list(losses.values())).sum().backward()
    for parameter in method.parameters():
        parameter.grad = None
    return int(counter.get_total_flops())


def _shapes_of(method: Method, mode: FakeTensorMode) -> Method:
    """A copy of ``method`` whose tensors have no contents; it is alone in the world."""
    tokenizer = getattr(method, "tokenizer", None)  # a detector has none
    known: dict[int, Any] = {id(tokenizer): tokenizer}
    known |= {id(getattr(method, name)): getattr(Method, name) for name in ("gather", "exchange")}
    for parameter in method.parameters():
        known[id(parameter)] = nn.Parameter(mode.from_tensor(parameter.detach()), parameter.requires_grad)
    known |= {id(buffer): mode.from_tensor(buffer) for buffer in method.buffers()}
    return copy.deepcopy(method, known)


class _AllRows(TorchDispatchMode):
    """Where a method picks rows by their contents, which are not there, all are picked."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default and args[0].ndim == 1:
            return torch.arange(len(args[0]), device=args[0].device)[:, None]
        return func(*args, **(kwargs or {}))


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Disable torch's fused attention of evaluation mode (a teacher's), which the FLOP counter does not count."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Four matrix products; torch's own formula counts the recomputed scores as a fifth."""
    return int(2 * sdpa_flop_count(query, key, value))


_ATTENTION_BACKWARD = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_backward"): _attention_backward
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
}
