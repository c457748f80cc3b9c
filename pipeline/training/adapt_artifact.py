"""The result of an adaptation: a small folder without code and without CLIP's weights.

adapter.safetensors   the learned tensors (a context, an adapter, a cache, a probe)
words.tsv             the words nearest to learned context vectors, where there are some
config.json           method, config, recipe, seed, classes, templates, choices, history, CLIP's digest; written last
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from pipeline.config import from_plain, parse_json, require
from pipeline.errors import DataError
from pipeline.models.adapters.adapter import Adapter, FrozenClip, adapter_class
from pipeline.models.adapters.prompts import nearest_words
from pipeline.shards.storage import Folder, storage_errors
from pipeline.training.adapt import Adapted
from pipeline.training.adapt_recipes import AdaptRecipe

TENSORS, WORDS, CONFIG = "adapter.safetensors", "words.tsv", "config.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """The content of ``config.json``."""

    method: str
    config: dict[str, Any]
    recipe: dict[str, Any] | None
    seed: int
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    chosen: dict[str, float]
    history: tuple[dict[str, float], ...]
    clip: str
    about: dict[str, str]
    version: int = VERSION


def save(adapted: Adapted, folder: Folder, about: Mapping[str, str] | None = None) -> None:
    """Write ``adapted`` into ``folder``; overwrites an existing one.

    ``about`` may describe the origin: the checkpoint of CLIP, the data set, the digest of its split.

    Raises:
        StorageError: the folder cannot be written.
    """
    adapter = adapted.adapter
    record = AdapterRecord(
        method=adapted.method,
        config=asdict(adapted.config),
        recipe=None if adapted.recipe is None else asdict(adapted.recipe),
        seed=adapted.seed,
        classes=adapter.learned_classes,
        templates=adapter.templates,
        chosen=dict(adapted.chosen),
        history=tuple(dict(numbers) for numbers in adapted.history),
        clip=adapter.clip.digest,
        about=dict(about or {}),
    )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.state_dict().items()}
    folder.delete(CONFIG)
    with folder.scratch_file(".safetensors") as path, storage_errors(folder.uri):
        save_file(tensors, path)
        folder.write_atomic(TENSORS, path)
    words = words_table(adapter)
    if words:
        folder.write_atomic(WORDS, words.encode())
    folder.write_atomic(CONFIG, json.dumps(asdict(record), indent=2).encode())


def load_adapted(
    folder: Folder, clip: FrozenClip, classes: Sequence[str] | None = None, templates: Sequence[str] | None = None
) -> Adapted:
    """Load the result of :func:`save` with the same CLIP, for its own classes or for others.

    Raises:
        DataError: no such folder, damaged files, or another CLIP.
        SettingError: other classes, for a method that is bound to its training classes.
    """
    record = read_record(folder)
    if record.clip != clip.digest:
        own, other = record.clip[:12], clip.digest[:12]
        raise DataError(f"{folder.uri} was learned around the CLIP {own}, and this one is {other}; load that one")
    kind = adapter_class(record.method)
    origin = folder.join(CONFIG)
    config = from_plain(import_module(kind.__module__).Config, record.config, origin)
    recipe = None if record.recipe is None else from_plain(AdaptRecipe, record.recipe, origin)
    adapter = kind(config, clip, record.classes, record.templates)
    adapter.restore(_tensors(folder, clip.device))
    if classes is not None or templates is not None:
        names = record.classes if classes is None else classes
        adapter.bind(names, record.templates if templates is None else templates)
    return Adapted(record.method, config, recipe, record.seed, adapter.eval(), record.chosen, record.history)


def read_record(folder: Folder) -> AdapterRecord:
    """The record of the adapter in ``folder``; raises ``DataError`` if it is missing or damaged."""
    try:
        record = from_plain(AdapterRecord, parse_json(folder.read_bytes(CONFIG)), folder.join(CONFIG))
        require(record.version == VERSION, "version", record.version, f"{VERSION}, which this clipmill reads")
    except FileNotFoundError as error:
        raise DataError(f"{folder.uri} holds no adapter: it has no {CONFIG}") from error
    except ValueError as error:
        raise DataError(f"{folder.join(CONFIG)} does not describe an adapter ({error})") from error
    return record


def words_table(adapter: Adapter, count: int = 3) -> str:
    """Tab-separated: class (if class-specific), number of the vector, then words and distances, nearest first.

    Empty for methods without a context of word embeddings.
    """
    context, tower = getattr(adapter, "context", None), getattr(adapter, "tower", None)
    if context is None or tower is None:
        return ""
    lines = ["\t".join(["class", "vector", *(f"word_{n}\tdistance_{n}" for n in range(1, count + 1))])]
    specific = context.ndim == 3
    parts = zip(adapter.learned_classes, context, strict=True) if specific else [("", context)]
    for name, rows in parts:
        for number, words in enumerate(nearest_words(tower, rows.detach(), count), start=1):
            lines.append("\t".join([name, str(number), *(f"{word}\t{far:.4f}" for word, far in words)]))
    return "\n".join(lines) + "\n"


def _tensors(folder: Folder, device: torch.device) -> dict[str, Tensor]:
    try:
        return {name: tensor.to(device) for name, tensor in load(folder.read_bytes(TENSORS)).items()}
    except FileNotFoundError as error:
        raise DataError(f"{folder.join(TENSORS)} is missing") from error
    except SafetensorError as error:
        raise DataError(f"{folder.join(TENSORS)} is damaged: {error}") from error
