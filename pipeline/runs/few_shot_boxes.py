"""Few images of a data set with boxes: a small snapshot with some images of every class.

The rule is that of :mod:`pipeline.runs.few_shot_samples`: an image counts for all of its classes, so a frequent class
may have more images, and objects of all classes stay annotated.
"""

from collections.abc import Iterable, Sequence
from functools import partial

from pipeline.loaders.grounding_prompts import clean_name
from pipeline.runs.few_shot_samples import chosen_snapshot
from pipeline.shards.objects import FIELD, read_objects
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.storage import Folder


def few_shot_snapshot(data: str, classes: Sequence[str], shots: int, seed: int, folder: Folder) -> Snapshot:
    """A snapshot below ``folder`` with ``shots`` images of each of ``classes``; an existing one is read.

    Raises:
        SettingError: ``data`` are several snapshots, have no boxes, or have no image with one of the classes.
        DataError: a sample without readable boxes.
    """
    names = {clean_name(name): name for name in classes}
    return chosen_snapshot(data, names, shots, seed, folder, partial(labels_of, classes=classes), FIELD)


def labels_of(sample: Sample, classes: Iterable[str]) -> frozenset[str]:
    """The cleaned names of the classes in an image, crowds left out."""
    objects = read_objects(sample)
    present = {clean_name(label) for label, crowd in zip(objects.labels, objects.crowd, strict=True) if not crowd}
    return frozenset(present & {clean_name(name) for name in classes})
