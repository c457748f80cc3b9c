"""Few samples of every class: a small snapshot with some samples of another one.

Samples are chosen as in GLIP's code for few-shot detection (Li, Zhang et al. 2021, arXiv 2112.03857): in random order,
a sample is taken if one of its classes has fewer than ``shots`` samples so far. A taken sample counts for all of its
classes. Where samples have one class each, every class gets the same number, as in few-shot classification.
"""

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from io import BytesIO
from itertools import islice

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.loaders.mixture import parts_of, read_data
from pipeline.loaders.readers import LabelReader
from pipeline.loaders.samples import Samples, UnreadableSample
from pipeline.shards.sample import Sample, shard_name
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards, read_snapshot, snapshot_ids
from pipeline.shards.storage import Folder
from pipeline.shards.tar import TarWriter

logger = logging.getLogger(__name__)

SAMPLES_PER_SHARD = 64


def chosen_snapshot(
    data: str,
    names: Mapping[str, str],
    shots: int,
    seed: int,
    folder: Folder,
    labels_of: Callable[[Sample], Collection[str]],
    needs: str,
) -> Snapshot:
    """A snapshot below ``folder`` with ``shots`` samples of each class; an existing one is read.

    ``labels_of`` gives the classes of a sample as keys of ``names``, whose values are for messages; ``needs`` is the
    field in which they are.

    Raises:
        SettingError: ``data`` are several snapshots, lack ``needs``, or have no sample of the classes.
        DataError: as ``labels_of``.
    """
    parts = parts_of(read_data(data))
    require(len(parts) == 1, "data", data, "one snapshot with shots")
    (source,) = parts
    require(needs in source.fields, "data", data, f"data with {needs}")
    recipe = repr((source.digest, sorted(names), shots, seed))
    name = source.card or source.folder.rstrip("/").rpartition("/")[2]
    place = folder.folder(f"{name}-{shots}-shots-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}")
    if snapshot_ids(place):
        return read_snapshot(place.uri)
    samples = Samples(source, open_shards=2)
    labels = [labels_of(samples[number]) for number in range(len(samples))]
    chosen = few_shot_numbers(labels, shots, seed)
    require(bool(chosen), "data", data, "samples of the classes")
    found = Counter(label for number in chosen for label in labels[number])
    fewest = [f"{shown} {found[label]}" for label, shown in names.items() if found[label] < shots]
    logger.info("%d samples of %d classes for %d shots", len(chosen), len(found), shots)
    if fewest:
        logger.warning("classes with fewer than %d samples: %s", shots, ", ".join(fewest[:20]))
    return _write(place, source, (samples[number] for number in sorted(chosen)), len(chosen))


def labelled_snapshot(
    data: str, classes: Sequence[str], label_key: str, shots: int, seed: int, folder: Folder
) -> Snapshot:
    """:func:`chosen_snapshot` by the class in the samples' json; samples of other classes are left out."""
    reader = LabelReader(classes=tuple(classes), json_key=label_key)

    def labels_of(sample: Sample) -> Collection[str]:
        try:
            return {classes[reader.read(sample)[reader.key]]}
        except (UnreadableSample, DataError):
            return ()

    return chosen_snapshot(data, {name: name for name in classes}, shots, seed, folder, labels_of, "json")


def few_shot_numbers(labels: Sequence[Collection[str]], shots: int, seed: int) -> list[int]:
    """The numbers of the chosen samples in the order of the choice; ``labels`` are the classes of each sample."""
    require(shots >= 1, "shots", shots, "1 or more")
    numbers = list(range(len(labels)))
    random.Random(seed).shuffle(numbers)
    counts: Counter[str] = Counter()
    chosen = []
    for number in numbers:
        if any(counts[name] < shots for name in labels[number]):
            chosen.append(number)
            counts.update(labels[number])
    return chosen


def _write(place: Folder, source: Snapshot, samples: Iterable[Sample], count: int) -> Snapshot:
    shards: list[Shard] = []
    rows = iter(samples)
    while part := list(islice(rows, SAMPLES_PER_SHARD)):
        content = BytesIO()
        writer = TarWriter(content)
        for sample in part:
            writer.write(sample)
        writer.close()
        tar, name = content.getvalue(), shard_name(len(shards))
        place.write_atomic(f"{name}.tar", tar)
        digest = hashlib.sha256(tar).hexdigest()
        shards.append(Shard(name=name, samples=len(part), bytes=len(tar), sha256=digest))
    return publish_shards(
        place,
        tuple(shards),
        fields=source.fields,
        card=source.card,
        options=source.options,
        rows=count,
        dropped={},
    )
