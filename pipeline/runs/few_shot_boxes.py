"""Few images of a data set with boxes: a small snapshot with some images of every class.

Images are chosen as in GLIP's code for few-shot detection (Li, Zhang et al. 2021, arXiv 2112.03857): in random order,
an image is taken if one of its classes has fewer than ``shots`` images so far. A taken image counts for all of its
classes, so a frequent class may have more images, and objects of all classes stay annotated.
"""

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from io import BytesIO
from itertools import islice

from pipeline.config import require
from pipeline.loaders.grounding_prompts import clean_name
from pipeline.loaders.mixture import parts_of, read_data
from pipeline.loaders.samples import Samples
from pipeline.shards.objects import FIELD, read_objects
from pipeline.shards.sample import Sample, shard_name
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards, read_snapshot, snapshot_ids
from pipeline.shards.storage import Folder
from pipeline.shards.tar import TarWriter

logger = logging.getLogger(__name__)

SAMPLES_PER_SHARD = 64


def few_shot_snapshot(data: str, classes: Sequence[str], shots: int, seed: int, folder: Folder) -> Snapshot:
    """A snapshot below ``folder`` with ``shots`` images of each of ``classes``; an existing one is read.

    Raises:
        SettingError: ``data`` are several snapshots, have no boxes, or have no image with one of the classes.
        DataError: a sample without readable boxes.
    """
    parts = parts_of(read_data(data))
    require(len(parts) == 1, "data", data, "one snapshot with shots")
    (source,) = parts
    require(FIELD in source.fields, "data", data, f"data with boxes, {FIELD}")
    recipe = repr((source.digest, sorted(map(clean_name, classes)), shots, seed))
    name = source.card or source.folder.rstrip("/").rpartition("/")[2]
    place = folder.folder(f"{name}-{shots}-shots-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}")
    if snapshot_ids(place):
        return read_snapshot(place.uri)
    samples = Samples(source, open_shards=2)
    labels = [labels_of(samples[number], classes) for number in range(len(samples))]
    chosen = few_shot_numbers(labels, shots, seed)
    require(bool(chosen), "data", data, "images with objects of the classes")
    found = Counter(name for number in chosen for name in labels[number])
    fewest = [f"{name} {found[clean_name(name)]}" for name in classes if found[clean_name(name)] < shots]
    logger.info("%d images of %d classes for %d shots", len(chosen), len(found), shots)
    if fewest:
        logger.warning("classes with fewer than %d images: %s", shots, ", ".join(fewest[:20]))
    return _write(place, source, (samples[number] for number in sorted(chosen)), len(chosen))


def labels_of(sample: Sample, classes: Iterable[str]) -> frozenset[str]:
    """The cleaned names of the classes in an image, crowds left out."""
    objects = read_objects(sample)
    present = {clean_name(label) for label, crowd in zip(objects.labels, objects.crowd, strict=True) if not crowd}
    return frozenset(present & {clean_name(name) for name in classes})


def few_shot_numbers(labels: Sequence[Collection[str]], shots: int, seed: int) -> list[int]:
    """The numbers of the chosen images in the order of the choice; ``labels`` are the classes in each image."""
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
