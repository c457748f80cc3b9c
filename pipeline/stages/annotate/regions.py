"""Features of regions as a sidecar: what ViLD's image branch learns from (Gu, Lin, Kuo, Cui, 2021, section 3.2).

``00017.regions.parquet`` has a row for every sample that the tar stores: ``key``, ``height`` and ``width`` of the
image, ``boxes`` (x1, y1, x2, y2 as fractions of its sides, float32, one after the other), ``scores`` of the
proposals, and ``features``, L2-normalised float16 [n, D] as bytes in C order. Boxes and features are of the image as
it is stored, so an augmentation that moves the image moves the boxes and leaves the features. An image without
proposals, or one that cannot be read, has none.

Boxes that no longer belong to their features are the failure that goes unseen: training goes on and novel classes
stay at half their score. So each shard is checked while it is made. Where a proposal covers an object of a class that
the annotations name, the feature is compared with the class names' text features; the share that is right is kept
with the shard, and below a floor the job stops. It also stops where regions cover less than a tenth of these objects,
since then there is nothing to compare.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import DataError, SidecarError
from pipeline.shards.objects import FIELD, overlaps, plain_word, read_objects
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import FACTS, read_sidecar, read_sidecar_schema, sidecar_file
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.annotator import Annotation, annotate
from pipeline.stages.shard_tasks import Workers

logger = logging.getLogger(__name__)

JOB = "jobs/extract_region_features.py"
MATCHED = 0.5  # intersection over union from which on a proposal shows an object
COVERED = 0.1  # share of the objects that any proposer covers whose boxes fit the images


@dataclass(frozen=True)
class RegionProposals:
    """Boxes x1, y1, x2, y2 in pixels, float64 [n, 4], the best first, and their scores float64 [n]."""

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]


class RegionModel(Protocol):
    """What this stage needs: a proposer and an image tower; ``maker`` is the digest of both and of the crop rule."""

    maker: str
    facts: Mapping[str, Any]
    """What readers should know: ``teacher``, ``proposer``, ``crop``, ``width`` D; kept with the features."""

    def prepare(self, image: bytes) -> Any | None:
        """The decoded image, ``None`` where it cannot be read; called from many threads."""
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
    """Loads the model in the process that will use it, for a number of CPU threads; pickles."""

    def __call__(self, threads: int) -> RegionModel: ...


@dataclass(frozen=True, kw_only=True)
class RegionOptions:
    """How the features are kept and checked."""

    name: str = "regions"
    """Name of the sidecar: a plain word, so that those of several models can lie side by side."""
    pictures_at_once: int = 8
    """Images whose regions are encoded together."""
    overwrite: bool = False
    """Replace the features of another model or other settings, and those that were checked by other classes."""
    floor: float = 0.1
    """Least zero-shot accuracy of features, of a shard's and of all, on regions that cover an object of ``classes``;
    0 never stops."""
    least_matched: int = 50
    """Regions that must cover an object before the floor counts, and objects before it counts whether they are covered.
    """

    def __post_init__(self) -> None:
        require(self.name.isidentifier(), "name", self.name, "a plain word")
        require(self.pictures_at_once >= 1, "pictures_at_once", self.pictures_at_once, "1 or more")
        require(0 <= self.floor <= 1, "floor", self.floor, "0 to 1")
        require(self.least_matched >= 1, "least_matched", self.least_matched, "1 or more")


@dataclass(frozen=True)
class Check:
    """What annotated objects say of regions: of ``matched`` regions that cover one, the features of ``right`` were
    nearest to its name; of ``objects`` of the classes, crowds apart, ``covered`` have a region."""

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
        """The share that is right; 0 where nothing matched."""
        return self.right / self.matched if self.matched else 0.0


@dataclass(frozen=True)
class Found:
    """What a shard's sidecar says of itself: the number of its regions, what was found when they were made, and the
    digest of the classes by which that was (``classes_digest``)."""

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
        """Raises ``SidecarError`` for a sample without a row."""
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
    """Give every shard its regions and publish that; shards that have them are not read again.

    ``classes`` are the names of annotated classes by which the features are checked; none where nothing is annotated.

    Raises:
        SidecarError: those of another model, proposer or crop are there.
        DataError: a damaged shard, or features that do not fit their boxes.
        StorageError: the store refused (the same command goes on from there), or another job is at work in the folder.
    """
    load = LoadRegionMaker(make, tuple(classes), options)
    facts = {"checked_by": classes_digest(classes)} if classes else {}
    annotation = Annotation(name=options.name, overwrite=options.overwrite, facts=facts)
    return annotate(snapshot, load, annotation, workers, use_gpu)


def read_regions(folder: Folder, shard: Shard, name: str = "regions", maker: str | None = None) -> ShardRegions:
    """The regions of ``shard``'s stored samples.

    Raises:
        SidecarError: missing, of another tar, by another maker, or no regions.
    """
    table = read_sidecar(folder, shard, name, JOB, maker)
    facts = _facts(table.schema)
    if "width" not in facts or not {"boxes", "scores", "features"} <= set(table.column_names):
        raise SidecarError(f"{folder.join(sidecar_file(shard, name))} holds no regions; make it with {JOB}")
    return ShardRegions(table, facts)


def read_found(folder: Folder, shard: Shard, name: str = "regions") -> Found:
    """What the regions of ``shard`` say of themselves; they are not read.

    Raises:
        SidecarError: missing, of another tar, or no regions.
    """
    facts = _facts(read_sidecar_schema(folder, shard, name, JOB))
    try:
        check = Check(*(int(facts[number]) for number in ("matched", "right", "objects", "covered")))
        return Found(int(facts["regions"]), check, str(facts["checked_by"]))
    except (KeyError, TypeError, ValueError) as error:
        file = folder.join(sidecar_file(shard, name))
        raise SidecarError(
            f"{file} says not what was found in it ({error!r}): make it again with --overwrite"
        ) from error


def classes_digest(classes: Sequence[str]) -> str:
    """SHA-256 hex of the names of classes, whatever their order; empty where there are none."""
    names = sorted(plain_word(name) for name in classes)
    return hashlib.sha256("\n".join(names).encode()).hexdigest() if names else ""


def together(found: Sequence[Found], classes: Sequence[str]) -> Check:
    """What was found in all shards that were checked by ``classes``; how many were not is logged as a warning."""
    digest = classes_digest(classes)
    checked = [one.check for one in found if one.checked_by == digest]
    if classes and len(checked) < len(found):
        others, again = len(found) - len(checked), "--overwrite makes them again"
        logger.warning("%d shards were finished before and not checked by these classes; %s", others, again)
    return sum(checked, Check())


def judge(found: Check, options: RegionOptions, where: str) -> None:
    """Raise ``DataError`` where what was found in ``where`` is too little to be right."""
    if not options.floor:
        return
    if found.objects >= options.least_matched and found.covered < COVERED * found.objects:
        raise DataError(
            f"{where}: {found}, less than a tenth: the boxes do not fit the images, or regions are proposed of other "
            "things (--floor 0 lets it pass)"
        )
    if found.matched >= options.least_matched and found.accuracy < options.floor:
        raise DataError(
            f"{where}: {found}; the first share is less than floor {options.floor}: the boxes do not fit the images, "
            "or this teacher does not know these classes"
        )


def _facts(schema: pa.Schema) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((schema.metadata or {}).get(FACTS, b"{}"))
    return facts


@dataclass(frozen=True)
class LoadRegionMaker:
    """Loads what makes a shard's table."""

    make: MakeRegionModel
    classes: tuple[str, ...]
    options: RegionOptions

    def __call__(self, threads: int) -> "RegionMaker":
        return RegionMaker(self.make(threads), self.classes, self.options, threads)


class RegionMaker:
    """The regions of a shard's samples as a table; decodes ahead in ``threads`` threads."""

    def __init__(self, model: RegionModel, classes: tuple[str, ...], options: RegionOptions, threads: int) -> None:
        self._model, self._options, self._threads = model, options, threads
        self._numbers = {plain_word(name): number for number, name in enumerate(classes)}
        self._vectors = model.class_vectors(classes) if classes else None
        self._checked_by = classes_digest(classes)
        self.maker = model.maker

    def table(self, samples: Iterator[Sample], shard: Shard) -> pa.Table:
        """The sidecar's rows, a chunk for each batch of images; raises ``DataError`` where the check fails."""
        parts, found = [SCHEMA.empty_table()], Check()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="prepare") as pool:
            for batch in _decoded(samples, self._options.pictures_at_once, pool, self._model):
                made, check = self._rows(batch)
                parts.append(pa.Table.from_pylist(made, schema=SCHEMA))
                found += check
        logger.info("%s: %s", shard.name, found)
        judge(found, self._options, shard.name)
        # Chunks stay as they are: one of all features of a shard may be larger than the 2 GB that a chunk can be.
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
        """Compares the features of regions that cover an annotated object with the names of the classes.

        A crowd is no truth: its box is that of many things, and may cover half of the image.
        """
        if self._vectors is None or FIELD not in sample.fields:
            return Check()
        things = read_objects(sample)
        things.check_size(*shape, sample.key)
        numbers = [self._numbers.get(plain_word(label), -1) for label in things.labels]
        known = [place for place, number in enumerate(numbers) if number >= 0 and not things.crowd[place]]
        if not known or not len(proposed.boxes):
            return Check(objects=len(known))
        shared = overlaps(proposed.boxes, things.boxes[known])
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


def _decoded(
    samples: Iterator[Sample], size: int, pool: ThreadPoolExecutor, model: RegionModel
) -> Iterator[list[tuple[Sample, Any | None]]]:
    """Batches with their images; the next batch is being decoded while one is worked on."""

    def begin(sample: Sample) -> tuple[Sample, Any]:
        content = sample.image()
        return sample, None if content is None else pool.submit(model.prepare, content)

    ahead = [begin(sample) for sample in islice(samples, size)]
    while ahead:
        following = [begin(sample) for sample in islice(samples, size)]
        yield [(sample, future.result() if future is not None else None) for sample, future in ahead]
        ahead = following
