"""Sources of raw rows: url tables, folders of images, WebDataset tars, split files, COCO and LVIS annotations, the
drawn world, the Tux Paint stamps and scenes of them.

Each source is one frozen dataclass, found by name: its ``kind`` is the name of its module, with ``_`` for ``-``. Where
the module is a package, the class is in its module ``source``. A dataset card names a source by ``kind``.
"""

import dataclasses
import pkgutil
import re
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

from pipeline.config import from_plain, require
from pipeline.sources.source import Source

KIND = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def open_source(options: Mapping[str, Any]) -> Source:
    """The source described by a card's ``source`` mapping: its ``kind`` and the options of that source.

    Raises:
        SettingError: an unknown kind, an unknown option, or an invalid value.
    """
    kind = str(options.get("kind"))
    source = source_class(kind)
    plain = {key: value for key, value in options.items() if key != "kind"}
    return from_plain(source, plain, f"source {kind}")


def source_class(kind: str) -> type[Source]:
    """The class of a kind of source. Imports only its own module: reading a url table loads no drawing code.

    Raises:
        SettingError: an unknown kind.
    """
    found = _class_of(kind)
    if found is None:
        require(False, "source.kind", kind, "one of " + ", ".join(source_classes()))
    assert found is not None
    return found


def source_classes() -> dict[str, type[Source]]:
    """All source classes by kind, sorted; imports all of them."""
    kinds = sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))
    found = {kind: _class_of(kind) for kind in kinds}
    return {kind: source for kind, source in found.items() if source is not None}


def _class_of(kind: str) -> type[Source] | None:
    """``None`` where there is no such module, or the module is a helper without a class of that kind."""
    if not KIND.fullmatch(kind):
        return None
    name = f"{__name__}.{kind.replace('-', '_')}"
    spec = find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        name += ".source"
        if find_spec(name) is None:
            return None
    for value in vars(import_module(name)).values():
        own = isinstance(value, type) and value.__module__ == name
        if own and dataclasses.is_dataclass(value) and getattr(value, "kind", None) == kind:
            return cast(type[Source], value)
    return None
