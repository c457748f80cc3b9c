"""Grids of images a second from the stage, against one image at a time with open_clip's transform; and the data wait.

    python tests/benchmarks/grid_features.py                                    # a small ResNet on one CPU thread
    python tests/benchmarks/grid_features.py --device cuda --model RN50 --images 512 --rows-per-shard 64

Both start from encoded JPEGs (640 x 480) and end with float16 features [rows, columns, D] of the same weights. The
plain way opens an image with Pillow, resizes and pads it with open_clip's own transform (``resize_mode`` longest), and
runs open_clip's tower on it, one after another. That transform centres an image, so images are chosen that fill the
input, and features are compared where both see the same. Rounds in turns, each way in a process of its own: the stage's
keeps freed memory, as its workers do. CPU seconds of the threads with the towers are compared, too, since a machine may
be shared. Asked: twice as fast, equal features.

Then a transformer trains from the stored grids for ``--steps`` steps. Asked: it waits 3 % of the time for data at most.
"""

import argparse
import io
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from region_features import photographs

from pipeline.config import to_json
from pipeline.evaluation.allocator import keep_freed_memory
from pipeline.evaluation.grid_embedder import GridEmbedder
from pipeline.evaluation.models import load_model
from pipeline.loaders.batches import LoaderConfig, training_batches
from pipeline.loaders.order import Order
from pipeline.models.clipvil import SMALLEST, ClipVil, Config
from pipeline.models.method import build_method
from pipeline.models.towers.grid import GridTower
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards
from pipeline.shards.storage import Folder, file_digest
from pipeline.shards.tar import TarWriter
from pipeline.stages.annotate.embeddings import EmbedOptions
from pipeline.stages.annotate.grid_features import GridMaker, embed_grids, stored_grid
from pipeline.stages.shard_tasks import Workers

RESNET: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SMALL = "benchmark-small-resnet"


def register() -> None:
    """A narrow ResNet under a name of open_clip."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"{SMALL}.json").write_text(json.dumps(RESNET))
        open_clip.add_model_config(folder)


class Plain:
    """One image at a time, with Pillow, open_clip's transform and its tower."""

    def __init__(self, clip: Any, size: tuple[int, int]) -> None:
        config = dict(clip.model.visual.preprocess_cfg)
        mean = tuple(round(255 * one) for one in config["mean"])
        self.visual, self.device = clip.model.visual, clip.mean.device
        self.transform = open_clip.image_transform(
            size, is_train=False, mean=config["mean"], std=config["std"], resize_mode="longest", fill_color=mean
        )

    @torch.no_grad()
    def __call__(self, content: bytes) -> np.ndarray:
        """Float16 [rows, columns, D] of the whole input."""
        image = self.transform(Image.open(io.BytesIO(content)).convert("RGB"))[None].to(self.device)
        found = self.visual.forward_intermediates(
            image, indices=1, intermediates_only=True, normalize_intermediates=True
        )["image_intermediates"][0]
        return found[0].permute(1, 2, 0).half().cpu().numpy()


def prepare_process() -> None:
    """One CPU thread for the towers of this process, and the small ResNet."""
    torch.set_num_threads(1)
    register()


def load(model: str, device: str) -> Any:
    """A CLIP with random weights, also of its norms: open_clip's zeros would hide the residual blocks."""
    clip: Any = load_model(f"{model}:untrained", device)
    torch.manual_seed(0)
    for norm in clip.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            torch.nn.init.normal_(norm.bias, std=0.2)
            torch.nn.init.normal_(norm.running_mean, std=0.2)
            torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    return clip


def tower_of(clip: Any) -> GridTower:
    """The image tower up to its grid."""
    return GridTower(clip.model).to(clip.mean.device)


def write_shards(folder: Path, images: list[bytes], rows: int) -> Snapshot:
    """A snapshot of these images, each with a question."""
    shards = []
    asked = {"questions": [{"question": "is it red?", "answer": "yes"}, {"question": "what is it?", "answer": "no"}]}
    for number in range(0, len(images), rows):
        name = f"{number // rows:05d}"
        with open(folder / f"{name}.tar", "wb") as file:
            writer = TarWriter(file)
            for index, image in enumerate(images[number : number + rows]):
                fields = {"jpg": image, "questions.json": json.dumps(asked).encode()}
                writer.write(Sample(f"{number + index:09d}", fields))
            writer.close()
        path = folder / f"{name}.tar"
        size, digest = len(images[number : number + rows]), file_digest(path)
        shards.append(Shard(name=name, samples=size, bytes=path.stat().st_size, sha256=digest, sidecars={}))
    fields = ("jpg", "questions.json")
    return publish_shards(
        Folder(folder), tuple(shards), fields=fields, card=None, options={}, rows=len(images), dropped={}
    )


def plain_features(options: argparse.Namespace, measured: Connection) -> None:
    """The plain way in its process: at each message it sends the features of all images and the seconds they took."""
    prepare_process()
    plain, images = (
        Plain(load(options.model, options.device), (options.height, options.width)),
        photographs(options.images),
    )
    while measured.recv():
        measured.send(timed(lambda: [plain(image) for image in images]))


def timed(run: Callable[[], list[np.ndarray]]) -> tuple[list[np.ndarray], float, float]:
    """What ``run`` returns, seconds by the clock, and CPU seconds of this thread."""
    begin, busy = time.perf_counter(), time.thread_time()
    found = run()
    return found, time.perf_counter() - begin, time.thread_time() - busy


def compare(options: argparse.Namespace, images: list[bytes]) -> dict[str, Any]:
    """Images a second of both ways, in turns, and the lowest cosine of their features."""
    if options.device == "cpu":
        keep_freed_memory()  # as the workers of the stage do
    embedder = GridEmbedder(tower_of(load(options.model, options.device)), (options.height, options.width))
    stage = GridMaker(embedder, options.batch_size, threads=2)
    samples = [Sample(f"{number:09d}", {"jpg": image}) for number, image in enumerate(images)]
    shard: Any = None

    def run_ours() -> list[np.ndarray]:
        return [stored_grid(row, row["key"]) for row in stage.table(iter(samples), shard).to_pylist()]

    def run_plain() -> tuple[list[np.ndarray], float, float]:
        here.send(True)
        found: tuple[list[np.ndarray], float, float] = here.recv()
        return found

    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=plain_features, args=(options, there))
    process.start()
    pairs = list(zip(run_ours(), run_plain()[0], strict=True))
    cosine = min(_cosine(ours, theirs) for ours, theirs in pairs)
    seconds: dict[str, list[float]] = {"ours": [], "plain": [], "ours_cpu": [], "plain_cpu": []}
    for _ in range(options.rounds):
        for name, (_, took, busy) in (("ours", timed(run_ours)), ("plain", run_plain())):
            seconds[name].append(took)
            seconds[f"{name}_cpu"].append(busy)
    here.send(False)
    process.join()
    speed = {name: len(images) / statistics.median(took) for name, took in seconds.items()}
    return {**speed, "cosine": cosine}


def _cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The lowest cosine of the features of a cell; both have all cells, since the images fill the input."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    one, other = (grid.reshape(-1, grid.shape[2]).astype(np.float64) for grid in (ours, theirs))
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(axis=1) / np.maximum(norms, 1e-12)).min())


def data_wait(config: Config, snapshot: Snapshot, options: argparse.Namespace) -> float:
    """The part of the time of a training from stored grids in which the step waits for its batch."""
    torch.manual_seed(0)
    method = build_method(config).train()
    assert isinstance(method, ClipVil)
    device = torch.device(options.device)
    method.to(device)
    optimizer = torch.optim.AdamW([one for one in method.parameters() if one.requires_grad], lr=1e-4, fused=True)
    order = Order([shard.samples for shard in snapshot.shards], seed=0, batch_size=options.step_images, lanes=2)
    loader = LoaderConfig(loader_workers=options.loader_workers)
    warm = 3
    batches = training_batches(
        snapshot, method.readers(train=True), order, steps=range(options.steps + warm), rank=0, world=1, config=loader
    )
    waited = begin = 0.0
    for step in range(options.steps + warm):
        if step == warm:
            waited, begin = 0.0, time.perf_counter()
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        batch.pop("replaced")
        on_device = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=options.device == "cuda"):
            (loss,) = method.training_step(on_device).values()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()
    part = waited / (time.perf_counter() - begin)
    batches.close()
    return part


def main() -> None:
    """Both measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMALL, help="architecture, with random weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--height", type=int, default=384, help="input in pixels, of the images' ratio 3 : 4")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--images", type=int, default=96, help="of a shard: the tower waits for its first batch")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows-per-shard", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--step-images", type=int, default=16)
    parser.add_argument("--loader-workers", type=int, default=1)
    parser.add_argument("--small-text", type=int, nargs=3, default=(256, 4, 4), help="width, layers, heads")
    options = parser.parse_args()
    prepare_process()
    images = photographs(options.images)
    found = compare(options, images)
    where = (
        torch.cuda.get_device_name() if options.device == "cuda" else "one CPU thread, two that prepare in the stage"
    )
    cosine = f"cosine of features {found['cosine']:.5f} at worst"
    conditions = f"{options.model}, {options.height} x {options.width}, {len(images)} images, {where}, {cosine}"
    rates = {"ours": round(found["ours"], 1), "peer": round(found["plain"], 1)}
    ratio = round(found["ours"] / found["plain"], 2)
    cpu = {"ratio_cpu": round(found["ours_cpu"] / found["plain_cpu"], 2)} if options.device == "cpu" else {}
    report = {"name": "grid_features", **rates, "ratio": ratio, **cpu, "unit": "images/s"}
    print(json.dumps({**report, "conditions": conditions}))
    with tempfile.TemporaryDirectory() as folder:
        size = (options.height, options.width)
        embedder = GridEmbedder(tower_of(load_model(f"{options.model}:untrained", options.device)), size)
        snapshot = write_shards(Path(folder), images, options.rows_per_shard)
        made = embed_grids(
            snapshot, lambda threads: embedder, EmbedOptions(name="grid", batch_size=8), Workers(processes_count=0)
        )
        config = replace(
            SMALLEST,
            task="answers",
            tower=f"{options.model}:untrained",
            image_size=size,
            positions=64,
            frozen=True,
            grid="grid",
            most_cells=0,
            questions="questions.json",
            small_text=tuple(options.small_text),
            answers=("yes", "no"),
        )
        part = data_wait(config, made, options)
    conditions = (
        f"{options.step_images} images a step, transformer {tuple(options.small_text)}, {where}; {to_json(size)}"
    )
    report = {"name": "grid_training_wait", "ours": round(100 * part, 2), "asked": 3.0, "unit": "% of the time"}
    print(json.dumps({**report, "conditions": conditions}))


if __name__ == "__main__":
    main()
