"""Every kind of damage to a snapshot is reported; an undamaged snapshot has no problems."""

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SampleError
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.selection import SELECTIONS, select
from pipeline.shards.sidecar import write_sidecar
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.verify import Verification, folder_problems


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of drawn samples, the first with a sidecar and a selection."""
    place = tmp_path_factory.mktemp("whole")
    folder = Folder(place)
    snapshot = drawn_snapshot(folder, samples=12, rows_per_shard=6)
    first = select(folder, snapshot.shards[0], np.array([0, 2, 2, 5]))
    keys = pq.read_table(place / "00000.parquet")["key"].to_pylist()
    digest = write_sidecar(folder, first, "scores", pa.table({"key": keys, "score": [0.5] * 6}), "rule-1")
    shards = (replace(first, sidecars={"scores": digest}), *snapshot.shards[1:])
    again = {"card": None, "options": snapshot.options, "rows": 12, "dropped": {}}
    publish_shards(folder, shards, fields=snapshot.fields, **again)  # type: ignore[arg-type]
    return place


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def problems(place: Path | str, snapshot: Snapshot | None = None, **more: Callable[[bytes], object]) -> dict[str, str]:
    """The reported problems, joined, by shard; those of the folder under ``folder``."""
    snapshot = snapshot or read_snapshot(str(place))
    checks = Verification(snapshot=snapshot, **more)  # type: ignore[arg-type]
    found = {shard.name: json.loads(checks.check(number)) for number, shard in enumerate(snapshot.shards)}
    found["folder"] = folder_problems(Folder(place), snapshot)
    return {name: "; ".join(said) for name, said in found.items() if said}


def test_an_undamaged_snapshot_is_well(place: Path, s3: str) -> None:
    assert problems(place) == {}
    first = sorted(path.stem for path in (place / "_snapshots").glob("*.json"))[0]
    assert problems(place, read_snapshot(f"{place}@{first}")) == {}
    remote = Folder(s3).folder("set")
    for path in place.rglob("*"):
        if path.is_file():
            remote.write_atomic(str(path.relative_to(place)), path.read_bytes())
    assert problems(remote.uri) == {}
    remote.write_atomic("00001.tar", (place / "00001.tar").read_bytes()[:-512])
    assert list(problems(remote.uri)) == ["00001"]


def flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def cut(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def stale_sidecar(place: Path) -> None:
    shard = read_snapshot(str(place)).shards[0]
    table = pq.read_table(place / "00000.scores.parquet")
    write_sidecar(Folder(place), replace(shard, sha256="0" * 64), "scores", table, "rule-1")


def foreign_sidecar(place: Path) -> None:
    shard = read_snapshot(str(place)).shards[0]
    write_sidecar(Folder(place), shard, "scores", pa.table({"key": ["nobody"]}), "rule-1")


def fewer_rows(place: Path) -> None:
    table = pq.read_table(place / "00001.parquet")
    pq.write_table(table.slice(1), place / "00001.parquet")


def other_stats(place: Path) -> None:
    plain = json.loads((place / "00001_stats.json").read_text())
    (place / "00001_stats.json").write_text(json.dumps({**plain, "successes": 5}))


def selection(place: Path) -> Path:
    return next((place / SELECTIONS).glob("*.parquet"))


DAMAGES: list[tuple[Callable[[Path], object], str, str]] = [
    (lambda place: (place / "00001.tar").unlink(), "00001", "00001.tar is missing"),
    (lambda place: cut(place / "00001.tar", 0.4), "00001", "00001.tar is truncated: .* not a whole tar"),
    (lambda place: cut(place / "00001.tar", 0.999), "00001", "00001.tar is truncated"),
    (lambda place: flip(place / "00001.tar", 1200), "00001", r"00001.tar has other bytes than the snapshot says"),
    (lambda place: flip(place / "00001.tar", 3), "00001", r"not a whole tar|other bytes"),
    (lambda place: (place / "00001.parquet").unlink(), "00001", "00001.parquet is missing"),
    (lambda place: cut(place / "00001.parquet", 0.5), "00001", "00001.parquet is damaged"),
    (lambda place: (place / "00001_stats.json").unlink(), "00001", "00001_stats.json is missing"),
    (lambda place: cut(place / "00001_stats.json", 0.5), "00001", "00001_stats.json is damaged"),
    (fewer_rows, "00001", "00001.parquet has 5 rows, 00001_stats.json says 6; .*lacks 1 that it holds"),
    (other_stats, "00001", "00001_stats.json says 5 samples, the snapshot 6"),
    (lambda place: (place / "00000.scores.parquet").unlink(), "00000", "00000.scores.parquet is missing"),
    (lambda place: cut(place / "00000.scores.parquet", 0.5), "00000", "00000.scores.parquet is damaged"),
    (stale_sidecar, "00000", "00000.scores.parquet is stale"),
    (foreign_sidecar, "00000", "other bytes than the snapshot says.*1 keys that 00000.tar has not, such as nobody"),
    (lambda place: selection(place).unlink(), "00000", "_selections/.* is missing"),
    (lambda place: flip(selection(place), 40), "00000", "_selections/.* is damaged"),
    (lambda place: (place / ".tmp-abc.tar").write_bytes(b"x"), "folder", ".tmp-abc.tar was left by a killed run"),
    (lambda place: (place / "_snapshots" / ".tmp-1").write_bytes(b"x"), "folder", "_snapshots/.tmp-1 was left"),
    (lambda place: (place / "00007.tar").write_bytes(b"x"), "folder", "00007.tar has no 00007_stats.json"),
    (
        lambda place: (place / "00001.boxes.parquet").write_bytes(b"x"),
        "folder",
        "00001.boxes.parquet is in no snapshot",
    ),
    (
        lambda place: (place / "_snapshots" / "00009-x.shards.parquet").write_bytes(b"x"),
        "folder",
        "00009-x.shards.parquet was left",
    ),
    (lambda place: (place / "sizes.json").write_text("{}"), "folder", "sizes.json does not have the sizes"),
    (
        lambda place: cut(sorted((place / "_snapshots").glob("*.json"))[0], 0.5),
        "folder",
        "00000-.* is not a whole snapshot",
    ),
]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_each_damage_is_named_and_nothing_else(place: Path, number: int) -> None:
    damage, where, said = DAMAGES[number]
    damage(place)
    found = problems(place)
    assert list(found) == [where]

    assert re.search(said, found[where], re.DOTALL), found


def test_members_are_checked(tmp_path: Path) -> None:
    """A tar whose digest fits, of samples that are not what the snapshot says."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in [
            ("a.jpg", b"x"),
            ("a.json", b"{}"),
            ("b.json", b"{broken"),
            ("c.jpg", b"y"),
            ("c.pickle", b""),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content = (tmp_path / "0.tar").read_bytes()

    shard = Shard(name="0", samples=4, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    publish_shards(Folder(tmp_path), (shard,), fields=("jpg", "json"), card=None, options={}, rows=4, dropped={})
    said = problems(tmp_path)["0"]
    assert "holds 3 samples, the snapshot says 4" in said
    assert "1 samples without an image, the first b" in said
    assert "1 samples whose json cannot be parsed, the first b" in said
    assert "1 samples with members that the snapshot does not name (pickle), the first c" in said


def test_images_are_decoded_where_asked(place: Path) -> None:
    seen: list[bytes] = []

    def decode(content: bytes) -> None:
        seen.append(content)
        if len(seen) == 8:
            raise SampleError("failed_to_resize", "decode", "broken")

    found = problems(place, decode={"image": decode})
    assert list(found) == ["00001"] and "1 samples whose image cannot be decoded" in found["00001"]
    assert len(seen) == 12 and all(content[:2] == b"\xff\xd8" for content in seen)
