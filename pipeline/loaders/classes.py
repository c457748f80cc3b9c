"""The classes of boxes: those of a dataset card, or those that a snapshot tells of.

A source that knows its classes (``coco``, ``stamp-scenes``) leaves them in the snapshot's options, name by name with
its group: LVIS's frequency r, c or f, ``base`` or ``novel``, or nothing. So LVIS's 1,203 names need no card.
"""

from collections.abc import Mapping

from pipeline.config import require
from pipeline.dataset import load_card
from pipeline.errors import SnapshotError
from pipeline.loaders.mixture import parts_of, read_data
from pipeline.shards.snapshot import Snapshot

OF_DATA = "data"
"""In a card's place: what the data tell."""
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
        base: name or path of a card; ``data`` for what the snapshots of ``data`` tell; or nothing, which is no class.
        data: a snapshot, or several with weights.
        setting: what an error calls ``base``.

    Raises:
        SettingError: no such card, or neither it nor the data tell of classes.
    """
    if not base:
        return ()
    if base == OF_DATA:
        told = {name: group for part in parts_of(read_data(data)) for name, group in classes_of(part).items()}
        names = tuple(name for name, group in told.items() if group not in NOVEL)
    else:
        card = load_card(base)
        names = tuple(name for name in card.classes if name not in card.novel)
    wanted = "a card with classes, or `data` for data whose source knew its classes (coco, stamp-scenes)"
    require(bool(names), setting, base, wanted)
    return names
