#!/usr/bin/env python
"""Downloading and resizing images, side by side with img2dataset: samples per CPU second of whole processes.

    python tests/benchmarks/download_vs_img2dataset.py                    # all configurations, 8,000 rows each
    python tests/benchmarks/download_vs_img2dataset.py --count 400 --images 200 --processes 1 --modes border

A loopback server in a process of its own (not counted) serves photograph-like JPEGs of 640x480 to 1600x1200 over plain
HTTP. Both tools run as their users run them, on the same url table and with the same options, in turns. Counted is the
processor time of the whole process tree, start-up included; `marginal` in the conditions is what a further row costs
(difference to a run of half the rows). Images are joined by url and compared without their border; the mean leaves
equal ones out. One JSON line per configuration.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.codecs.image_encoding import ImageOptions, plan
from pipeline.shards.tar import TarShard

ROOT = Path(__file__).resolve().parents[2]
SIZES = ((640, 480), (640, 427), (800, 600), (1024, 768), (1024, 683), (1280, 960), (1280, 853), (1600, 1200))
BASE = 2048
TARGET = 256
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
Pixels = npt.NDArray[np.uint8]


# Images


def one_over_f(generator: np.random.Generator, exponent: float) -> npt.NDArray[Any]:
    """``[BASE, BASE]`` noise of mean 0 and deviation 1 with the amplitude spectrum f^-exponent."""
    frequency = np.hypot(np.fft.fftfreq(BASE)[:, None], np.fft.rfftfreq(BASE)[None])
    frequency[0, 0] = np.inf
    spectrum = generator.normal(size=frequency.shape) + 1j * generator.normal(size=frequency.shape)
    field = np.fft.irfft2(spectrum / frequency**exponent, (BASE, BASE))
    return np.asarray(field / field.std())


def scenes() -> list[Pixels]:
    """Four squares of coloured 1/f noise, as detailed as photographs, and scikit-learn's two photographs with grain."""
    from sklearn.datasets import load_sample_images

    found: list[Pixels] = []
    for seed in range(4):
        generator = np.random.default_rng(seed)
        light = 45 * one_over_f(generator, 1.35 + 0.05 * seed) + 120
        warm, green = (14 * one_over_f(generator, 1.5) for _ in range(2))
        pixels = np.stack([light - warm, light + 0.3 * green - 0.5 * warm, light + warm], 2)
        found.append(pixels.clip(0, 255).astype(np.uint8))
    for seed, photo in enumerate(load_sample_images().images):
        large = cv2.resize(photo[:, :, ::-1], (BASE, BASE * 2 // 3), interpolation=cv2.INTER_CUBIC).astype(float)
        grain = 9 * one_over_f(np.random.default_rng(9 + seed), 0.9)[: large.shape[0], :, None]
        found.append((large + grain).clip(0, 255).astype(np.uint8))
    return found


def draw_images(folder: Path, count: int) -> int:
    """Write ``count`` JPEGs (quality 85 to 92, 4:2:0), crops of the scenes; returns their bytes."""
    material, total = scenes(), 0
    folder.mkdir()
    for number in range(count):
        generator = np.random.default_rng(number)
        width, height = SIZES[number % len(SIZES)]
        scene = material[int(generator.integers(len(material)))]
        zoom = generator.uniform(1.0, min(scene.shape[1] / width, scene.shape[0] / height, 1.35))
        across, down = int(width * zoom), int(height * zoom)
        left, top = (int(generator.integers(1 + most)) for most in (scene.shape[1] - across, scene.shape[0] - down))
        crop = cv2.resize(scene[top : top + down, left : left + across], (width, height), interpolation=cv2.INTER_AREA)
        crop = cv2.convertScaleAbs(crop, alpha=generator.uniform(0.8, 1.1), beta=generator.uniform(-15, 25))
        body = cv2.imencode(".jpg", crop, (cv2.IMWRITE_JPEG_QUALITY, int(generator.integers(85, 93))))[1].tobytes()
        (folder / f"{number}.jpg").write_bytes(body)
        total += len(body)
    return total


def write_table(path: Path, address: str, images: int, rows: int) -> None:
    """A url table of ``rows`` different urls; beyond ``images`` they repeat under a new query."""
    urls = [f"{address}/{row % images}.jpg?copy={row // images}" for row in range(rows)]
    pq.write_table(pa.table({"url": urls, "caption": [f"image number {row}" for row in range(rows)]}), path)


# The server


class Images(asyncio.Protocol):
    """HTTP/1.1 GET of the files of a folder, connections kept alive unless the client says close."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._received = folder, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        """Answer every whole request."""
        self._received += data
        while b"\r\n\r\n" in self._received:
            request, _, self._received = self._received.partition(b"\r\n\r\n")
            name = request.split(b" ", 2)[1].decode().lstrip("/").partition("?")[0]
            body = (self._folder / Path(name).name).read_bytes()
            closing = b"connection: close" in request.lower()
            head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n"
            self._transport.write(head.encode() + (b"Connection: close\r\n\r\n" if closing else b"\r\n") + body)
            if closing:
                self._transport.close()


async def serve(folder: Path) -> None:
    """Serve for ever; the port is printed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Images(folder), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server process on ``folder``."""
    command = [sys.executable, __file__, "--serve", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.terminate()


# The runs


@dataclass(frozen=True)
class Cost:
    """Seconds of one run, of the processor (whole process tree) and of the wall clock."""

    cpu: float
    wall: float


class Meter:
    """Processor time of a process and all its descendants, those included that nobody waits for (Ray's workers)."""

    def __init__(self, root: int) -> None:
        self._root, self._seen, self._over = psutil.Process(root), dict[tuple[int, float], float](), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def finish(self) -> float:
        """The sum of what was last seen of every process: at most a tenth of a second each too little."""
        self._over.set()
        self._thread.join()
        return sum(self._seen.values())

    def _watch(self) -> None:
        family = {self._root}
        while not self._over.wait(0.1):
            for process in list(family):
                with contextlib.suppress(psutil.Error):
                    family.update(process.children(recursive=True))
                    times = process.cpu_times()
                    self._seen[process.pid, process.create_time()] = times.user + times.system


def measure(command: list[str], log: Path) -> Cost:
    """Run a command; its processor time is the larger of what the kernel tells of waited-for children and ours."""
    started = time.perf_counter()
    with open(log, "w") as sink:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=sink, stderr=sink)
        meter = Meter(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall, polled = time.perf_counter() - started, meter.finish()
    if process.returncode:
        raise SystemExit(f"{command} failed:\n{log.read_text()[-3000:]}")
    return Cost(max(polled, usage.ru_utime + usage.ru_stime), wall)


def our_command(table: Path, out: Path, rows: int, processes: int, threads: int, mode: str, exact: bool) -> list[str]:
    """jobs/refresh_dataset.py; one process is this process, two are Ray's."""
    command = [sys.executable, "jobs/refresh_dataset.py", "urls", "--url-list", str(table), "--caption-col", "caption"]
    command += ["--output-folder", str(out), "--image-size", str(TARGET), "--resize-mode", mode]
    command += ["--encode-quality", "95", "--allow-hosts", "127.0.0.1", "--connections-per-host", str(threads)]
    command += ["--thread-count", str(threads), "--number-sample-per-shard", str(rows // processes)]
    command += ["--processes-count", str(processes if processes > 1 else 0)]
    return [*command, "--exact"] if exact else command


def their_command(table: Path, out: Path, rows: int, processes: int, threads: int, mode: str) -> list[str]:
    """img2dataset's own command."""
    command = [str(Path(sys.executable).with_name("img2dataset")), "--url_list", str(table), "--input_format=parquet"]
    command += ["--url_col=url", "--caption_col=caption", "--output_folder", str(out), "--output_format=webdataset"]
    command += [f"--image_size={TARGET}", f"--resize_mode={mode}", "--encode_quality=95", "--enable_wandb=False"]
    command += [f"--thread_count={threads}", f"--number_sample_per_shard={rows // processes}"]
    return [*command, f"--processes_count={processes}"]


# Likeness


def read_outputs(folder: Path, most: int) -> dict[str, bytes]:
    """Url -> encoded image of the first ``most`` rows of the shards in ``folder``."""
    found: dict[str, bytes] = {}
    for tar in sorted(folder.glob("[0-9]*.tar")):
        shard = TarShard(tar)
        for index in range(len(shard)):
            fields = shard[index].fields
            found[json.loads(fields["json"])["url"]] = fields["jpg"]
    return {url: image for url, image in found.items() if int(url.partition("?copy=")[2]) == 0 or len(found) < most}


def likeness(ours: Path, theirs: Path, mode: str, images: int) -> dict[str, float]:
    """PSNR in dB between the two outputs, the border left out; equal bytes are counted apart."""
    mine, peers = read_outputs(ours, images), read_outputs(theirs, images)
    assert mine.keys() == peers.keys(), "both tools must have succeeded with the same urls"
    values: list[float] = []
    for url, image in mine.items():
        if image == peers[url]:
            continue
        one, other = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float) for data in (image, peers[url]))
        width, height = SIZES[int(url.rpartition("/")[2].partition(".")[0]) % len(SIZES)]
        inner = plan(width, height, ImageOptions(image_size=TARGET, resize_mode=mode)).resized  # type: ignore[arg-type]
        left, top = (one.shape[1] - inner[0]) // 2, (one.shape[0] - inner[1]) // 2
        window = np.s_[top : top + inner[1], left : left + inner[0]]
        error = float(np.mean((one[window] - other[window]) ** 2))
        values.append(99.0 if error == 0 else 10 * float(np.log10(255**2 / error)))
    found = {"compared": len(mine), "equal": len(mine) - len(values)}
    return found | ({"mean_db": round(statistics.mean(values), 2), "worst_db": round(min(values), 2)} if values else {})


# Side by side


@dataclass(frozen=True)
class Bench:
    """Folders and sizes of the benchmark."""

    place: Path
    address: str
    images: int
    rows: int
    rounds: int
    threads: int
    mean_bytes: int

    def run(self, tool: str, rows: int, processes: int, mode: str) -> tuple[Cost, Path]:
        """One run of "img2dataset", "default" or "exact" into a fresh folder."""
        out, table = self.place / f"{tool}-{rows}", self.place / f"{rows}.parquet"
        shutil.rmtree(out, ignore_errors=True)
        write_table(table, self.address, self.images, rows)
        if tool == "img2dataset":
            command = their_command(table, out, rows, processes, self.threads, mode)
        else:
            command = our_command(table, out, rows, processes, self.threads, mode, tool == "exact")
        return measure(command, self.place / "log.txt"), out

    def compare(self, processes: int, mode: str, ours: tuple[str, ...]) -> None:
        """All tools in turns; one printed line for each of ``ours``."""
        tools, costs, folders = ("img2dataset", *ours), dict[tuple[str, int], list[Cost]](), dict[str, Path]()
        for turn in range(self.rounds):
            for tool in tools if turn % 2 == 0 else tools[::-1]:
                for rows in (self.rows // 2, self.rows):
                    cost, folders[tool] = self.run(tool, rows, processes, mode)
                    costs.setdefault((tool, rows), []).append(cost)
        for tool in ours:
            like = likeness(folders[tool], folders["img2dataset"], mode, self.images)
            print(json.dumps(self._line(tool, processes, mode, costs, like)), flush=True)

    def _line(self, tool: str, processes: int, mode: str, costs: dict[tuple[str, int], list[Cost]], like: Any) -> Any:
        def rates(name: str, attribute: str, further: bool = False) -> list[float]:
            whole = [getattr(cost, attribute) for cost in costs[name, self.rows]]
            half = [getattr(cost, attribute) for cost in costs[name, self.rows // 2]]
            return [
                (self.rows - further * (self.rows // 2)) / (a - further * b) for a, b in zip(whole, half, strict=True)
            ]

        def pair(attribute: str, further: bool = False) -> dict[str, float]:
            mine, peers = rates(tool, attribute, further), rates("img2dataset", attribute, further)
            ratio = statistics.median(a / b for a, b in zip(mine, peers, strict=True))
            return {
                "ours": round(statistics.median(mine), 1),
                "peer": round(statistics.median(peers), 1),
                "ratio": round(ratio, 2),
            }

        conditions = {
            "mode": tool, "resize_mode": mode, "processes": processes, "threads": self.threads, "rounds": self.rounds,
            "images": self.images, "mean_bytes": self.mean_bytes, "marginal": pair("cpu", True),
            "wall": pair("wall"), "likeness": like,
        }  # fmt: skip
        name = "download_vs_img2dataset"
        return {"name": name, **pair("cpu"), "unit": "samples/CPU s", "n": self.rows, "conditions": conditions}


def main() -> None:
    """Parse, draw, serve, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2_000, help="different images")
    parser.add_argument("--count", type=int, default=8_000, help="rows of a run")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=32, help="requests at a time, on both sides")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--modes", nargs="*", default=["border", "keep_ratio"])
    parser.add_argument("--ours", nargs="*", default=["default", "exact"])
    parser.add_argument("--folder", help="keep images and outputs here (default: a temporary folder)")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(Path(options.serve)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(options.folder or scratch).absolute()
        images = place / f"images-{options.images}"
        if not images.exists():
            draw_images(images, options.images)
        size = sum(path.stat().st_size for path in images.iterdir()) // options.images
        with served(images) as address:
            bench = Bench(place, address, options.images, options.count, options.rounds, options.threads, size)
            for processes in options.processes:
                for mode in options.modes:
                    bench.compare(processes, mode, tuple(options.ours))


if __name__ == "__main__":
    main()
