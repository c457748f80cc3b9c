"""The flags of all jobs: a name of one part's option is a flag, so no two options of a preset may share it."""

import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from tests.jobs.conftest import JOBS


def flags(value: Any) -> Iterator[str]:
    """The options of a dataclass and of the dataclasses in it."""
    for field in fields(value):
        inner = getattr(value, field.name)
        if is_dataclass(inner):
            yield from flags(inner)
        else:
            yield field.name


@pytest.mark.parametrize("name", sorted(path.stem for path in JOBS.glob("*.py")))
def test_every_flag_has_one_meaning(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location(name, JOBS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    for preset, (_, value) in getattr(module, "PRESETS", {}).items():
        twice = [flag for flag, count in Counter(flags(value)).items() if count > 1]
        assert not twice, f"{name} {preset}: {twice}"
