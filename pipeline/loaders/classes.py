"""The classes of boxes: from a dataset card, or from a snapshot's options.

A source with known classes (``coco``, ``stamp-scenes``) writes them into the snapshot's options: each name with its
group. A group is LVIS's frequency r, c or f, ``base`` or ``novel``, or empty. So LVIS's 1,203 names need no card.
"""

from collections.abc import Iterable, Mapping

from pipeline.config import require
from pipeline.dataset import load_card
from pipeline.errors import SnapshotError
from pipeline.loaders.mixture import parts_of, read_data
from pipeline.shards.objects import names_of, plain_word, word_of
from pipeline.shards.snapshot import Snapshot

OF_DATA = "data"
"""Instead of a card: use the classes in the data."""
NO_CLASSES = "none"
"""Instead of a card: use no classes."""
NOVEL = ("novel", "r")
"""Groups without training boxes for an open-vocabulary detector."""


def classes_of(snapshot: Snapshot) -> Mapping[str, str]:
    """Names and groups of the classes in the options of ``snapshot``, in their order; empty without such options.

    Raises:
        SnapshotError: the option ``classes`` is not a mapping of names to groups.
    """
    found = snapshot.options.get("classes", {})
    if not isinstance(found, Mapping) or not all(isinstance(group, str) for group in found.values()):
        raise SnapshotError(f"{snapshot.uri}: the option `classes` must map names to groups; make the snapshot again")
    return found


def base_classes(base: str, data: str, setting: str = "base") -> tuple[str, ...]:
    """The classes that a detector is trained on: all except the novel ones.

    Args:
        base: name or path of a card; ``data`` for the classes in the snapshots; ``none`` or empty for no classes.
        data: a snapshot, several with weights, or empty where they do not exist yet.
        setting: the name of ``base`` in an error message.

    Raises:
        SettingError: no such card, no classes in card or data, or a card that shares no class with the data.
    """
    if base in ("", NO_CLASSES):
        return ()
    card = load_card(base) if base != OF_DATA else None
    parts = parts_of(read_data(data)) if data or card is None else ()
    found = _together(classes_of(part) for part in parts)
    if card is None:
        names = tuple(name for name, group in found.items() if group not in NOVEL)
    else:
        names = tuple(name for name in card.classes if name not in card.novel)
    wanted = "a card with classes, `data` for data from a source with classes (coco, stamp-scenes), or `none`"
    require(bool(names), setting, base, wanted)
    known = {plain_word(name) for name in found}
    fits = card is None or not known or any(plain_word(name) in known for name in names)
    others = f"a card that shares a class with the data; the card has {_some(names)}, the data have {_some(found)}"
    require(fits, setting, base, others)
    return names


def dataset_classes(base: str, data: str) -> tuple[tuple[str, ...], ...]:
    """All classes of each snapshot of ``data``, also the novel ones; those of the card ``base`` where it has none.

    Args:
        base: as for :func:`base_classes`.
        data: as for :func:`base_classes`; without data there is one data set, with the card's classes.

    Raises:
        SettingError: no such card, or a snapshot without classes and no card.
    """
    card = load_card(base).classes if base not in ("", NO_CLASSES, OF_DATA) else ()
    parts = parts_of(read_data(data)) if data else ()
    found = [tuple(classes_of(part)) or card for part in parts] or [card]
    for part, names in zip(parts, found, strict=False):
        allowed = f"a card with classes, since {part.uri} has none"
        require(bool(names) or base in ("", NO_CLASSES), "base", base, allowed)
    return tuple(found)


def _together(found: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The classes of several snapshots without duplicates, with all synonyms; the last snapshot's group wins."""
    names, groups = dict[str, list[str]](), dict[str, str]()
    for classes in found:
        for word, group in classes.items():
            names.setdefault(plain_word(word), []).extend(names_of(word))
            groups[plain_word(word)] = group
    return {word_of(some): groups[plain] for plain, some in names.items()}


def _some(names: Iterable[str]) -> str:
    return ", ".join([*names][:5])
