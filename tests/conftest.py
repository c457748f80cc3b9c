"""What the tests share: a quiet environment, one Ray for the session, an S3 server and a web server on loopback.

The environment is set here, before ray, torch or botocore are imported, so that worker processes inherit it.
"""

import atexit
import fcntl
import gc
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.shards.sample import Sample, sample_key
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards
from pipeline.shards.storage import Folder, file_digest
from pipeline.shards.tar import TarWriter

ROOT = Path(__file__).resolve().parent.parent

os.environ.update(
    {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MPLBACKEND": "Agg",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "OMP_NUM_THREADS": "1",
        # Ray listens on every address of this machine; a token from here is not written into the home folder.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        # A report to Ray Train blocks for up to this long.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Jobs run as sub-processes: `python` must be this one.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }
)
for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "MLFLOW_TRACKING_URI", "PYTHONDONTWRITEBYTECODE", "RAY_ADDRESS"):
    os.environ.pop(name, None)


CLUSTERS = {"ray_cluster", "nodes"}


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep in one process of pytest-xdist what shares something costly. Slow tests may take longer.

    One group are all tests that need a Ray, another each file's tests with a fixture of their module.
    """
    for item in items:
        fixtures = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009 - private, and the only place
        if CLUSTERS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group("ray"))
        elif any(fixture.scope in ("module", "class") for defined in fixtures.values() for fixture in defined):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))


def pytest_collection_finish() -> None:
    """Leave the million objects of imported packages out of each garbage collection: a twentieth of the tests' time."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # packages report what is left at the end


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder ``name`` that ``make`` fills once per run, by whichever worker of pytest-xdist comes first."""
    base = factory.getbasetemp()
    # The parent is shared by the workers of a run; without workers it is shared by all runs of this user.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"once-{name}"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "whole").exists():
            (folder / "made").mkdir()
            make(folder / "made")
            (folder / "whole").touch()
    return folder / "made"


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Temporary files lie in pytest's folder, which is cleared later: killed processes leave theirs behind.

    Those of Ray lie elsewhere, since paths of sockets have to be short.
    """
    os.environ["RAY_TMPDIR"] = folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    os.environ["TMPDIR"] = tempfile.tempdir = str(tmp_path_factory.mktemp("temporary"))
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """No test cuts the power, so nothing has to be on the disk. Other processes do wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state and with one thread, whichever tests ran before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
        # Sums are bit-identical with equal numbers of threads only; and a test may leave more threads than there are
        # free cores, which then wait for one another.
        sys.modules["torch"].set_num_threads(1)


Count = Callable[[Any, Mapping[str, Any], Any], int]


def counted_once(count: Count) -> Count:
    """``count`` of :mod:`pipeline.training.flops`, once for each method, its config and the keys of its batch."""
    known: dict[Any, int] = {}

    def counted(method: Any, batch: Mapping[str, Any], mode: Any) -> int:
        parameters = tuple((name, one.shape, one.requires_grad) for name, one in method.named_parameters())
        key = (type(method), repr(method.config), method.training, parameters, tuple(batch))
        if key not in known:
            known[key] = count(method, batch, mode)
        return known[key]

    return counted


_remembering: list[Count] = []


@pytest.fixture(autouse=True)
def work_is_counted_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting the work of a step takes up to three seconds, for each length of its texts, and few tests look at it.

    The tests of the count itself count each time.
    """
    flops: Any = sys.modules.get("pipeline.training.flops")
    if flops is None or request.path.name == "test_flops.py":
        return
    if not _remembering:
        _remembering.append(counted_once(flops.count))
    monkeypatch.setattr(flops, "count", _remembering[0])


@dataclass(frozen=True)
class RayCluster:
    """The Ray of this session; ``environment`` lets a sub-process join it."""

    address: str

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with ``RAY_ADDRESS`` set to the cluster."""
        return {**os.environ, "RAY_ADDRESS": self.address}


@pytest.fixture(scope="session")
def ray_cluster(s3_endpoint: str) -> Iterator[RayCluster]:
    """One Ray for all tests: four logical CPUs and the custom resources of cluster.yaml.

    It starts after the S3 server, so that its workers inherit the server's address.
    """
    import ray

    # Sockets lie below this folder and their paths have to be short.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    context = ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        resources={"data_worker": 4, "train_worker": 4},
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=folder,
    )
    yield RayCluster(address=context.address_info["gcs_address"])
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of an in-memory S3 server, also in ``AWS_ENDPOINT_URL`` for this and all later processes."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    yield os.environ["AWS_ENDPOINT_URL"]
    os.environ.pop("AWS_ENDPOINT_URL", None)
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str) -> str:
    """The URI of a new, empty bucket: ``s3://test-…``."""
    import s3fs

    uri = f"s3://test-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem().mkdir(uri)
    return uri


@dataclass(frozen=True)
class Reply:
    """What the loopback server answers: a body, or the first ``cut`` bytes of it, after ``delay`` seconds."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int | None = None


Answer = bytes | Reply | Callable[[int], "bytes | Reply"]


class WebServer:
    """Serves a dict of path to bytes, :class:`Reply`, or a function of how often the path was asked for before.

    A reply with an ``ETag`` that the client knows is answered with 304.
    """

    def __init__(self, files: Mapping[str, Answer]) -> None:
        self.files = {"/" + path.lstrip("/"): answer for path, answer in files.items()}
        self.requests: list[str] = []
        self.statuses: list[int] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """``http://127.0.0.1:port`` without a slash at the end."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        """Close the server; idempotent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def reply(self, path: str) -> Reply:
        """What ``path`` gets now; counts the request."""
        with self._lock:
            before = self.requests.count(path)
            self.requests.append(path)
        answer = self.files.get(path, Reply(b"no such file", status=404))
        if callable(answer):
            answer = answer(before)
        return answer if isinstance(answer, Reply) else Reply(answer)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                reply = server.reply(self.path)
                tag = reply.headers.get("ETag")
                if tag is not None and self.headers.get("If-None-Match") == tag:
                    reply = Reply(status=304, headers=reply.headers)
                server.statuses.append(reply.status)
                time.sleep(reply.delay)
                try:
                    self.send_response(reply.status)
                    for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(reply.body[: reply.cut])
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client gave up, as a test of timeouts makes it do

            def log_message(self, *_: object) -> None:
                """Stay quiet."""

        return Handler


class Serve:
    """The ``serve`` fixture: call it with the files; ``serve.Reply`` makes answers that are not plain bytes."""

    Reply = Reply

    def __init__(self) -> None:
        self._servers: list[WebServer] = []

    def __call__(self, files: Mapping[str, Answer]) -> WebServer:
        """Start a web server with ``files``; it stops when the test ends."""
        self._servers.append(WebServer(files))
        return self._servers[-1]

    def stop(self) -> None:
        """Stop every server."""
        for server in self._servers:
            server.stop()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """``serve({"a.jpg": data, "slow.jpg": serve.Reply(data, delay=2)}).url`` is a web server on loopback."""
    servers = Serve()
    yield servers
    servers.stop()


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "yellow": (230, 220, 40)}


def image(number: int, side: int = 72) -> bytes:
    """A noisy JPEG in the colour of ``number``."""
    import numpy as np
    import simplejpeg

    noise = np.random.default_rng(number).integers(-25, 26, (side, side, 3))
    colour = list(COLOURS.values())[number % len(COLOURS)]
    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    encoded: bytes = simplejpeg.encode_jpeg(pixels, quality=90)
    return encoded


def coloured_sample(shard: int, index: int, number: int) -> Sample:
    """Sample ``number`` with image, caption and json."""
    name = list(COLOURS)[number % len(COLOURS)]
    caption = f"a {'very ' * (number % 5)}{name} image number {number}"
    described = {"label": name, "caption": caption, "number": number}
    return Sample(
        sample_key(shard, index, 100),
        {"jpg": image(number), "txt": caption.encode(), "json": json.dumps(described).encode()},
    )


def drawn_objects(number: int, side: int = 72) -> bytes:
    """``boxes.json`` of one to three objects in the image of ``number``, the first in its colour."""
    import numpy as np

    numbers = np.random.default_rng(number)
    objects = []
    for nth in range(1 + number % 3):
        left, top = numbers.integers(0, side // 2, 2).tolist()
        width, height = numbers.integers(side // 5, side // 2, 2).tolist()
        polygon = [left, top, left + width, top, left + width / 2, top + height]
        name = list(COLOURS)[(number + nth) % len(COLOURS)]
        objects.append({"label": name, "bbox": [left, top, width, height], "segmentation": [polygon]})
    asked = [{"question": "what colour is it?", "answers": [objects[0]["label"]] * 9 + ["grey"]}]
    return json.dumps({"width": side, "height": side, "objects": objects, "questions": asked}).encode()


def write_drawn_regions(folder: Folder, shard: Shard, keys: Sequence[str], teacher: str, width: int) -> str:
    """A sidecar ``regions`` with three boxes and random unit features for each key, none for the last one."""
    import numpy as np
    import pyarrow as pa

    from pipeline.shards.sidecar import FACTS, write_sidecar

    numbers = np.random.default_rng(len(keys))
    rows = []
    for key in keys:
        count = 0 if key == keys[-1] else 3
        corners = np.sort(numbers.random((count, 2, 2)), axis=1).reshape(count, 4)
        features = numbers.standard_normal((count, width))
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        plain = {"boxes": corners.ravel().tolist(), "scores": [0.5] * count}
        rows.append({"key": key, "height": 72, "width": 72, **plain, "features": features.astype(np.float16).tobytes()})
    facts = {"width": width, "matched": 0, "right": 0, "teacher": teacher}
    table = pa.Table.from_pylist(rows).replace_schema_metadata({FACTS: json.dumps(facts).encode()})
    return write_sidecar(folder, shard, "regions", table, "maker")


def write_coloured_phrases(folder: Folder, shard: Shard, samples: Sequence[Sample]) -> str:
    """The sidecar ``phrases`` of these samples."""
    from pipeline.loaders.phrases import ReadSampleCaptions
    from pipeline.shards.sidecar import write_sidecar
    from pipeline.stages.annotate.phrases import PhraseMaker

    maker = PhraseMaker("rules", "txt", ReadSampleCaptions(caption="txt"))
    return write_sidecar(folder, shard, "phrases", maker.table(iter(samples), shard), maker.maker)


def write_drawn_frames(folder: Folder, shard: Shard, keys: Sequence[str], width: int = 32) -> str:
    """A sidecar ``frames`` with random features of 6 to 12 frames for each key, one per second."""
    import numpy as np
    import pyarrow as pa

    from pipeline.shards.sidecar import FACTS, write_sidecar
    from pipeline.stages.annotate.frame_features import SCHEMA

    numbers, rows = np.random.default_rng(len(keys)), []
    for key in keys:
        count = int(numbers.integers(6, 13))
        features = numbers.standard_normal((count, width)).astype(np.float16)
        times = np.arange(count, dtype=np.float32).tolist()
        rows.append({"key": key, "seconds": float(count), "times": times, "features": features.tobytes()})
    facts = {"teacher": "teacher", "width": width, "frames_per_second": 1.0}
    table = pa.Table.from_pylist(rows, schema=SCHEMA).replace_schema_metadata({FACTS: json.dumps(facts).encode()})
    return write_sidecar(folder, shard, "frames", table, "maker")


def timed_json(sample: Sample, number: int) -> bytes:
    """The sample's json with two or three timed captions, of six seconds in all."""
    described = json.loads(sample.fields["json"])
    starts = (0, 2, 4)[: 2 + number % 2]
    names = [list(COLOURS)[(number + nth) % len(COLOURS)] for nth in range(len(starts))]
    timed = [
        {"start": start, "end": start + 2.0, "text": f"now it is {name}"}
        for start, name in zip(starts, names, strict=True)
    ]
    return json.dumps({**described, "timed_captions": timed}).encode()


def tone(number: int) -> bytes:
    """A FLAC of half a second: a tone whose pitch is the number's, with noise."""
    import numpy as np

    from pipeline.shards.waveforms import encode_flac

    times = np.arange(8000) / 16_000
    noise = np.random.default_rng(number).normal(0, 0.02, 8000)
    sound = 0.5 * np.sin(2 * np.pi * 220 * 1.1 ** (number % 24) * times) + noise
    return encode_flac(sound[None].astype(np.float32), 16_000)


def film(number: int, side: int = 64) -> bytes:
    """An MP4 of two to four seconds, four frames a second: a square in the number's colour moves over grey."""
    import numpy as np

    from tests.videos import encoded_video

    frames = np.full((8 + number % 9, side, side, 3), 90, np.uint8)
    for nth, frame in enumerate(frames):
        left = (5 * number + 3 * nth) % (side - 16)
        frame[24:40, left : left + 16] = list(COLOURS.values())[number % len(COLOURS)]
    return encoded_video(frames, unit=Fraction(1, 4))


def far_pixels(number: int, side: int = 72) -> bytes:
    """``depth.png`` of a slope from one to three metres by the number, with a missing corner."""
    import numpy as np

    from pipeline.shards.depth_values import encode_depth

    slope = np.linspace(1, 2 + number % 2, side, dtype=np.float32)[:, None].repeat(side, axis=1)
    slope[:4, :4] = 0
    return encode_depth(slope)


def publish_coloured(
    place: Path,
    sizes: Sequence[int] = (7, 5, 8),
    spoil: dict[int, dict[str, bytes]] | None = None,
    regions: tuple[str, int] | None = None,
) -> Snapshot:
    """Publish shards of the given sizes in a folder; ``spoil`` replaces the fields of the samples with these numbers.

    With ``regions``, the digest of a teacher and the width of its features, samples have ``boxes.json``,
    ``depth.png``, a sound, a video and timed captions, and shards sidecars of stored regions, of the captions' phrases
    and of frames' features.
    """
    place.mkdir(parents=True, exist_ok=True)
    shards, number = [], 0
    for shard_id, size in enumerate(sizes):
        path = place / f"{shard_id:05d}.tar"
        with open(path, "wb") as file:
            writer = TarWriter(file)
            made_samples = []
            for index in range(size):
                made = coloured_sample(shard_id, index, number)
                made_samples.append(made)
                if regions:
                    made.fields["boxes.json"] = drawn_objects(number)
                    made.fields["depth.png"] = far_pixels(number)
                    made.fields["flac"] = tone(number)
                    made.fields["json"] = timed_json(made, number)
                    made.fields["mp4"] = film(number)
                if spoil and number in spoil:
                    made = Sample(made.key, spoil[number])
                writer.write(made)
                number += 1
            writer.close()
        digest = file_digest(path)
        shard = Shard(name=f"{shard_id:05d}", samples=size, bytes=path.stat().st_size, sha256=digest, sidecars={})
        if regions:
            keys = [one.key for one in made_samples]
            sidecars = {
                "frames": write_drawn_frames(Folder(place), shard, keys),
                "phrases": write_coloured_phrases(Folder(place), shard, made_samples),
                "regions": write_drawn_regions(Folder(place), shard, keys, *regions),
            }
            shard = replace(shard, sidecars=sidecars)
        shards.append(shard)
    return publish_shards(
        Folder(place),
        tuple(shards),
        fields=("boxes.json", "depth.png", "flac", "jpg", "json", "mp4", "txt") if regions else ("jpg", "json", "txt"),
        card=None,
        options={},
        rows=sum(sizes),
        dropped={},
    )


@pytest.fixture(scope="session")
def make_snapshot(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Snapshot]:
    """``make_snapshot(sizes, folder=None, spoil=None, regions=None)``: see :func:`publish_coloured`."""

    def make(
        sizes: Sequence[int] = (7, 5, 8),
        folder: Path | None = None,
        spoil: dict[int, dict[str, bytes]] | None = None,
        regions: tuple[str, int] | None = None,
    ) -> Snapshot:
        return publish_coloured(folder or tmp_path_factory.mktemp("snapshot"), sizes, spoil, regions)

    return make


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sqlite store of MLflow with all tables and no runs, made once per run; to be copied.

    This process does not wait for the disk when it writes into a sqlite store.
    """
    from sqlalchemy import Engine, event

    event.listen(Engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF").close())

    def make(folder: Path) -> None:
        from pipeline.tracking.store import client

        client(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()

    return make_once(tmp_path_factory, "mlflow", make) / "mlflow.db"


@pytest.fixture(scope="session")
def store(migrated_store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of one sqlite store for all tests of a worker; tests keep apart by experiment."""
    path: Path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    shutil.copy(migrated_store, path)
    return f"sqlite:///{path}"


@pytest.fixture
def own_store(migrated_store: Path, tmp_path: Path) -> str:
    """The URI of an empty sqlite store at ``tmp_path/mlflow.db``."""
    shutil.copy(migrated_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"
