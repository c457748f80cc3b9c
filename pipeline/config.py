"""Configs are frozen dataclasses; this module converts them: command line, JSON, YAML, MLflow, fingerprint.

A job calls :func:`run_job` with its presets. Every preset is a sub-command, every field a flag. The resolved config is
written as JSON beside the job's output; ``--from run.json`` instead of a preset runs it again.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.errors import ClipmillError, SettingError

Config = TypeVar("Config")
Scalar = str | int | float | bool | None
DEEPEST = 100  # lists and objects of JSON inside one another


def require(ok: bool, field: str, value: object, allowed: str) -> None:
    """Raise :class:`SettingError` unless ``ok``; ``allowed`` describes the allowed values."""
    if not ok:
        raise SettingError(field, value, allowed)


def flatten(config: Any, prefix: str = "") -> dict[str, Scalar]:
    """``{"optimizer.lr": 0.001, ...}`` from nested dataclasses; sequences and mappings become JSON text."""
    flat: dict[str, Scalar] = {}
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, name + "."))
        elif value is None or isinstance(value, str | int | float | bool):
            flat[name] = value
        else:
            flat[name] = json.dumps(_plain(value))
    return flat


def parse_json(text: str | bytes) -> Any:
    """The value of JSON text; raises ``ValueError`` for other text, and for lists or objects deeper than 100.

    Readers of files that others may have written use this: ``json.loads`` raises ``RecursionError`` for deep nesting.
    """
    try:
        plain = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    level, depth = [plain], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise ValueError("nested too deep")
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
    return plain


def to_json(config: Any) -> str:
    """The config as JSON text; :func:`from_json` converts it back to an equal config."""
    return json.dumps(_plain(config), indent=2) + "\n"


def from_json(kind: type[Config], text: str, origin: str = "config") -> Config:
    """Read ``text`` as a ``kind``.

    Raises:
        SettingError: not JSON, an unknown key, a wrong type or an invalid value; the message names its path.
    """
    try:
        plain = parse_json(text)
    except ValueError as error:
        raise SettingError(origin, text[:80], f"JSON ({error})") from error
    return from_plain(kind, plain, origin)


def from_yaml(kind: type[Config], path: str | Path) -> Config:
    """Read a YAML file as a ``kind``; raises :class:`SettingError` as :func:`from_json` does."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError("file", str(path), f"a readable YAML file ({error})") from error
    try:
        plain = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingError("file", str(path), f"well-formed YAML ({' '.join(str(error).split())})") from error
    return from_plain(kind, plain, str(path))


def from_plain(kind: type[Config], plain: object, origin: str = "config") -> Config:
    """Validate plain Python values (as from JSON) against the dataclass ``kind``; extra keys are refused."""
    try:
        return _adapter(kind).validate_python(plain, strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"]) or origin
        allowed = str(first["msg"])
        if first["type"] == "unexpected_keyword_argument" and dataclasses.is_dataclass(kind):
            allowed = "one of " + ", ".join(sorted(field.name for field in dataclasses.fields(kind)))
        raise SettingError(f"{origin}: {path}", first["input"], allowed) from error


def fingerprint(config: Any, exclude: Iterable[str] = ()) -> str:
    """SHA-256 hex of the config without the flattened names in ``exclude`` (or anything below them)."""
    left_out = tuple(exclude)
    kept = {
        name: value
        for name, value in flatten(config).items()
        if not any(name == out or name.startswith(out + ".") for out in left_out)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def run_job(presets: Mapping[str, tuple[str, Any]], main: Callable[[Any], None]) -> None:
    """The command line of a job: ``PRESET [--flags]`` or ``--from run.json``, then ``main(config)``.

    Errors that a user can fix are one sentence on stderr: exit code 2 for a setting, 1 for data and storage.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # `ray job stop` sends TERM: as an exception it lets the job close its MLflow run and stop what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        main(_parse(dict(presets), sys.argv[1:]))
    except SettingError as error:
        _stop(error, code=2)
    except ClipmillError as error:
        _stop(error, code=1)


def writable_folder(field: str, value: str) -> str:
    """``value`` as an absolute path or URI for output.

    A job of ``ray job submit`` runs in a temporary copy of the working directory, so results in a relative folder would
    be lost.

    Raises:
        SettingError: empty, or relative inside a Ray job.
    """
    require(bool(value), field, value, "a folder or an fsspec URI such as s3://bucket/path")
    if "://" in value:
        return value
    inside_ray_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    path = Path(value).expanduser()
    require(
        path.is_absolute() or not inside_ray_job,
        field,
        value,
        "an absolute path or a URI (a Ray job's working directory vanishes when the job ends)",
    )
    return str(path.absolute())


def _parse(presets: dict[str, tuple[str, Any]], arguments: list[str]) -> Any:
    if arguments and arguments[0] == "--from":
        return _from_file(presets, arguments[1:])
    # tyro takes 0.9 s to import, which workers that only read configs avoid.
    import tyro

    wanted = arguments[0] if arguments else ""
    if wanted and not wanted.startswith("-") and wanted not in presets:
        raise SettingError("preset", wanted, "one of " + ", ".join(presets))
    program = Path(sys.argv[0]).name
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.overridable_config_cli(
                presets,
                prog=program,
                args=arguments,
                # For a field of several dataclass types, the preset selects the type.
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as stopped:
        # tyro prints a dataclass's error in a box; our messages are one sentence.
        own = _setting_error(stopped)
        if own is not None:
            raise own from None
        sys.stderr.write(said.getvalue())
        raise


def _setting_error(error: BaseException | None) -> SettingError | None:
    while error is not None and not isinstance(error, SettingError):
        error = error.__cause__ or error.__context__
    return error


def _from_file(presets: dict[str, tuple[str, Any]], arguments: list[str]) -> Any:
    require(
        len(arguments) == 1,
        "--from",
        " ".join(arguments),
        "exactly one JSON file that an earlier run wrote",
    )
    try:
        plain = parse_json(Path(arguments[0]).read_bytes())
    except (OSError, ValueError) as error:
        raise SettingError("--from", arguments[0], f"a readable JSON file ({error})") from error
    kinds = {type(config) for _, config in presets.values()}
    problem: SettingError | None = None
    for kind in kinds:
        try:
            return from_plain(kind, plain, arguments[0])
        except SettingError as error:
            problem = error
    raise problem or SettingError("--from", arguments[0], "a config of this job")


def _adapter(kind: type[Config]) -> "TypeAdapter[Config]":
    _forbid_extra_keys(kind)
    return TypeAdapter(kind)


def _forbid_extra_keys(kind: Any) -> None:
    if not dataclasses.is_dataclass(kind) or "__pydantic_config__" in vars(kind):
        return
    cast(Any, kind).__pydantic_config__ = ConfigDict(extra="forbid")
    for inner in getattr(kind, "__annotations__", {}).values():
        for part in (inner, *getattr(inner, "__args__", ())):
            _forbid_extra_keys(part)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _stop(error: ClipmillError, code: Literal[1, 2]) -> None:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(code)
