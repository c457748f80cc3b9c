"""The classes of boxes: those of a dataset card, or those that a snapshot tells of.

A source that knows its classes (``coco``, ``stamp-scenes``) leaves them in the snapshot's options, name by name with
its group: LVIS's frequency r, c or f, ``base`` or ``novel``, or nothing. So LVIS's 1,203 names need no card.
"""

from collections.abc import Iterable, Mapping

from pipeline.config import require
from pipeline.dataset import load_card
from pipeline.errors import SnapshotError
from pipeline.loaders.mixture import parts_of, read_data
from pipeline.shards.objects import names_of, plain_word, word_of
from pipeline.shards.snapshot import Snapshot

OF_DATA = "data"
"""In a card's place: what the data tell."""
NO_CLASSES = "none"
"""In a card's place: no class at all."""
NOVEL = ("novel", "r")
"""Groups that an open-vocabulary detector has no boxes of."""


def classes_of(snapshot: Snapshot) -> Mapping[str, str]:
    """Names and groups of the classes that ``snapshot`` tells of, in their order; empty where it tells nothing.

    Raises:
        SnapshotError: what it tells is no such mapping.
    """
    told = snapshot.options.get("classes", {})
    if not isinstance(told, Mapping) or not all(isinstance(group, str) for group in told.values()):
        raise SnapshotError(f"{snapshot.uri}: its options' `classes` are no names with groups")
    return told


def base_classes(base: str, data: str, setting: str = "base") -> tuple[str, ...]:
    """The classes that a detector is trained on: all but the novel ones.

    Args:
        base: name or path of a card; ``data`` for what the snapshots of ``data`` tell; ``none`` or nothing, which is no
            class.
        data: a snapshot, several with weights, or nothing where they are not made yet.
        setting: what an error calls ``base``.

    Raises:
        SettingError: no such card, neither it nor the data tell of classes, or the data tell of others than it.
    """
    if base in ("", NO_CLASSES):
        return ()
    card = load_card(base) if base != OF_DATA else None
    parts = parts_of(read_data(data)) if data or card is None else ()
    told = _together(classes_of(part) for part in parts)
    if card is None:
        names = tuple(name for name, group in told.items() if group not in NOVEL)
    else:
        names = tuple(name for name in card.classes if name not in card.novel)
    wanted = "a card with classes, `data` for data whose source knew its classes (coco, stamp-scenes), or `none`"
    require(bool(names), setting, base, wanted)
    known = {plain_word(name) for name in told}
    fits = card is None or not known or any(plain_word(name) in known for name in names)
    others = f"a card whose classes ({_some(names)}) occur among those that the data tell of ({_some(told)})"
    require(fits, setting, base, others)
    return names


def _together(told: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The classes of several snapshots, each once, with all its names; of groups the last counts."""
    names, groups = dict[str, list[str]](), dict[str, str]()
    for classes in told:
        for word, group in classes.items():
            names.setdefault(plain_word(word), []).extend(names_of(word))
            groups[plain_word(word)] = group
    return {word_of(some): groups[plain] for plain, some in names.items()}


def _some(names: Iterable[str]) -> str:
    return ", ".join([*names][:5])
