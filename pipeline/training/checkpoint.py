"""Checkpoints: one folder each, complete or invisible.

    {run}/checkpoints/step-00000100/model.safetensors   the weights, under open_clip's names where it has the model
                                    method.safetensors  weights that only the method has, if any
                                    model_ema.safetensors, method_ema.safetensors  the same, averaged over steps, if any
                                    {architecture}.json, open_clip_config.json  what open_clip needs beside them
                                    config.json         the method's name and config
                                    state.pt            the optimiser (plain tensors: loads with weights_only)
                                    meta.json           step, position, seed; written last: the commit mark
                                    evaluation.json     results, added by the follower

A folder without ``meta.json`` is partly written or partly deleted: readers ignore it, and the next start removes it.
The latest checkpoint is found by listing, so no other file must be kept in sync. Copying and writing are separate: a
:class:`Content` is a whole checkpoint in CPU memory, which writer.py writes while training continues.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.config import from_plain, parse_json, require, to_json
from pipeline.errors import DataError, SettingError, StorageError
from pipeline.loaders.cache import FileCache
from pipeline.models.method import Method, config_class, method_class, method_name
from pipeline.models.towers import openclip
from pipeline.models.towers.weights import misfit, read_tensors
from pipeline.shards.manifest import is_file_name
from pipeline.shards.storage import Folder, storage_errors
from pipeline.training import distributed

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
PREFIX = "step-"
MODEL, REST, CONFIG, STATE, META = "model.safetensors", "method.safetensors", "config.json", "state.pt", "meta.json"
MODEL_EMA, REST_EMA = "model_ema.safetensors", "method_ema.safetensors"
EVALUATION = "evaluation.json"
EMA = ":ema"  # suffix of a checkpoint's address: the moving average of its weights
MOST_STEPS = 2**53
INNER = "model."  # prefix, in the method, of the weights in ``model.safetensors``


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The content of ``meta.json``: the number of steps done, and the position in the order of samples.

    ``evaluate`` marks a checkpoint that waits for an evaluation until it has an ``evaluation.json``. ``snapshot`` is
    the digest of the data, ``plan`` that of the epoch's batches where a method plans them. ``skipped_steps`` counts
    steps without a finite loss or gradient, ``skipped_in_row`` the last consecutive ones.
    """

    step: int
    samples_seen: int
    batch_size: int
    lanes: int
    seed: int
    snapshot: str
    plan: str = ""
    evaluate: bool = False
    skipped_steps: int = 0
    skipped_in_row: int = 0
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    description: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("step", "samples_seen", "batch_size", "lanes", "skipped_steps", "skipped_in_row"):
            require(0 <= getattr(self, name) <= MOST_STEPS, name, getattr(self, name), "0 or more")
        for name in self.description:
            require(is_file_name(name), "description", name, "names of files in the checkpoint's folder")


@dataclass(frozen=True, kw_only=True)
class MethodRecord:
    """The content of ``config.json``: the name of the method, and its config as plain values."""

    method: str
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """The content of ``evaluation.json``: the metrics after ``step`` steps, or the ``error`` that prevented them."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Content:
    """A whole checkpoint in CPU memory that is not shared, neither with the training nor between tensors.

    ``weights`` and ``ema`` (their moving average) have the method's own names; ``texts`` are its text files.
    """

    meta: Meta
    weights: Mapping[str, Tensor]
    texts: Mapping[str, str]
    optimizer: Mapping[str, Any] | None = None
    ema: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Folder
    meta: Meta

    @property
    def waits(self) -> bool:
        """Whether it waits for an evaluation."""
        return self.meta.evaluate and not self.folder.exists(EVALUATION)

    @property
    def is_there(self) -> bool:
        """Whether it still exists."""
        return self.folder.exists(META)


class Checkpoints:
    """The checkpoints of the run in the folder ``run``."""

    def __init__(self, run: str | Folder) -> None:
        self.folder = (run if isinstance(run, Folder) else Folder(run)).folder(CHECKPOINTS)

    def at(self, step: int) -> Folder:
        """The folder of the checkpoint after ``step`` steps."""
        return self.folder.folder(f"{PREFIX}{step:08d}")

    def whole(self) -> list[Checkpoint]:
        """All complete checkpoints, oldest first."""
        found = ((folder, read_meta(folder)) for folder in self._folders())
        return [Checkpoint(folder, meta) for folder, meta in found if meta is not None]

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint."""
        for folder in reversed(self._folders()):
            meta = read_meta(folder)
            if meta is not None:
                return Checkpoint(folder, meta)
        return None

    def save(self, method: Method, optimizer: torch.optim.Optimizer, meta: Meta) -> Checkpoint:
        """Write a checkpoint of a method synchronously in this process; raises as :meth:`write`."""
        described, texts = text_files(method)
        meta = replace(meta, description=described)
        state = optimizer.state_dict()
        return self.write(Content(meta=meta, weights=_copies(method.state_dict()), texts=texts, optimizer=state))

    def write(self, content: Content) -> Checkpoint:
        """Write a checkpoint; rank 0 only. After an error, writing it again starts anew.

        Raises:
            StorageError: the disk is full or the store refused; readers do not see the partial checkpoint.
        """
        folder, meta = self.at(content.meta.step), content.meta
        with storage_errors(folder.uri):
            folder.delete(META)
            write_content(folder, content)
        return Checkpoint(folder, meta)

    def remove_broken(self) -> None:
        """Delete what a killed process left partly written or partly deleted."""
        for folder in self._folders():
            if not folder.exists(META):
                logger.warning("removing %s, which is incomplete", folder.uri)
                _remove(folder)

    def prune(
        self, keep: int, keep_waiting: int, *, best: int = 0, metric: str = "", every_steps: int | None = None
    ) -> None:
        """Delete all except the newest ``keep`` checkpoints and those older ones that are kept for a reason.

        Kept are multiples of ``every_steps``, the ``best`` ones by ``metric`` of their evaluation (see :func:`score`),
        and ``keep_waiting`` of those that wait for an evaluation: the oldest, which an evaluation may be reading, and
        the newest of the rest.
        """
        whole = self.whole()
        prized = {one.meta.step for one in best_first(whole, metric)[:best]} if best else set()
        pinned = {one.meta.step for one in whole if every_steps and one.meta.step % every_steps == 0}
        older = [one for one in whole[:-keep] if one.meta.step not in prized | pinned]
        waiting = [checkpoint for checkpoint in older if checkpoint.waits]
        dropped = waiting[1 : 1 + max(0, len(waiting) - keep_waiting)]
        for checkpoint in older:
            if checkpoint in dropped:
                message = "removing %s before it was evaluated: %d older checkpoints wait, and %d may"
                logger.warning(message, checkpoint.folder.uri, len(waiting), keep_waiting)
            if checkpoint in dropped or checkpoint not in waiting:
                _remove(checkpoint.folder)

    def _folders(self) -> list[Folder]:
        fs = self.folder.fs
        fs.invalidate_cache(self.folder.path)
        try:
            entries = fs.ls(self.folder.path, detail=True)
        except FileNotFoundError:
            return []
        names = (entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory")
        return [self.folder.folder(name) for name in sorted(names) if name.startswith(PREFIX)]


def read_meta(folder: Folder) -> Meta | None:
    """The meta data of the checkpoint in ``folder``; ``None`` if the folder is not a complete checkpoint.

    Raises:
        DataError: ``meta.json`` exists but is invalid.
    """
    try:
        content = folder.read_bytes(META)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return from_plain(Meta, parse_json(content), folder.join(META))
    except ValueError as error:
        raise DataError(f"{folder.join(META)} is not the meta data of a checkpoint ({error})") from error


def write_content(folder: Folder, content: Content) -> None:
    """Write all files of a checkpoint, the commit mark last; raises as :meth:`Checkpoints.write`."""
    for average, names in ((content.weights, (MODEL, REST)), (content.ema, (MODEL_EMA, REST_EMA))):
        for name, tensors in zip(names, _split(average or {}), strict=True):
            if tensors:
                # safetensors refuses tensors whose rows are not in order (channels last).
                ordered = {key: tensor.contiguous() for key, tensor in tensors.items()}
                _save_file(folder, name, lambda path, ordered=ordered: save_file(ordered, path))
    if content.optimizer is not None:
        _save_file(folder, STATE, lambda path: torch.save({"optimizer": content.optimizer}, path))
    for name, text in content.texts.items():
        folder.write_atomic(name, text.encode())
    folder.write_atomic(META, json.dumps(asdict(content.meta), indent=2).encode())


def text_files(method: Method) -> tuple[tuple[str, ...], dict[str, str]]:
    """The names of the method's description files, and all text files of its checkpoint: these and its config."""
    description = dict(method.description())
    return tuple(sorted(description)), {**description, CONFIG: _config_text(method)}


def score(checkpoint: Checkpoint, metric: str) -> float | None:
    """``metric`` of its evaluation, higher is better; ``None`` if it has no such number.

    A minus before the name means that lower is better: ``-zeroshot/drawn_shapes/calibration_error``.
    """
    sign, name = (-1.0, metric[1:]) if metric.startswith("-") else (1.0, metric)
    evaluation = read_evaluation(checkpoint)
    value = evaluation.metrics.get(name) if evaluation else None
    return sign * value if value is not None and math.isfinite(value) else None


def stored_score(uri: str, metric: str) -> float | None:
    """:func:`score` of the checkpoint at an address; ``None`` for a moving average, which is not what was evaluated."""
    folder = None if uri.endswith(EMA) else checkpoint_folder(uri)
    meta = read_meta(folder) if folder else None
    return score(Checkpoint(folder, meta), metric) if folder and meta else None


def best_first(checkpoints: Iterable[Checkpoint], metric: str) -> list[Checkpoint]:
    """The checkpoints with ``metric``, sorted best first; at ties the newer first."""
    scored = [(score(one, metric), one.meta.step, one) for one in checkpoints]
    known = [(value, step, one) for value, step, one in scored if value is not None]
    return [one for _, _, one in sorted(known, key=lambda entry: entry[:2], reverse=True)]


def load_method(uri: str, device: torch.device | str = "cpu", *, ema: bool = False) -> Method:
    """A method in evaluation mode; with ``ema``, the moving average of its weights.

    ``uri`` is a checkpoint's folder, a run's folder (its latest checkpoint), or ``architecture:weights`` for CLIP,
    where weights are an open_clip tag or a file: ``ViT-B-32:laion2b_s34b_b79k``. ``FOLDER:ema`` also selects the
    average.

    Raises:
        SettingError: none of these, or it has no average.
        DataError: a checkpoint that is damaged.
    """
    folder, ema = checkpoint_folder(uri), ema or uri.endswith(EMA)
    require(not ema or bool(folder and folder.exists(MODEL_EMA)), "ema", ema, f"False, since {uri} has no {MODEL_EMA}")
    method = _from_checkpoint(folder, ema) if folder else _from_open_clip(uri)
    return method.to(device).eval()


def checkpoint_folder(uri: str) -> Folder | None:
    """The checkpoint at ``uri``, or the latest one of the run there; ``None`` if there is neither."""
    folder = Folder(uri.removesuffix(EMA))
    if folder.is_local and Path(str(folder.path)).is_file():
        return None
    if folder.exists(META):
        return folder
    latest = Checkpoints(folder).latest()
    return latest.folder if latest else None


def resolved(address: str) -> str:
    """The folder of the checkpoint at an address, for a run its latest one; else the address itself.

    ``FOLDER:ema`` becomes the file of the averaged weights; raises ``SettingError`` if there is none.
    """
    folder = checkpoint_folder(address) if address else None
    if folder is None or not address.endswith(EMA):
        return folder.uri if folder else address
    require(folder.exists(MODEL_EMA), "ema", address, f"an address without {EMA}, since there is no {MODEL_EMA}")
    return folder.join(MODEL_EMA)


def clip_address(address: str) -> str:
    """``ARCHITECTURE:PLACE`` for the checkpoint of a CLIP at an address, the form of teachers' addresses.

    The place is that of :func:`resolved`. Other addresses are returned unchanged.
    """
    folder = checkpoint_folder(address) if address else None
    if folder is None:
        return address
    return f"{_read_method(folder).config.get('architecture', '')}:{resolved(address)}"


def network_address(address: str) -> str:
    """The address of a feature network: :func:`clip_address` of a CLIP's; those of timm are returned unchanged."""
    return address if address.startswith("timm:") else clip_address(address)


def read_weights(folder: Folder, *, ema: bool = False) -> dict[str, Tensor]:
    """All weights of a checkpoint on the CPU, or their moving average, by the method's names; empty if it has none.

    Raises:
        DataError: a damaged file.
    """
    inner, rest = (MODEL_EMA, REST_EMA) if ema else (MODEL, REST)
    weights = {INNER + name: tensor for name, tensor in _read_tensors(folder, inner).items()}
    others = _read_tensors(folder, rest)
    return weights | (_renamed(others, method_class(_read_method(folder).method)) if others else {})


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Folder) -> None:
    """Load the state in ``folder`` into ``optimizer``; unpickles nothing.

    Raises:
        DataError: the state is missing, damaged, or of another optimiser.
    """
    try:
        state = torch.load(BytesIO(folder.read_bytes(STATE)), map_location="cpu", weights_only=True)
        optimizer.load_state_dict(_divided(state["optimizer"], optimizer))
        _lay_out(optimizer)
    except UnpicklingError as error:
        raise DataError(f"{folder.join(STATE)} holds more than plain tensors and is not loaded") from error
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{folder.join(STATE)} cannot be read ({_first_line(error)})") from error


def _divided(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state split like its parameters: this rank's part if they are sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def part(number: int, value: Any) -> Any:
        parameter = parameters[number] if number < len(parameters) else None
        if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
            return distributed.like(value, parameter)
        return value

    entries = state["state"].items()
    return {**state, "state": {number: {key: part(number, one[key]) for key in one} for number, one in entries}}


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give the state its parameters' memory format: fused optimisers step through both alike, without checks."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def write_evaluation(checkpoint: Checkpoint, evaluation: EvaluationRecord) -> None:
    """Write ``evaluation.json``; the checkpoint then no longer waits."""
    checkpoint.folder.write_atomic(EVALUATION, to_json(evaluation).encode())


def read_evaluation(checkpoint: Checkpoint) -> EvaluationRecord | None:
    """The content of ``evaluation.json``, or ``None``.

    Raises:
        DataError: the file is no evaluation.
    """
    place = checkpoint.folder.join(EVALUATION)
    try:
        return from_plain(EvaluationRecord, parse_json(checkpoint.folder.read_bytes(EVALUATION)), place)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{place} is not the result of an evaluation ({error}); delete it to evaluate again") from error


def _read_method(folder: Folder) -> MethodRecord:
    try:
        return from_plain(MethodRecord, parse_json(folder.read_bytes(CONFIG)), folder.join(CONFIG))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder.join(CONFIG)} does not describe a method ({error})") from error


def _from_checkpoint(folder: Folder, ema: bool) -> Method:
    meta = read_meta(folder)
    assert meta is not None
    record = _read_method(folder)
    try:
        description = {name: _described(folder, name) for name in meta.description}
        config = from_plain(config_class(record.method), record.config, folder.join(CONFIG))
        method = method_class(record.method).restored(config, description)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # of values of any kind
        raise DataError(f"{folder.uri} is not a complete checkpoint ({error})") from error
    inner, rest = (MODEL_EMA, REST_EMA) if ema else (MODEL, REST)
    if isinstance(model := getattr(method, "model", None), nn.Module):
        _load(model, load_tensors(folder, inner), folder.join(inner))
    if folder.exists(rest):
        _load(method, _renamed(load_tensors(folder, rest), type(method)), folder.join(rest), elsewhere=INNER)
    return method


def _described(folder: Folder, name: str) -> str:
    """A text file of a checkpoint; raises ``ValueError`` for a JSON file that holds no object."""
    text = folder.read_text(name)
    if name.endswith(".json") and not isinstance(parse_json(text), dict):
        raise ValueError(f"{name} holds no JSON object")
    return text


def _from_open_clip(uri: str) -> Method:
    found = openclip.parse_address(uri)
    if found is None:
        allowed = "a checkpoint's folder, a run's folder, or ARCHITECTURE:WEIGHTS such as ViT-B-32:laion2b_s34b_b79k"
        raise SettingError("checkpoint", uri, allowed)
    plain = {"architecture": found[0], "pretrained": found[1]}
    return method_class("clip")(from_plain(config_class("clip"), plain))


def _renamed(weights: Mapping[str, Tensor], method: type[Method]) -> dict[str, Tensor]:
    """The weights of older checkpoints under today's names."""
    return {method.former_names.get(name, name): tensor for name, tensor in weights.items()}


def _load(module: nn.Module, tensors: Mapping[str, Tensor], place: str, elsewhere: str | None = None) -> None:
    """Load the weights of the file ``place``; names with the prefix ``elsewhere`` come from another file."""
    wanted = module.state_dict()
    if elsewhere is not None:
        wanted = {key: tensor for key, tensor in wanted.items() if not key.startswith(elsewhere)}
    problem = misfit(wanted, tensors)
    if problem:
        raise DataError(f"{place} does not fit the checkpoint's own config: {problem}")
    module.load_state_dict(tensors, strict=elsewhere is None)


def _config_text(method: Method) -> str:
    config = json.loads(to_json(method.config))
    return json.dumps({"method": method_name(method.config), "config": config}, indent=2)


def load_tensors(folder: Folder, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; raises ``DataError`` if it is damaged or missing."""
    try:
        return read_tensors(FileCache().fetch(folder, name))
    except OSError as error:
        raise DataError(f"{folder.join(name)} cannot be read ({_first_line(error)})") from error


def _read_tensors(folder: Folder, name: str) -> dict[str, Tensor]:
    return load_tensors(folder, name) if folder.exists(name) else {}


def _split(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of ``method.model`` under its own names, and the others."""
    inner = {name.removeprefix(INNER): tensor for name, tensor in weights.items() if name.startswith(INNER)}
    return inner, {name: tensor for name, tensor in weights.items() if not name.startswith(INNER)}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Tied weights are written twice, because safetensors refuses tensors that share memory.
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _save_file(folder: Folder, name: str, save: Any) -> None:
    with folder.scratch_file(Path(name).suffix) as path, storage_errors(folder.join(name)):
        try:
            save(path)
        except (SafetensorError, RuntimeError) as error:  # raised by both libraries for a failed write
            raise StorageError(f"cannot write {folder.join(name)}: {_first_line(error)}") from error
        folder.write_atomic(name, path)


def _remove(folder: Folder) -> None:
    folder.delete(META)  # first, so that a kill in between leaves no checkpoint that looks complete
    folder.fs.rm(folder.path, recursive=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def check_position(checkpoint: Checkpoint, *, batch_size: int, lanes: int, seed: int, snapshot: str) -> None:
    """Raise ``SettingError`` unless a run with these settings can resume from ``checkpoint``.

    Its position counts samples in an order that depends on all of them.
    """
    meta = checkpoint.meta
    wanted = {"batch_size": batch_size, "lanes": lanes, "seed": seed, "snapshot": snapshot}
    for name, value in wanted.items():
        saved = getattr(meta, name)
        require(saved == value, name, value, f"{saved}, the value of {checkpoint.folder.uri}")
