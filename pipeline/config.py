"""Configs are frozen dataclasses; this module converts them: command line, JSON, YAML, MLflow, fingerprint.

A job calls :func:`run_job` with its presets. Every preset is a sub-command, every field a flag. The resolved config is
written as JSON beside the job's output; ``--from run.json`` instead of a preset runs it again. The class variable
``moved_keys`` of a job's config maps keys of older files to their present places, as
``{"options.images": "options.media.image"}``.
"""

import contextlib
import copy
import dataclasses
import difflib
import hashlib
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.errors import ClipmillError, DataError, SettingError, unreadable

Config = TypeVar("Config")
Scalar = str | int | float | bool | None
SHIPPED = {"datasets": "drawn.yaml", "jobs": "pretrain_clip.py"}  # a file of each folder by which it is known
UNKNOWN_KEY = "unexpected_keyword_argument"  # as pydantic calls it
DEEPEST = 100  # lists and objects of JSON inside one another
_chosen: tuple[str, Any] | None = None


def require(ok: bool, field: str, value: object, allowed: str) -> None:
    """Raise :class:`SettingError` unless ``ok``; ``allowed`` completes the words "expected ..."."""
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


def parse_json(text: str | bytes, **readers: Any) -> Any:
    """The value of JSON text; raises ``ValueError`` for other text, and for lists or objects deeper than 100.

    Readers of files that others may have written use this: ``json.loads`` raises ``RecursionError`` for deep nesting.
    ``readers`` are its ``parse_float`` and ``parse_int``.
    """
    try:
        plain = json.loads(text, **readers)
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
        raise SettingError(origin, text[:80], f"well-formed JSON ({error})") from error
    return from_plain(kind, plain, origin)


def from_yaml(kind: type[Config], path: str | Path) -> Config:
    """Read a YAML file as a ``kind``; raises :class:`SettingError` as :func:`from_json` does."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable("file", str(path), "a YAML file", error) from error
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
        first, *others = error.errors()
        # A misspelt key is unknown, and its right name is missing: the first explains both.
        unknown = [one for one in others if one["type"] == UNKNOWN_KEY and one["loc"][:-1] == first["loc"][:-1]]
        raise _sentence(kind, (unknown or [first])[0], origin) from error


def fingerprint(config: Any, exclude: Iterable[str] = ()) -> str:
    """SHA-256 hex of the config without the flattened names in ``exclude`` (or anything below them)."""
    left_out = tuple(exclude)
    kept = {
        name: value
        for name, value in flatten(config).items()
        if not any(name == out or name.startswith(out + ".") for out in left_out)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def shipped_folder(name: str) -> Path:
    """The folder ``datasets`` or ``jobs``: that of the checkout, else where the wheel has put its files.

    Raises:
        DataError: neither exists.
    """
    root, mark = Path(__file__).resolve().parent.parent, SHIPPED[name]
    places = [root / name, root / "share" / "clipmill" / name]  # the second is that of pip install --target
    with contextlib.suppress(PackageNotFoundError):
        files = distribution("clipmill").files or []
        places += [
            Path(str(one.locate())).resolve().parent for one in files if one.match(f"share/clipmill/{name}/{mark}")
        ]
    found = next((place for place in places if (place / mark).is_file()), None)
    if found is None:
        raise DataError(f"clipmill's folder {name} is missing; install clipmill again")
    return found


def chosen_preset() -> tuple[str, Any] | None:
    """The preset that this process's command line names, and its config without flags; none with ``--from``."""
    return _chosen


def differences(config: Any, other: Any, prefix: str = "") -> dict[str, str]:
    """The fields of ``config``, by flattened name, whose value is not that of ``other``, with their values as text."""
    if type(config) is not type(other) or not dataclasses.is_dataclass(config):
        if dataclasses.is_dataclass(config):
            return {name: str(value) for name, value in flatten(config, prefix).items()}
        return {} if config == other else {prefix.removesuffix("."): str(_plain(config))}
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        name = field.name
        found |= differences(getattr(config, name), getattr(other, name), f"{prefix}{name}.")
    return found


def near(wanted: str, names: Iterable[str]) -> str:
    """`` (did you mean NAME?)`` with the most similar of ``names``; empty if none is similar."""
    found = difflib.get_close_matches(wanted, list(names), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def run_job(
    presets: Mapping[str, tuple[str, Any]],
    main: Callable[[Any], None],
    again: str = "the same command starts again from the beginning",
    default: str = "",
) -> None:
    """The command line of a job: ``PRESET [--flags]`` or ``--from config.json [--flags]``, then ``main(config)``.

    A command line that begins with another flag has the preset ``default``, if there is one.

    Errors that a user can fix are one sentence on stderr: exit code 2 for a setting, 1 for data and storage. After
    Ctrl-C or TERM the sentence is ``again``, which says what the same command will do; the exit code is 128 + the
    signal's number.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # `ray job stop` sends TERM: as an exception it lets the job close its MLflow run and stop what it started.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        arguments = sys.argv[1:]
        if default and arguments and arguments[0].startswith("-") and arguments[0] not in ("--from", "--help", "-h"):
            arguments = [default, *arguments]
        main(_parse(dict(presets), arguments))
        sys.stdout.flush()
    except SettingError as error:
        _stop(f"error: {as_typed(error, sys.argv[1:])}", code=2)
    except ClipmillError as error:
        _stop(f"error: {error}", code=1)
    except KeyboardInterrupt:
        _stop(f"stopped; {again}", code=128 + signal.SIGINT)
    except _Terminated:
        _stop(f"stopped; {again}", code=128 + signal.SIGTERM)
    except SystemExit as stopped:
        if stopped.code != signal.SIGTERM:  # raised by Ray's own handler, which replaces ours in a driver
            raise
        _stop(f"stopped; {again}", code=128 + signal.SIGTERM)
    except BrokenPipeError:  # `--help | head`; what is left in the buffer has no reader either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def as_typed(error: SettingError, arguments: list[str]) -> str:
    """The sentence of ``error``, with the flag in place of the field if the flag is among ``arguments``."""
    flag = "--" + error.field.replace("_", "-")
    typed = any(argument.partition("=")[0] == flag for argument in arguments)
    return flag + str(error).removeprefix(error.field) if typed else str(error)


def writable_folder(field: str, value: str) -> str:
    """``value`` as an absolute path or URI of a folder for output.

    A job of ``ray job submit`` runs in a temporary copy of the working directory, so results in a relative folder would
    be lost.

    Raises:
        SettingError: empty, relative inside a Ray job, or a file.
    """
    place = _absolute(field, value, "a folder or an fsspec URI such as s3://bucket/path")
    if "://" not in place and Path(place).is_file():
        raise SettingError(field, value, "a folder", f"{value!r} is a file")
    return place


def writable_file(field: str, value: str) -> str:
    """``value`` as an absolute path or URI of a file for output; otherwise as :func:`writable_folder`.

    Raises:
        SettingError: empty, relative inside a Ray job, or a folder.
    """
    place = _absolute(field, value, "a file or an fsspec URI such as s3://bucket/path")
    if "://" not in place and Path(place).is_dir():
        raise SettingError(field, value, "a file", f"{value!r} is a folder")
    return place


def _absolute(field: str, value: str, allowed: str) -> str:
    require(bool(value), field, value, allowed)
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
    file = next((parent for parent in path.absolute().parents if parent.is_file()), None)
    if file is not None:
        raise SettingError(field, value, allowed, f"{str(file)!r} is a file")
    return str(path.absolute())


def _parse(presets: dict[str, tuple[str, Any]], arguments: list[str]) -> Any:
    saved = _from_file(presets, arguments[1:2]) if arguments and arguments[0] == "--from" else None
    # tyro takes 0.9 s to import, which workers that only read configs avoid.
    import tyro

    wanted = arguments[0] if arguments else ""
    if wanted and not wanted.startswith("-") and wanted not in presets:
        raise SettingError("preset", wanted, "one of " + ", ".join(presets) + near(wanted, presets))
    global _chosen
    _chosen = (wanted, presets[wanted][1]) if wanted in presets else None
    program = Path(sys.argv[0]).name
    # For a field of several dataclass types, the preset or the file selects the type.
    style = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if saved is not None:
                return tyro.cli(type(saved), default=saved, prog=program, args=arguments[2:], config=style)
            return tyro.extras.overridable_config_cli(presets, prog=program, args=arguments, config=style)
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
    require(bool(arguments), "--from", "", "the config.json of an earlier run, and flags that differ from it")
    try:
        plain = parse_json(Path(arguments[0]).read_bytes())
    except (OSError, ValueError) as error:
        raise unreadable("--from", arguments[0], "the config.json of an earlier run", error) from error
    kinds = dict.fromkeys(type(config) for _, config in presets.values())
    problem: SettingError | None = None
    for kind in kinds:
        try:
            return from_plain(kind, _moved(plain, getattr(kind, "moved_keys", {})), arguments[0])
        except SettingError as error:
            problem = error
    raise problem or SettingError("--from", arguments[0], "a config of this job")


def _moved(plain: Any, keys: Mapping[str, str]) -> Any:
    """The JSON of a run with old keys (dotted paths) at their new places; a key that is at both is left alone."""
    plain = copy.deepcopy(plain)
    for old, new in keys.items():
        *parents, name = old.split(".")
        *new_parents, new_name = new.split(".")
        owner = _object_at(plain, parents)
        if name in owner and new_name not in _object_at(plain, new_parents):
            _object_at(plain, new_parents, make=True)[new_name] = owner.pop(name)
    return plain


def _object_at(plain: Any, place: list[str], make: bool = False) -> dict[str, Any]:
    """The JSON object at a place, with ``make`` made where it is missing; an empty one of its own otherwise."""
    for name in place:
        if not isinstance(plain, dict):
            return {}
        plain = plain.setdefault(name, {}) if make else plain.get(name)
    return plain if isinstance(plain, dict) else {}


def _sentence(kind: Any, problem: Any, origin: str) -> SettingError:
    """The error for one ``problem`` of pydantic's list, found in ``origin`` when reading a ``kind``."""
    place, value = list(problem["loc"]), problem["input"]
    path = ".".join(str(part) for part in place)
    inner = problem.get("ctx", {}).get("error")
    if isinstance(inner, SettingError):  # raised by the class itself, about one of its fields
        return inner.within(f"{origin}: {path}{'.' if path else ''}")
    field = f"{origin}: {path}" if path else origin
    if problem["type"] in ("missing", "missing_keyword_only_argument", "missing_argument"):
        return SettingError(field, value, "", "missing")
    if problem["type"] == UNKNOWN_KEY:
        owner = _class_at(kind, place[:-1])
        names = sorted(one.name for one in dataclasses.fields(owner))
        allowed = f"a key of {owner.__name__}: {', '.join(names)}{near(str(place[-1]), names)}"
        return SettingError(field, value, allowed, "unknown key")
    return SettingError(field, value, str(problem["msg"]).removeprefix("Input should be "))


def _class_at(kind: Any, place: list[str | int]) -> Any:
    """The dataclass at a place that pydantic names: keys, numbers in sequences, and classes of a union."""
    if dataclasses.is_dataclass(kind):
        if not place:
            return kind
        if place[0] in (hints := get_type_hints(kind)):
            return _class_at(hints[place[0]], place[1:])
    inner = [one for one in get_args(kind) if one not in (type(None), ...)]
    named = [one for one in inner if place and getattr(one, "__name__", "") == place[0]]
    if named:
        return _class_at(named[0], place[1:])
    is_container = place and get_origin(kind) not in (None, Union, UnionType)
    return _class_at(inner[-1], place[1:] if is_container else place) if inner else kind


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


class _Terminated(BaseException):
    """TERM was received; not an ``Exception``, like ``KeyboardInterrupt``."""


def _terminate(*_: object) -> None:
    raise _Terminated


def _stop(sentence: str, code: int) -> None:
    print(sentence, file=sys.stderr)
    raise SystemExit(code)
