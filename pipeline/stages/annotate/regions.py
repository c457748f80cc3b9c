"""Features of regions as a sidecar: the targets of ViLD's image branch (Gu, Lin, Kuo, Cui, 2021, section 3.2).

``00017.regions.parquet`` has one row per sample of the tar: ``key``, ``height`` and ``width`` of the image, ``boxes``
(x1, y1, x2, y2 as fractions of its sides, float32, flattened), ``scores`` of the proposals, and ``features``,
L2-normalised float16 [n, D] as bytes in C order. Boxes and features are of the stored image, so an augmentation that
moves the image moves the boxes and keeps the features. An image that is unreadable or has no proposals has none.

Boxes that do not match their features are a silent failure: training continues, and novel classes reach half their
score. So each shard is checked while it is made. Where a proposal covers an annotated object, its feature is classified
among the text features of the class names. The accuracy is stored with the shard; below a floor the job stops. It also
stops if regions cover less than a tenth of these objects, since the accuracy then means nothing.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import DataError, SidecarError
from pipeline.shards.objects import FIELD, overlaps, plain_word, read_objects
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import FACTS, read_sidecar, read_sidecar_schema, sidecar_facts, sidecar_file
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.annotator import Annotation, annotate, decoded_batches
from pipeline.stages.shard_tasks import Workers

logger = logging.getLogger(__name__)

JOB = "jobs/extract_region_features.py"
MATCHED = 0.5  # smallest intersection over union at which a proposal covers an object
COVERED = 0.1  # fraction of objects that any proposer covers if its boxes fit the images


@dataclass(frozen=True)
class RegionProposals:
    """Boxes x1, y1, x2, y2 in pixels, float64 [n, 4], the best first, and their scores float64 [n]."""

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]


class RegionModel(Protocol):
    """Interface of proposer and image tower; ``maker`` is the digest of both and of the crop rule."""

    maker: str
    facts: Mapping[str, Any]
    """Metadata for readers: ``teacher``, ``proposer``, ``crop``, ``width`` D; stored with the features."""

    def prepare(self, image: bytes) -> Any | None:
        """The decoded image, ``None`` if unreadable; called from many threads."""
        ...

    def shape(self, image: Any) -> tuple[int, int]:
        """Its height and width."""
        ...

    def propose(self, images: Sequence[Any], samples: Sequence[Sample]) -> list[RegionProposals]:
        """The regions of each image."""
        ...

    def encode(self, images: Sequence[Any], boxes: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float32]]:
        """L2-normalised features [n, D] of each image's boxes."""
        ...

    def class_vectors(self, classes: Sequence[str]) -> NDArray[np.float32]:
        """L2-normalised text features [C, D]."""
        ...


class MakeRegionModel(Protocol):
    """Picklable function that loads the model in its worker process, for a number of CPU threads."""

    def __call__(self, threads: int) -> RegionModel: ...


@dataclass(frozen=True, kw_only=True)
class RegionOptions:
    """Options of the features and of their check."""

    name: str = "regions"
    """Name of the sidecar, a plain word; use one name per model to store features of several models."""
    pictures_at_once: int = 8
    """Batch size in images; their regions are encoded together."""
    overwrite: bool = False
    """Replace features of another model, of other settings, or checked with other classes."""
    floor: float = 0.1
    """Smallest zero-shot accuracy, per shard and overall, of the features of regions that cover an object of
    ``classes``, 0 to 1; below it the job stops. 0 disables the check."""
    least_matched: int = 50
    """Smallest number of regions that cover an object, and of objects, at which the checks apply."""

    def __post_init__(self) -> None:
        require(self.name.isidentifier(), "name", self.name, "a plain word")
        require(self.pictures_at_once >= 1, "pictures_at_once", self.pictures_at_once, "1 or more")
        require(0 <= self.floor <= 1, "floor", self.floor, "0 to 1")
        require(self.least_matched >= 1, "least_matched", self.least_matched, "1 or more")


@dataclass(frozen=True)
class Check:
    """Agreement of regions with annotated objects.

    Of ``matched`` regions that cover an object, ``right`` have features nearest to its name. Of ``objects`` objects of
    the classes, without crowds, ``covered`` have a region."""

    matched: int = 0
    right: int = 0
    objects: int = 0
    covered: int = 0

    def __add__(self, other: "Check") -> "Check":
        return Check(
            self.matched + other.matched,
            self.right + other.right,
            self.objects + other.objects,
            self.covered + other.covered,
        )

    def __str__(self) -> str:
        named = f"{self.right} of {self.matched} regions that cover an object ({self.accuracy:.1%})"
        return f"{named} are nearest to its name, {self.covered} of {self.objects} objects are covered"

    @property
    def accuracy(self) -> float:
        """The fraction of correct regions; 0 without matched regions."""
        return self.right / self.matched if self.matched else 0.0


@dataclass(frozen=True)
class Found:
    """Metadata of a shard's sidecar: the number of regions, the result of the check, and the digest of the classes of
    the check (``classes_digest``)."""

    regions: int
    check: Check
    checked_by: str


@dataclass(frozen=True)
class Regions:
    """One sample's regions: boxes float32 [n, 4] as fractions of the image, scores [n], features float16 [n, D]."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    features: NDArray[np.float16]


class ShardRegions:
    """The regions of a shard's stored samples, by key."""

    def __init__(self, table: pa.Table, facts: Mapping[str, Any]) -> None:
        self._table, self.facts = table, facts
        self._rows = {str(key): row for row, key in enumerate(table["key"].to_pylist())}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: str) -> Regions:
        """The regions of sample ``key``; raises ``SidecarError`` for a sample without a row."""
        if key not in self._rows:
            raise SidecarError(f"sample {key} has no row among its shard's regions; make them again with {JOB}")
        row = {name: self._table[name][self._rows[key]].as_py() for name in ("boxes", "scores", "features")}
        features = np.frombuffer(row["features"], np.float16).reshape(-1, int(self.facts["width"]))
        boxes = np.array(row["boxes"], np.float32).reshape(-1, 4)
        if len(boxes) != len(features):
            raise SidecarError(
                f"sample {key} has {len(boxes)} boxes and {len(features)} features; make them with {JOB}"
            )
        return Regions(boxes, np.array(row["scores"], np.float32), features)


def extract_regions(
    snapshot: Snapshot,
    make: MakeRegionModel,
    classes: Sequence[str],
    options: RegionOptions,
    workers: Workers,
    use_gpu: bool | None = None,
) -> Snapshot:
    """Make the regions of every shard and publish them; finished shards are not read again.

    ``classes`` are the names of annotated classes for the check of the features; empty without annotations.

    Raises:
        SidecarError: the sidecar has regions of another model, proposer or crop.
        DataError: a damaged shard, or features that do not match their boxes.
        StorageError: the store failed (run the same command to continue), or another job holds the folder's lease.
    """
    load = LoadRegionMaker(make, tuple(classes), options)
    facts = {"checked_by": classes_digest(classes)} if classes else {}
    annotation = Annotation(name=options.name, overwrite=options.overwrite, facts=facts)
    return annotate(snapshot, load, annotation, workers, use_gpu)


def read_regions(folder: Folder, shard: Shard, name: str = "regions", maker: str | None = None) -> ShardRegions:
    """The regions of ``shard``'s stored samples.

    Raises:
        SidecarError: missing, of another tar, by another maker, or without regions.
    """
    table = read_sidecar(folder, shard, name, JOB, maker)
    facts = sidecar_facts(table.schema, folder.join(sidecar_file(shard, name)), JOB)
    if not isinstance(facts.get("width"), int) or not {"boxes", "scores", "features"} <= set(table.column_names):
        raise SidecarError(f"{folder.join(sidecar_file(shard, name))} holds no regions; make it with {JOB}")
    return ShardRegions(table, facts)


def read_found(folder: Folder, shard: Shard, name: str = "regions") -> Found:
    """The metadata of the regions of ``shard``; the regions are not read.

    Raises:
        SidecarError: missing, of another tar, or without regions.
    """
    facts = sidecar_facts(read_sidecar_schema(folder, shard, name, JOB), folder.join(sidecar_file(shard, name)), JOB)
    try:
        check = Check(*(int(facts[number]) for number in ("matched", "right", "objects", "covered")))
        return Found(int(facts["regions"]), check, str(facts["checked_by"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        file = folder.join(sidecar_file(shard, name))
        raise SidecarError(
            f"{file} lacks the result of its check ({error!r}): make it again with --overwrite"
        ) from error


def classes_digest(classes: Sequence[str]) -> str:
    """SHA-256 (hex) of the class names in any order; empty without classes."""
    names = sorted(plain_word(name) for name in classes)
    return hashlib.sha256("\n".join(names).encode()).hexdigest() if names else ""


def together(found: Sequence[Found], classes: Sequence[str]) -> Check:
    """The summed result of all shards that were checked with ``classes``; logs a warning with the number of others."""
    digest = classes_digest(classes)
    checked = [one.check for one in found if one.checked_by == digest]
    if classes and len(checked) < len(found):
        others, again = len(found) - len(checked), "--overwrite makes them again"
        logger.warning("%d finished shards were not checked with these classes; %s", others, again)
    return sum(checked, Check())


def judge(found: Check, options: RegionOptions, where: str) -> None:
    """Raise ``DataError`` where the result of ``where`` is below the limits."""
    if not options.floor:
        return
    if found.objects >= options.least_matched and found.covered < COVERED * found.objects:
        raise DataError(
            f"{where}: {found}, less than a tenth: the boxes do not fit the images, or the proposals cover "
            "other objects (--floor 0 disables the check)"
        )
    if found.matched >= options.least_matched and found.accuracy < options.floor:
        raise DataError(
            f"{where}: {found}; the first share is less than floor {options.floor}: the boxes do not fit the images, "
            "or this teacher does not know these classes"
        )


@dataclass(frozen=True)
class LoadRegionMaker:
    """Load the annotator of regions."""

    make: MakeRegionModel
    classes: tuple[str, ...]
    options: RegionOptions

    def __call__(self, threads: int) -> "RegionMaker":
        return RegionMaker(self.make(threads), self.classes, self.options, threads)


class RegionMaker:
    """Makes the table of regions of a shard's samples; decodes ahead in ``threads`` threads."""

    def __init__(self, model: RegionModel, classes: tuple[str, ...], options: RegionOptions, threads: int) -> None:
        self._model, self._options, self._threads = model, options, threads
        self._numbers = {plain_word(name): number for number, name in enumerate(classes)}
        self._vectors = model.class_vectors(classes) if classes else None
        self._checked_by = classes_digest(classes)
        self.maker = model.maker

    def table(self, samples: Iterator[Sample], shard: Shard) -> pa.Table:
        """The sidecar's rows, one chunk per batch of images; raises ``DataError`` where the check fails."""
        parts, found = [SCHEMA.empty_table()], Check()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="prepare") as pool:
            for batch in decoded_batches(samples, self._options.pictures_at_once, pool, self._model.prepare):
                made, check = self._rows(batch)
                parts.append(pa.Table.from_pylist(made, schema=SCHEMA))
                found += check
        logger.info("%s: %s", shard.name, found)
        judge(found, self._options, shard.name)
        # Keep the chunks separate: all features of a shard may exceed the limit of 2 GB per chunk.
        whole = pa.concat_tables(parts)
        count = int(pc.sum(pc.list_value_length(whole["scores"])).as_py() or 0)
        facts = {**self._model.facts, "regions": count, **asdict(found), "checked_by": self._checked_by}
        return whole.replace_schema_metadata({FACTS: json.dumps(facts).encode()})

    def _rows(self, batch: Sequence[tuple[Sample, Any | None]]) -> tuple[list[dict[str, Any]], Check]:
        readable = [(sample, image) for sample, image in batch if image is not None]
        samples, images = [sample for sample, _ in readable], [image for _, image in readable]
        proposals = self._model.propose(images, samples) if readable else []
        features = self._model.encode(images, [one.boxes for one in proposals]) if readable else []
        made, found = {}, Check()
        for sample, image, proposed, encoded in zip(samples, images, proposals, features, strict=True):
            made[sample.key] = _row(sample.key, self._model.shape(image), proposed, encoded)
            found += self._checked(sample, self._model.shape(image), proposed, encoded)
        return [made.get(sample.key) or _empty(sample.key) for sample, _ in batch], found

    def _checked(
        self, sample: Sample, shape: tuple[int, int], proposed: RegionProposals, encoded: NDArray[np.float32]
    ) -> Check:
        """Compare the features of regions that cover an annotated object with the names of the classes.

        Crowds are left out: such a box covers many objects, and may fill half of the image.
        """
        if self._vectors is None or FIELD not in sample.fields:
            return Check()
        objects = read_objects(sample)
        objects.check_size(*shape, sample.key)
        numbers = [self._numbers.get(plain_word(label), -1) for label in objects.labels]
        known = [place for place, number in enumerate(numbers) if number >= 0 and not objects.crowd[place]]
        if not known or not len(proposed.boxes):
            return Check(objects=len(known))
        shared = overlaps(proposed.boxes, objects.boxes[known])
        covering = shared.max(axis=1) >= MATCHED
        truth = np.array(numbers)[known][shared.argmax(axis=1)]
        right = covering & ((encoded @ self._vectors.T).argmax(axis=1) == truth)
        covered = shared.max(axis=0) >= MATCHED
        return Check(int(covering.sum()), int(right.sum()), len(known), int(covered.sum()))


COLUMNS: Mapping[str, pa.DataType] = {
    "key": pa.string(),
    "height": pa.int32(),
    "width": pa.int32(),
    "boxes": pa.list_(pa.float32()),
    "scores": pa.list_(pa.float32()),
    "features": pa.binary(),
}
SCHEMA = pa.schema(COLUMNS)


def _row(key: str, shape: tuple[int, int], proposed: RegionProposals, encoded: NDArray[np.float32]) -> dict[str, Any]:
    height, width = shape
    fractions = (proposed.boxes / [width, height, width, height]).astype(np.float32)
    boxes, scores = fractions.reshape(-1).tolist(), proposed.scores.astype(np.float32).tolist()
    features = np.ascontiguousarray(encoded, np.float16).tobytes()
    return {"key": key, "height": height, "width": width, "boxes": boxes, "scores": scores, "features": features}


def _empty(key: str) -> dict[str, Any]:
    return {"key": key, "height": 0, "width": 0, "boxes": [], "scores": [], "features": b""}
