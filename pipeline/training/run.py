"""The settings of a training run, and the record by which the same command resumes it.

``{output_folder}/run.json`` holds the settings that decide the result, the data pinned to a snapshot, and the tracker's
run id. The same command resumes the run. A command that would change the result is refused with the reason.
"""

import json
import logging
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pipeline.config import Scalar, flatten, from_plain, parse_json, require, writable_folder
from pipeline.errors import DataError, SettingError, SidecarError
from pipeline.loaders.batches import LoaderConfig
from pipeline.loaders.mixture import TrainingData, make_order, mixed, parts_of, places, read_data
from pipeline.loaders.order import SampleOrder
from pipeline.loaders.planned_order import PlannedOrder
from pipeline.loaders.samples import check_fields, check_sidecars
from pipeline.loaders.text import caption_field
from pipeline.models.method import EmbeddingMethod, method_class, method_name
from pipeline.shards.snapshot import Snapshot, read_snapshot, snapshot_ids
from pipeline.shards.storage import Folder, Guard
from pipeline.training.checkpoint import resolved
from pipeline.training.fp8 import check_installed
from pipeline.training.measure import MeasurementConfig
from pipeline.training.optimizer import AdamW, Optimizer
from pipeline.training.writer import Saving

logger = logging.getLogger(__name__)

RECORD = "run.json"
MOST_WORKERS = 100_000
DATA_FOLDER = "the folder of a snapshot; jobs/refresh_dataset.py makes one"

# Settings that may change between starts: places, speed, intervals of writing; and the length, which may grow.
LENGTH = ("epochs", "steps")
FREE = (
    *LENGTH,
    "output_folder",
    "data",
    "workers",
    "micro_batch",
    "exchange",
    "max_skipped_steps",
    "sharding",
    "checkpoint_activations",
    "compile_blocks",
    "log_every_steps",
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "keep_checkpoints",
    "keep_waiting",
    "tokens",
    "saving",
    "measuring",
    "evaluate_every_steps",
    "loader",
    "cluster",
)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the training workers run; no option here changes the result."""

    cpus_per_worker: int = 1
    """CPUs reserved per worker, 1 or more; also the worker's threads on a machine without a GPU."""
    accelerator: Literal["auto", "gpu", "cpu"] = "auto"
    """One GPU per worker, or none; auto checks the cluster's nodes when the job starts. Without workers, gpu and auto
    use this machine's first GPU, if it has one."""
    train_resource: str = "train_worker"
    """Custom resource that places workers on the nodes that offer it (see cluster.yaml), if the cluster has it."""
    max_failures: int = 3
    """Restarts after worker failures before the run gives up; -1 for no limit. Preempted nodes do not count."""
    start_timeout_seconds: float = 600.0
    """Seconds to wait for the workers' nodes, which may have to boot."""
    resize_seconds: float = 60.0
    """For a range of workers: seconds between checks for free room. Growing restarts all workers from the latest
    checkpoint and repeats the work since then."""

    def __post_init__(self) -> None:
        require(self.cpus_per_worker >= 1, "cpus_per_worker", self.cpus_per_worker, "1 or more")
        require(self.max_failures >= -1, "max_failures", self.max_failures, "-1 or more")
        for name in ("start_timeout_seconds", "resize_seconds"):
            require(getattr(self, name) > 0, name, getattr(self, name), "more than 0")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The training recipe; the defaults are the CLIP paper's where it has one (its appendix F)."""

    output_folder: str = ""
    """Folder of the checkpoints: an absolute path or an fsspec URI. The same folder resumes the run in it."""
    data: str = ""
    """Training snapshot: FOLDER for its latest, or FOLDER@ID; or several with weights: FOLDER=0.7,FOLDER=0.3."""
    workers: int | str = 0
    """Training processes on the Ray cluster; 0 trains in this process, without Ray. A range such as 2:8 uses as many
    as fit the cluster, and follows it when it grows or loses nodes."""
    batch_size: int = 32768
    """Samples per step, over all workers."""
    micro_batch: int | None = None
    """Rows per forward pass in each worker (gradient caching), to save memory; none for all rows. Takes a third more
    time. The result differs only by rounding, and by batch normalisation and dropout, as with other worker counts."""
    exchange: Literal["gather", "ring"] = "gather"
    """Exchange of features in tiled losses: gather (all at once), or ring (passed around, which needs less memory)."""
    epochs: float = 32.0
    """Passes over the data; may be a fraction."""
    steps: int | None = None
    """Number of steps of the whole run; replaces epochs."""
    warmup_steps: int = 2000
    """Steps of linear learning rate warm-up."""
    optimizer: Optimizer = field(default_factory=AdamW)
    clip_grad_norm: float | None = None
    """Maximum gradient norm; none disables clipping, as in the paper."""
    max_skipped_steps: int = 10
    """Consecutive steps with a non-finite loss or gradient that are skipped; one more stops the run."""
    ema_decay: float | None = None
    """Decay per step of a moving average of the weights, such as 0.9999, lower in the first steps; none disables it.
    Checkpoints hold both weights; evaluate the average as FOLDER:ema."""
    precision: Literal["auto", "bf16", "fp32", "fp8"] = "auto"
    """Precision of matrix products: bf16 or fp32 (TF32 on GPUs); auto is bf16 on GPUs that have it, else fp32. fp8 is
    bf16 with 8-bit linear layers, using torchao on GPUs like the H100; it is faster only with --compile-blocks."""
    sharding: Literal["none", "full"] = "none"
    """full shards weights, gradients and optimiser state over the workers (FSDP2), for models that exceed one GPU's
    memory; slower for smaller models. Checkpoints are the same."""
    checkpoint_activations: bool = False
    """Store only the input of each tower block and recompute its activations in the backward pass: less memory, a third
    more time, the same result."""
    compile_blocks: bool = False
    """Compile the towers' blocks, and losses in tiles, with torch.compile: a slow first step, then faster ones."""
    seed: int = 0
    """Seed of initial weights, sample order and augmentation."""
    caption: str = "txt"
    """Field of the captions: txt, or json:KEY."""
    tokens: str = ""
    """Sidecar with the captions' tokens, made by jobs/tokenize_dataset.py; if empty, captions are tokenised during
    loading. The result is the same; the sidecar helps with slow tokenizers, not with CLIP's."""
    lanes: int = 32
    """Positions in the data from which a batch is read; reduced to a divisor of the batch size."""
    shuffle_block: int = 8192
    """Samples of a lane that are shuffled together."""
    log_every_steps: int = 20
    """Steps between logged metrics. At these steps the run also checks for skipped steps and for a preemption notice,
    which triggers a checkpoint."""
    checkpoint_every_steps: int | None = None
    """Steps between checkpoints; the last step always writes one."""
    checkpoint_every_minutes: float | None = 30.0
    """Minutes between checkpoints, checked when metrics are logged."""
    keep_checkpoints: int = 3
    """Number of newest checkpoints to keep, in addition to those that wait for an evaluation."""
    keep_waiting: int = 10
    """Older checkpoints to keep until they are evaluated; checkpoints beyond this number are deleted unevaluated."""
    saving: Saving = field(default_factory=Saving)
    evaluate_every_steps: int | None = None
    """Steps between evaluations, which run beside the training; none evaluates only the last step."""
    measuring: MeasurementConfig = field(default_factory=MeasurementConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    cluster: Cluster = field(default_factory=Cluster)

    def __post_init__(self) -> None:
        require(_is_number_or_range(self.workers), "workers", self.workers, "0 or more, or a range such as 2:8")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        share = max(self.fewest_workers, 1)
        require(self.batch_size % share == 0, "batch_size", self.batch_size, f"a multiple of the {share} workers")
        micro = self.micro_batch
        require(micro is None or micro >= 1, "micro_batch", micro, "1 or more, or none")
        require(self.epochs > 0, "epochs", self.epochs, "more than 0")
        skips = self.max_skipped_steps
        require(skips >= 0, "max_skipped_steps", skips, "0 (stop at the first) or more")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2**63 - 1")
        require(self.lanes >= 1, "lanes", self.lanes, "1 or more")
        require(self.shuffle_block >= 1, "shuffle_block", self.shuffle_block, "1 or more")
        require(self.keep_checkpoints >= 1, "keep_checkpoints", self.keep_checkpoints, "1 or more")
        require(self.keep_waiting >= 1, "keep_waiting", self.keep_waiting, "1 or more")
        require(self.log_every_steps >= 1, "log_every_steps", self.log_every_steps, "1 or more")
        for name in ("steps", "clip_grad_norm", "checkpoint_every_minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "more than 0, or none")
        decay = self.ema_decay
        require(decay is None or 0 <= decay < 1, "ema_decay", decay, "0 to less than 1, or none")
        for name in ("checkpoint_every_steps", "evaluate_every_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "1 or more, or none")
        caption_field(self.caption)

    @property
    def fewest_workers(self) -> int:
        """The smallest number of workers of this run; 0 without Ray."""
        return int(str(self.workers).partition(":")[0])

    @property
    def most_workers(self) -> int:
        """The largest number of workers; equals :attr:`fewest_workers` if the number is fixed."""
        return int(str(self.workers).rpartition(":")[2])


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run with all settings resolved, as each worker gets it: ``method`` is the method's config.

    ``evaluates`` is true if a follower evaluates the checkpoints that are marked for it.
    """

    method: Any
    run: Run
    snapshot: TrainingData
    steps: int
    evaluates: bool = False
    guard: Guard | None = None
    """Permission to write into the output folder: its lease."""

    @property
    def folder(self) -> Folder:
        """The output folder; with a guard, it is asked before every write."""
        return Folder(self.run.output_folder, self.guard)

    def order(self) -> SampleOrder:
        """The order of samples."""
        return order_of(self.method, self.run, self.snapshot)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of ``run.json``; ``steps`` is the length of the run, 0 in a record that does not have it."""

    settings: Mapping[str, Scalar]
    snapshot: str
    digest: str
    tracking_run: str = ""
    steps: int = 0
    tracking_token: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tag of the tracker's run. It is stored before the run exists, and finds a run whose id was not stored."""

    def __post_init__(self) -> None:
        for name in ("tracking_run", "tracking_token"):
            require(is_plain_id(getattr(self, name)), name, getattr(self, name), "letters, digits, _ and -")
        require(self.steps >= 0, "steps", self.steps, "0 or more")


def prepare(method: Any, run: Run, *, evaluates: bool = False, guard: Guard | None = None) -> tuple[RunPlan, RunRecord]:
    """Resolve a run before anything is started: its folder, its data, its number of steps.

    Writes ``run.json`` into a new folder. In the folder of an earlier start of the same run, the data stay pinned to
    the snapshot of the first start, even if the data set has grown since, and the run may become longer.

    Raises:
        SettingError: an invalid setting of the method, an unusable folder, or a folder that holds another run.
        DataError: the data cannot be read, or lack a field that the method reads.
    """
    kind = method_class(method_name(method))
    started = with_weights(method)
    kind.check(started)
    cached = run.micro_batch is None or issubclass(kind, EmbeddingMethod)
    require(
        cached, "micro_batch", run.micro_batch, f"none, since the losses of {method_name(method)} need whole batches"
    )
    if run.precision == "fp8":
        check_installed()
    best = run.saving.keep_best
    require(evaluates or not best, "keep_best", best, "0 without evaluations, which rank the checkpoints")
    run = replace(run, output_folder=writable_folder("output_folder", run.output_folder))
    require(bool(run.data), "data", run.data, DATA_FOLDER)
    folder = Folder(run.output_folder, guard)
    earlier = read_record(folder)
    snapshot = _pinned(run.data, earlier)
    most = f"at most {snapshot.samples}, the number of samples of the data"
    require(run.batch_size <= snapshot.samples, "batch_size", run.batch_size, most)
    _check_readable(snapshot, method, run)
    run = replace(run, data=snapshot.uri)
    order = order_of(started, run, snapshot)
    steps = run.steps or order.steps(run.epochs)
    settings = {"method": method_name(method), **flatten(method), **_deciding(run)}
    record = RunRecord(settings=settings, snapshot=snapshot.uri, digest=snapshot.digest, steps=steps)
    if earlier is not None:
        _check_same(folder, earlier, record)
        _check_length(folder, earlier, run, steps)
        record = replace(earlier, steps=steps)
    if record != earlier:
        write_record(folder, record)
    plan = RunPlan(method=started, run=run, snapshot=snapshot, steps=steps, evaluates=evaluates, guard=guard)
    return plan, record


def pinned_data(run: Run) -> TrainingData:
    """The data of the run in the output folder, as :func:`prepare` pins them: of a new run the newest ones.

    Raises:
        SettingError: no data, or others than those of the run in the folder.
        DataError: the data or the record cannot be read.
    """
    require(bool(run.data), "data", run.data, DATA_FOLDER)
    return _pinned(run.data, read_record(Folder(run.output_folder)) if run.output_folder else None)


def with_weights(method: Any) -> Any:
    """The config with the checkpoint's folder in ``pretrained``, if that names a run or a moving average."""
    pretrained = getattr(method, "pretrained", None)
    return replace(method, pretrained=resolved(pretrained)) if pretrained else method


def keep_tracking_run(plan: RunPlan, record: RunRecord, run_id: str) -> None:
    """Store the tracker's run id, for the next start of the same command."""
    if record.tracking_run != run_id:
        write_record(plan.folder, replace(record, tracking_run=run_id))


def order_of(method: Any, run: Run, data: TrainingData) -> SampleOrder:
    """The order of the samples for the run's settings; ``method`` is the config of a method that may plan batches.

    Raises:
        SettingError: settings with which batches cannot be planned or divided.
    """
    planner = method_class(method_name(method)).batch_planner(method)
    if planner is not None:
        single = isinstance(data, Snapshot)
        require(single, "data", run.data, "one snapshot: a method that plans its batches chooses the samples itself")
        require(run.sharding == "none", "sharding", run.sharding, "none for a method that plans its batches")
        planner.check(data.samples, run.batch_size)
        return PlannedOrder(data.samples, run.batch_size)
    return make_order(data, seed=run.seed, batch_size=run.batch_size, lanes=run.lanes, shuffle_block=run.shuffle_block)


def read_record(folder: Folder) -> RunRecord | None:
    """The record of the run in ``folder``, or ``None``.

    Raises:
        DataError: ``run.json`` exists but is invalid.
    """
    try:
        return from_plain(RunRecord, parse_json(folder.read_bytes(RECORD)), folder.join(RECORD))
    except FileNotFoundError:
        return None
    except (ValueError, NotADirectoryError) as error:
        raise DataError(f"{folder.join(RECORD)} was not written by a training run ({error})") from error


def is_plain_id(text: str) -> bool:
    """Whether ``text`` can be an id of a tracker's run, or is empty."""
    return re.fullmatch(r"[\w-]{0,64}", text, re.ASCII) is not None


def write_record(folder: Folder, record: RunRecord) -> None:
    """Write ``run.json``."""
    folder.write_atomic(RECORD, json.dumps(asdict(record), indent=2).encode())


def _is_number_or_range(workers: int | str) -> bool:
    fewest, colon, most = str(workers).partition(":")
    if not (fewest.isdecimal() and (most.isdecimal() or not colon)):
        return False
    return 1 <= int(fewest) <= int(most) <= MOST_WORKERS if colon else int(fewest) <= MOST_WORKERS


def _check_readable(snapshot: TrainingData, method: Any, run: Run) -> None:
    """Check, before a worker starts, that the data have what the method reads."""
    kind = method_class(method_name(method))
    settings = kind.reader_settings(run)
    check_fields(snapshot, kind.sample_fields(method, settings))
    wanted = kind.sidecars(method, settings)
    for part in parts_of(snapshot):
        check_sidecars(part, wanted)
    had = {name for shard in snapshot.shards for name in shard.sidecars}
    missing = next((one for one in wanted if one.name not in had), None)
    if missing is not None:
        raise SidecarError(f"{snapshot.uri} has no {missing.name}; make them with {missing.job}")


def _pinned(data: str, earlier: RunRecord | None) -> TrainingData:
    """The data of the first start; those of ``data`` for a first start, or if the data were moved."""
    if earlier is None:
        return read_data(data)
    pinned_before = [address for address, _ in places(earlier.snapshot)]
    before = {address.rpartition("@")[0]: address for address in pinned_before}
    wanted = [(_as_before(address, before), weight) for address, weight in places(data)]
    if len(wanted) == len(pinned_before):
        moved = zip(wanted, pinned_before, strict=True)
        wanted = [(_of_same_content(address, known), weight) for (address, weight), known in moved]
    found = mixed(wanted)
    if found.digest != earlier.digest:
        raise SettingError("data", data, f"{earlier.snapshot}, on which the run in this folder is trained")
    for address, (pinned, _) in zip((address for address, _ in places(data)), wanted, strict=True):
        if pinned != address and read_snapshot(address).uri != pinned:
            logger.info("%s has a newer snapshot; this run continues with %s", address, pinned)
    return found


def _as_before(address: str, before: Mapping[str, str]) -> str:
    """The snapshot of an earlier start in the same folder; ``address`` itself if it names a snapshot or was moved."""
    if "@" in address.rsplit("/", 1)[-1]:
        return address
    return before.get(Folder(address).uri, address)


def _of_same_content(address: str, known: str) -> str:
    """The snapshot in the folder ``address`` with the content of ``known``, which was moved; else ``address``."""
    if "@" in address.rsplit("/", 1)[-1]:
        return address
    content = known.rpartition("-")[2]
    same = [name for name in snapshot_ids(Folder(address)) if name.endswith(f"-{content}")]
    return f"{address}@{same[-1]}" if same else address


def _deciding(run: Run) -> dict[str, Scalar]:
    settings = flatten(run)
    return {
        name: value
        for name, value in settings.items()
        if not any(name == free or name.startswith(free + ".") for free in FREE)
    }


def _check_length(folder: Folder, earlier: RunRecord, run: Run, steps: int) -> None:
    """Check that the run becomes no shorter; log what a longer run does to the learning rate."""
    name, value = ("steps", run.steps) if run.steps else ("epochs", run.epochs)
    allowed = f"{earlier.steps} steps or more, which is the length of the run in {folder.uri}; or another folder"
    require(steps >= earlier.steps, name, value, allowed)
    if 0 < earlier.steps < steps:
        message = "the run in %s is extended from %d to %d steps; its learning rate follows the schedule of %d steps"
        logger.info(message, folder.uri, earlier.steps, steps, steps)


def _check_same(folder: Folder, earlier: RunRecord, now: RunRecord) -> None:
    before, method = earlier.settings.get("method"), now.settings["method"]  # two methods share few settings
    allowed = f"another folder, since this one holds a run of {before}, not of {method}"
    require(before == method, "output_folder", folder.uri, allowed)
    names = sorted({*earlier.settings, *now.settings})
    compared = [name for name in names if name not in LENGTH]  # records of older versions have them
    differing = [name for name in compared if earlier.settings.get(name) != now.settings.get(name)]
    if differing:
        first = differing[0]
        details = ", ".join(f"{name} {earlier.settings.get(name)}" for name in differing)
        allowed = f"{earlier.settings.get(first)}, since {folder.uri} holds a run with {details}; or another folder"
        raise SettingError(first, now.settings.get(first), allowed)
