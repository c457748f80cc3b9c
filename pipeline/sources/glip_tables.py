"""The files around GLIP's tables: line indices, line lists, YAML files, label maps and indices of images.

The formats are those of https://github.com/microsoft/GLIP, ``maskrcnn_benchmark/data/datasets/tsv.py``.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence

import yaml

from pipeline.config import parse_json, require
from pipeline.errors import ReadError, unreadable
from pipeline.shards.storage import file_system, read_errors
from pipeline.sources.grounding_records import BAD

LONGEST_LINE = 256 << 20
"""Bytes of a line; a longer one is no image of a training set."""
YAML_KEYS: Mapping[str, str] = {
    "img": "images",
    "label": "labels",
    "linelist": "linelist",
    "imageid2idx": "image_index",
    "labelmap": "label_map",
    "jsondict": "label_map",
}
"""Keys of GLIP's YAML files and the settings that they are; other keys, such as ``hw``, are not needed."""


def named_files(address: str) -> dict[str, str]:
    """The settings in a YAML file, by name; relative paths are below its folder.

    Raises:
        SettingError: no such file, or one that does not name a table of images.
    """
    allowed = "a YAML file of GLIP with img and label"
    try:
        plain = yaml.safe_load(_text("images", address, allowed))
    except (yaml.YAMLError, RecursionError) as error:
        raise unreadable("images", address, allowed, error) from error
    require(isinstance(plain, dict) and isinstance(plain.get("img"), str), "images", address, allowed)
    folder = address.rpartition("/")[0]
    found: dict[str, str] = {}
    for key, name in YAML_KEYS.items():
        place = plain.get(key)
        if place is not None:
            require(isinstance(place, str) and bool(place), "images", address, f"{allowed}; {key} names no file")
            found.setdefault(name, _below(folder, place))
    return found


def line_starts(field: str, table: str) -> Sequence[int]:
    """The first byte of each line of a table, from its .lineidx where it has one.

    Raises:
        SettingError: no such table, an empty one, or an index that does not belong to it.
    """
    allowed = "a table with at least one line, of a key and a value each"
    index = table.removesuffix(".tsv") + ".lineidx"
    fs, path = file_system(index)
    try:
        table_fs, table_path = file_system(table)
        with read_errors(table):
            size = int(table_fs.size(table_path) or 0)
        if fs.exists(path):
            starts = array("q", _numbers(field, index))
            rising = all(one < other for one, other in zip(starts, starts[1:], strict=False))
            fits = bool(starts) and starts[0] == 0 and rising and starts[-1] < size
            require(fits, field, index, f"the first bytes of the lines of {table}, which has {size} bytes")
            return starts
        starts = array("q", [0])
        with read_errors(table), table_fs.open(table_path, "rb") as content:
            while line := content.readline(LONGEST_LINE):
                starts.append(starts[-1] + len(line))
    except ReadError:
        raise
    except (OSError, OverflowError) as error:
        raise unreadable(field, table, allowed, error) from error
    require(len(starts) > 1, field, table, allowed)
    return starts[:-1]


def line_numbers(address: str, lines: int) -> list[int]:
    """The numbers in a line list, in its order; raises ``SettingError`` unless they are lines of a table."""
    found = list(_numbers("linelist", address))
    require(bool(found), "linelist", address, "a file with a number per line")
    outside = next((number for number in found if not 0 <= number < lines), None)
    require(outside is None, "linelist", outside, f"0 to {lines - 1}, since the table of labels has {lines} lines")
    return found


def labelled_lines(table: str, starts: Iterable[int]) -> Iterator[tuple[str, str]]:
    """Key and JSON text of the lines that begin at ``starts``; raises ``SettingError`` where there is no table."""
    fs, path = file_system(table)
    try:
        with read_errors(table), fs.open(path, "rb") as file:
            for start in starts:
                file.seek(start)
                key, _, text = file.readline(LONGEST_LINE).decode("utf-8", "replace").rstrip("\r\n").partition("\t")
                yield key, text
    except ReadError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable("labels", table, "a table of keys and JSON", error) from error


def mapped_classes(address: str) -> list[str]:
    """The class names of a label map in the order of their numbers: JSON, or one name per line.

    Raises:
        SettingError: no such file, or one of another form.
    """
    allowed = 'a label map, {"label_to_idx": {"person": 1, ...}} or one name per line'
    text = _text("label_map", address, allowed)
    if not address.endswith(".json"):
        names = [line.split("\t")[0].strip() for line in text.splitlines()]
        return list(dict.fromkeys(name for name in names if name))
    try:
        plain = parse_json(text)
        numbers = plain.get("label_to_idx", plain)
        ranked = sorted((int(number), str(name)) for name, number in numbers.items())
    except BAD as error:
        raise unreadable("label_map", address, allowed, error) from error
    return [name for _, name in ranked]


def image_lines(address: str) -> Mapping[str, int]:
    """The line of each image in the table of images, by ``img_id``; raises ``SettingError`` for another file."""
    allowed = 'an index of images, {"img_id": line, ...}'
    try:
        plain = parse_json(_text("image_index", address, allowed))
        return {str(name): int(line) for name, line in plain.items()}
    except BAD as error:
        raise unreadable("image_index", address, allowed, error) from error


def image_line(label: str, lines: Mapping[str, int], count: int) -> int | None:
    """The line of the image of a label's JSON text; ``None`` where it is not one of the ``count`` lines."""
    try:
        line = lines.get(str(parse_json(label)["img_id"]))
    except BAD:
        return None
    return line if line is not None and 0 <= line < count else None


def _numbers(field: str, address: str) -> Iterator[int]:
    allowed = "a file with a whole number per line"
    for line in _text(field, address, allowed).splitlines():
        if line.strip():
            require(line.strip().isascii() and line.strip().isdigit(), field, line[:40], f"{allowed} ({address})")
            yield int(line)


def _text(field: str, address: str, allowed: str) -> str:
    fs, path = file_system(address)
    try:
        with read_errors(address), fs.open(path, "rt", encoding="utf-8-sig") as file:
            text: str = file.read()
            return text
    except ReadError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable(field, address, allowed, error) from error


def _below(folder: str, place: str) -> str:
    """``place``, where it is an absolute path or an address; else below ``folder``."""
    return place if place.startswith("/") or "://" in place or not folder else f"{folder}/{place}"
