"""The tensors of a TorchScript archive, such as the weights that OpenAI published, without running code from it.

An archive is a zip file with the pickled modules (``data.pkl``), their tensors' bytes (``data/0``, ``data/1``, ...) and
their code. The code is never read. The pickle is read by an unpickler that knows tensors, lists of numbers and plain
containers, and makes an empty :class:`Module` of every class of the archive; everything else is refused.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from pipeline.errors import DataError

# What a stranger's pickle can fail with; none of it runs code. (Recursion is a RuntimeError.)
BROKEN = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError),
    *(KeyError, IndexError, TypeError, AttributeError),
)


class Module:
    """A module or another object of the archive: its attributes alone."""

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, Mapping) else {}


def is_torch_script(path: Path) -> bool:
    """Whether the file at ``path`` is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2] for name in archive.namelist()}
    return "data.pkl" in names and "constants.pkl" in names


def read_script_tensors(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of the archive at ``path``, on the CPU, by their dotted names.

    Raises:
        DataError: a damaged archive, or one whose pickle holds anything but modules and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].partition("/")[0]
            with archive.open(f"{root}/data.pkl") as pickled:
                return dict(_tensors(_ModuleUnpickler(pickled, archive, root).load(), ""))
    except BROKEN as error:
        raise DataError(f"{path} is a TorchScript archive that cannot be read ({error})") from error


def _tensors(node: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield prefix, node
    elif isinstance(node, Module):
        for name, child in getattr(node, "attributes", {}).items():
            yield from _tensors(child, f"{prefix}.{name}" if prefix else str(name))


class _ModuleUnpickler(pickle.Unpickler):
    """Reads modules as :class:`Module`, and tensors from the archive's files."""

    def __init__(self, pickled: IO[bytes], archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(pickled)
        self._archive, self._root = archive, root
        self._storage = cache(self._read_storage)

    def find_class(self, module: str, name: str) -> Any:
        """The few names that may be read; raises ``UnpicklingError`` for others."""
        if module == "__torch__" or module.startswith("__torch__."):
            return Module
        if module == "torch" and name.endswith("Storage"):
            return name
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("torch.jit._pickle", "restore_type_tag"): _first,
            **{("torch.jit._pickle", f"build_{kind}list"): _first for kind in ("int", "tensor", "double", "bool")},
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """The flat tensor of a storage, ``("storage", type, key, device, length)``."""
        kind, storage, key, _, _ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it holds a {kind}")
        return self._storage(storage, key)

    def _read_storage(self, storage: str, key: str) -> Tensor:
        kinds = {
            "FloatStorage": "float32",
            "HalfStorage": "float16",
            "DoubleStorage": "float64",
            "LongStorage": "int64",
        }
        kinds |= {"BFloat16Storage": "bfloat16", "IntStorage": "int32", "ShortStorage": "int16", "BoolStorage": "bool"}
        kinds |= {"ByteStorage": "uint8", "CharStorage": "int8"}
        dtype: torch.dtype = getattr(torch, kinds[storage])
        content = bytearray(self._archive.read(f"{self._root}/data/{key}"))
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


def _tensor(flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    return flat.as_strided(size, stride, offset)


def _parameter(tensor: Tensor, *_: object) -> Tensor:
    return tensor


def _first(value: object, *_: object) -> object:
    return value
