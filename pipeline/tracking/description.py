"""How a run is called in MLflow, and its description: what is trained, on what, by which command, with what result."""

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import chosen_preset, differences
from pipeline.shards.privacy import masked, masked_value

NOTE = "mlflow.note.content"
LONGEST_COMMAND = 1500
MODELS = ("method.architecture", "method.backbone", "checkpoint", "model", "teacher")
DATA = ("run.data", "data")


def run_title(config: Any) -> str:
    """``clip demo clipmill-small drawn``: the method (else the job), the preset, the model and the data it has."""
    preset = chosen_preset()
    words = (what_runs(config), preset[0] if preset else "", _short(_first(config, MODELS)), _short(data_of(config)))
    return " ".join(filter(None, words))


def what_runs(config: Any) -> str:
    """The name of the method that ``config`` trains, else of the job."""
    method = getattr(config, "method", None)
    if dataclasses.is_dataclass(method):
        return type(method).__module__.rpartition(".")[2]
    return Path(sys.argv[0] or "python").stem


def data_of(config: Any) -> str:
    """The data setting, or the number of drawn samples that replace it."""
    drawn = getattr(config, "draw", 0)
    return _first(config, DATA) or (f"{drawn}-drawn" if drawn else "")


def preset_tags(config: Any) -> dict[str, str]:
    """Tags ``preset`` and, if flags changed some of its settings, ``differs_from_preset``."""
    preset = chosen_preset()
    if preset is None or not isinstance(config, type(preset[1])):
        return {}
    changed = {
        name: masked_value(name, value)
        for name, value in differences(config, preset[1]).items()
        if "tracking" not in name.split(".")
    }
    tags = {"preset": preset[0]}
    if changed:
        tags["differs_from_preset"] = ", ".join(f"{name}={value}" for name, value in sorted(changed.items()))
    return tags


def description(config: Any, program: str, tags: Mapping[str, str]) -> str:
    """Markdown: what is trained on what, the changed settings, and the command."""
    model, data = _first(config, MODELS), data_of(config)
    about = [f"**{what_runs(config)}**"]
    about += [f"preset `{tags['preset']}`"] if "preset" in tags else []
    about += [f"model `{masked(model)}`"] if model else []
    about += [f"data `{masked(data)}`"] if data else []
    parts = [", ".join(about)]
    if "differs_from_preset" in tags:
        parts.append(f"Differs from the preset: `{tags['differs_from_preset'][:LONGEST_COMMAND]}`")
    command = masked(shlex.join([program, *sys.argv[1:]]))[:LONGEST_COMMAND]
    return "\n\n".join([*parts, f"```\n{command}\n```"])


def result(table: str, artifacts: str, checkpoint: str) -> str:
    """Markdown: the final table, and where figures and checkpoint are."""
    parts = [f"```\n{table}\n```"] if table else []
    parts.append(f"[Figures]({artifacts}/figures), [settings]({artifacts}/config.json)")
    return "\n\n".join([*parts, *([f"Checkpoint: `{masked(checkpoint)}`"] if checkpoint else [])])


def _first(config: Any, names: tuple[str, ...]) -> str:
    """The first setting among ``names`` that exists and is not empty; several values are joined."""
    for name in names:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part, None)
        if value and isinstance(value, str | tuple):
            return value if isinstance(value, str) else ",".join(map(str, value))
    return ""


def _short(addresses: str) -> str:
    """The last parts of paths and URIs, without snapshot and weight: ``/data/drawn@00000-ab=0.5`` is ``drawn``."""
    return ",".join(
        one.partition("@")[0].partition("=")[0].rstrip("/").rpartition("/")[2] for one in addresses.split(",")
    )
