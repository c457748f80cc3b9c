"""Weights in files, and their digest, which identifies a model to the last bit.

Files of weights come from strangers: nothing in them is run. A pickle gives its tensors. Every other object in it
(numpy's numbers, an ``argparse.Namespace``, the modules of a whole model) becomes an object without behaviour.
"""

import hashlib
import json
import pickletools
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import DataError
from pipeline.models.towers.torch_script import is_torch_script, read_script_tensors

STATES = ("state_dict", "model_state_dict", "model", "module", "net", "weights")
"""Keys under which training scripts save a model's weights; the first one that a file has is read."""
_WRAPPERS = ("module", "_orig_mod", "model", "clip")  # DistributedDataParallel, torch.compile, Lightning
_LEGACY_PICKLES = 5  # in a file of torch before 1.6: magic number, version, machine, the object, keys of the tensors
_NAMED = 3  # tensors that an error names


def add_weights(digest: Any, state: Mapping[str, Tensor]) -> None:
    """Feed names, types, shapes and bytes of all tensors into a hashlib ``digest``, in the order of their names."""
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(memoryview(plain))


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 hex of all tensors by name."""
    digest = hashlib.sha256()
    add_weights(digest, state)
    return digest.hexdigest()


def digest_of(model: object, *settings: str) -> str:
    """SHA-256 hex of all weights and buffers by name, of the tokenizer's kind if there is one, and of ``settings``."""
    digest = hashlib.sha256(repr([type(getattr(model, "tokenizer", None)).__name__, *settings]).encode())
    state = model.state_dict() if isinstance(model, nn.Module) else {}
    add_weights(digest, state)
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; raises ``DataError`` if it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error


def read_any_weights(path: Path, name: str = "") -> dict[str, Tensor]:
    """The tensors by name, on the CPU, of a file of any training script: safetensors, or what ``torch.save`` or
    ``torch.jit.save`` wrote.

    The kind is that of the bytes, whatever the file is called. The tensors may be those of a whole pickled model, or
    be below one of the keys :data:`STATES`. Prefixes that all names share are removed (``module.``). ``name`` is the
    file's name in errors, by default its path.

    Raises:
        DataError: another kind of file, a damaged one, or one without tensors; the sentence says what was found.
    """
    name = name or str(path)
    try:
        if _is_safetensors(path):
            return _unwrapped(read_tensors(path))
        if is_torch_script(path):
            return _unwrapped(read_script_tensors(path))
        return _unwrapped(_state_of(_unpickled(path), name))
    except DataError as error:
        found = _kind_of(path)
        if not found:
            raise
        raise DataError(f"{name} holds no weights that can be read: it is {found}") from error
    except Exception as error:  # torch raises nearly anything for bytes that are not its own
        found = _kind_of(path) or f"damaged, or not of torch.save ({_first_line(error)})"
        raise DataError(f"{name} holds no weights that can be read: it is {found}") from error


def is_numpy_archive(path: Path) -> bool:
    """Whether the file is one of ``numpy.savez``, as big_vision publishes weights."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def misfit(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """How the weights ``found`` differ from those ``wanted``, by names and shapes; empty where all fit."""
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    both = [(name, wanted[name].shape, found[name].shape) for name in wanted if name in found]
    shapes = [f"{name} {_shape(have)} instead of {_shape(want)}" for name, want, have in both if want != have]
    parts = [
        f"{len(some)} {what} ({', '.join(some[:_NAMED])}{', …' if len(some) > _NAMED else ''})"
        for some, what in ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape"))
        if some
    ]
    return f"{len(found)} tensors, {', '.join(parts)}" if parts else ""


class _InertObject:
    """An object of a pickle that is no tensor: keeps its state and has no behaviour."""

    state: Any = None

    def __new__(cls, *_: object, **__: object) -> "_InertObject":
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


def _unpickled(path: Path) -> Any:
    """The content of a file of ``torch.save``, with every object of another class as an :class:`_InertObject`."""
    inert: list[Any] = [(_InertObject, name) for name in _classes_in(path)]
    # torch warns about its older formats and about sparse or quantised tensors; all are read.
    with torch.serialization.safe_globals(inert), warnings.catch_warnings(action="ignore"):
        return torch.load(path, map_location="cpu", weights_only=True)


def _classes_in(path: Path) -> set[str]:
    """The full names of the classes and functions that a file of ``torch.save`` names; runs nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return _names(archive.read(name) for name in pickles)
    with open(path, "rb") as file:
        return _names([file] * _LEGACY_PICKLES)


def _names(pickles: Iterable[Any]) -> set[str]:
    """Names in several pickles; the same open file several times holds one after another."""
    operations = (operation for pickle in pickles for operation in pickletools.genops(pickle))
    return {str(argument).replace(" ", ".") for kind, argument, _ in operations if kind.name == "GLOBAL"}


def _state_of(content: Any, name: str) -> dict[str, Tensor]:
    """The named tensors of a file's content."""
    own = _tensors(content)
    inside = {key: _tensors(value) for key, value in content.items()} if isinstance(content, Mapping) else {}
    parts = {str(key): tensors for key, tensors in inside.items() if tensors}
    for key in STATES:
        if key in parts:
            return parts[key]
    if own or len(parts) == 1:
        return own or next(iter(parts.values()))
    if parts:
        raise DataError(f"{name} has weights below {', '.join(parts)}: save those of one model as state_dict")
    keys = f" of {', '.join(map(str, [*content][:5])) or 'nothing'}" if isinstance(content, Mapping) else ""
    kind = "an object" if isinstance(content, _InertObject) else f"a {type(content).__name__}"
    raise DataError(f"{name} holds no named tensors, but {kind}{keys}")


def _tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, or of a whole pickled model by the names of its state dict."""
    if isinstance(content, _InertObject):
        return _module_tensors(content, "")
    if not isinstance(content, Mapping):
        return {}
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _module_tensors(module: _InertObject, prefix: str) -> dict[str, Tensor]:
    if not (isinstance(module.state, Mapping) and isinstance(module.state.get("_parameters"), Mapping)):
        return {}
    state = module.state
    skipped = state.get("_non_persistent_buffers_set", ())
    buffers = {name: value for name, value in state.get("_buffers", {}).items() if name not in skipped}
    found = {
        f"{prefix}{name}": value for name, value in {**state["_parameters"], **buffers}.items() if value is not None
    }
    for name, child in state.get("_modules", {}).items():
        if isinstance(child, _InertObject):
            found |= _module_tensors(child, f"{prefix}{name}.")
    return {name: tensor.detach() for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that all names share."""
    while state:
        prefix = next(iter(state)).partition(".")[0]
        if prefix not in _WRAPPERS or not all(name.startswith(f"{prefix}.") for name in state):
            break
        state = {name.removeprefix(f"{prefix}."): tensor for name, tensor in state.items()}
    return state


def _is_safetensors(path: Path) -> bool:
    """By its first bytes: the length of a JSON header, and its brace."""
    with open(path, "rb") as file:
        begin = file.read(9)
    return len(begin) == 9 and begin[8:] == b"{" and begin[:2] != b"PK"


def _kind_of(path: Path) -> str:
    """What a file is that cannot be read as weights, from its first bytes; empty if they do not show it."""
    with open(path, "rb") as file:
        begin = file.read(4096)
    size, text = path.stat().st_size, begin.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if not begin:
        return "an empty file"
    if text.startswith("<"):
        return f"a web page or XML ({text[:40]!r}): the download did not give the file"
    if text.startswith("version https://git-lfs"):
        return "a pointer of Git LFS: fetch the file with `git lfs pull`"
    if _is_safetensors(path):
        return _safetensors_kind(path, size)
    if begin.startswith(b"\x93NUMPY"):
        return "a single array of numpy"
    if begin.startswith(b"PK"):
        return _archive_kind(path, size)
    if "\ufffd" not in text and text.isprintable():
        return f"text ({text[:40]!r})"
    return ""


def _safetensors_kind(path: Path, size: int) -> str:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, size))
    try:
        ends = [int(one["data_offsets"][1]) for name, one in json.loads(header).items() if name != "__metadata__"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"a damaged safetensors file, or one cut short, of {size} bytes"
    return f"a safetensors file of {size} bytes, which should have {8 + length + max(ends, default=0)}"


def _archive_kind(path: Path, size: int) -> str:
    """Of a file that begins as a zip archive does; empty for one of ``torch.save``."""
    if not zipfile.is_zipfile(path):
        return f"a file of torch.save that was cut short, at {size} bytes"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return "" if any(name.endswith("/data.pkl") for name in names) else f"a zip archive of {', '.join(names[:3])}"


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _first_line(error: BaseException) -> str:
    parts = [part.strip() for part in str(error).split("\n\n") if part.strip()] or [type(error).__name__]
    said = (
        parts[1] if parts[0].startswith("Weights only load failed") and len(parts) > 1 else parts[0]
    )  # not the advice
    return said.splitlines()[0][:200]
