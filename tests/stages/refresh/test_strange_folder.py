"""A refresh in a folder that a stranger made: every file that it reads there is checked, and no name leads outside."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ClipmillError, DataError, SnapshotError
from pipeline.shards.adopt import find_shards
from pipeline.shards.storage import Folder
from pipeline.shards.writer import STATS, read_stats
from pipeline.stages.refresh.ledger import HIDDEN_FILE, read_hidden, read_rows
from pipeline.stages.refresh.plan import PLAN_FILE, PLANS, ROOT, read_plan
from pipeline.stages.refresh.purge import PURGE_FILE, finish_purge
from pipeline.stages.refresh.revalidation import _verdicts
from pipeline.stages.shard_tasks import Workers

HERE = Workers(processes_count=0)
DEEP = b'{"a":' * 20_000


def parquet(columns: dict[str, list[Any]], metadata: dict[bytes, bytes] | None = None) -> bytes:
    content = BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), content)
    return content.getvalue()


def sentence(error: pytest.ExceptionInfo[ClipmillError]) -> None:
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize(
    "mark",
    [
        b"",
        b"[]",
        DEEP,
        b"{}",
        {"of": "00000-ab", "names": {"00000": "../../victim"}},
        {"of": "00000-ab", "names": {"../victim": "00001"}},
        {"of": "00000-ab", "names": {"00000": 5}},
        {"of": "00000-ab", "names": [1]},
        {"of": "../x", "names": {}},
        {"of": None, "names": {}},
    ],
    ids=lambda mark: str(mark)[:40],
)
def test_the_mark_of_a_purge_names_shards(tmp_path: Path, mark: Any) -> None:
    """It says which files are deleted."""
    victims = [tmp_path / f"victim{ending}" for ending in (".tar", ".parquet", STATS)]
    for path in victims:
        path.touch()
    folder = Folder(tmp_path / "a" / "b")
    folder.folder(PLANS).write_atomic(PURGE_FILE, mark if isinstance(mark, bytes) else json.dumps(mark).encode())
    with pytest.raises(DataError, match=r"purge\.json is not the mark of a purge") as error:
        finish_purge(folder, HERE)
    sentence(error)
    assert all(path.exists() for path in victims)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PAR1",
        parquet({"other": [1]}),
        parquet({"shard_id": ["a"]}),
        parquet({"shard_id": [None]}),
        parquet({"shard_id": [-1]}),
        parquet({"shard_id": [0.5]}),
        parquet({"shard_id": [0]}, {b"clipmill.first": b"x"}),
        parquet({"shard_id": [0]}, {b"clipmill.first": b"-1"}),
        parquet({"shard_id": [0]}, {b"clipmill.plan": b"\xff"}),
    ],
    ids=range(10),
)
def test_a_plan_has_numbers_of_shards(tmp_path: Path, content: bytes) -> None:
    folder = Folder(tmp_path)
    folder.folder(PLANS).write_atomic(PLAN_FILE, content)
    with pytest.raises(DataError, match=r"plan\.parquet is not a plan of clipmill.*delete it") as error:
        read_plan(folder, ROOT)
    sentence(error)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        parquet({"other": [1]}),
        parquet({"shard": [0], "position": [-1], "reason": ["gone"]}),
        parquet({"shard": [None], "position": [0], "reason": ["gone"]}),
        parquet({"shard": ["a"], "position": [0], "reason": ["gone"]}),
    ],
    ids=range(5),
)
def test_hidden_samples_have_positions(make_snapshot: Any, tmp_path: Path, content: bytes) -> None:
    first = make_snapshot((2,), tmp_path)
    second = make_snapshot((3,), tmp_path)
    assert second.parent == first.id
    folder = Folder(tmp_path)
    assert read_hidden(folder, second) == {}
    folder.folder(f"{PLANS}/{first.id}").write_atomic(HIDDEN_FILE, content)
    with pytest.raises(SnapshotError, match=r"hidden\.parquet is damaged") as error:
        read_hidden(folder, second)
    sentence(error)


@pytest.mark.parametrize("content", [b"", b"PAR1PAR1", parquet({"key": ["a"], "url": ["b"]})], ids=range(3))
def test_a_list_of_rows_has_their_status(tmp_path: Path, content: bytes) -> None:
    Folder(tmp_path).write_atomic("00000.parquet", content)
    with pytest.raises(DataError, match=r"00000\.parquet (is damaged|lists no rows: it has no column status)") as error:
        read_rows(Folder(tmp_path), "00000")
    sentence(error)


@pytest.mark.parametrize(
    "content", [b"", parquet({"a": [1]}), parquet({"position": [None], "verdict": ["same"]})], ids=range(3)
)
def test_results_of_a_revalidation_are_whole(make_snapshot: Any, tmp_path: Path, content: bytes) -> None:
    (shard,) = make_snapshot((2,), tmp_path).shards
    Folder(tmp_path / "x").write_atomic("00000.parquet", content)
    with pytest.raises(DataError, match="is damaged.*delete it to ask again") as error:
        _verdicts(Folder(tmp_path / "x"), shard)
    sentence(error)


STRANGE = [b"", b"[]", b"null", DEEP, {"successes": "many"}, {"successes": -1}, {"count": 2**70}, {"count": [1]}]


@pytest.mark.parametrize("stats", STRANGE, ids=lambda stats: str(stats)[:20])
def test_stats_of_a_tar_are_counts(make_snapshot: Any, tmp_path: Path, stats: Any) -> None:
    make_snapshot((2,), tmp_path)
    folder = Folder(tmp_path)
    folder.write_atomic("00000" + STATS, b"{}")
    adoption = find_shards(folder)  # before its mark is replaced
    folder.write_atomic("00000" + STATS, stats if isinstance(stats, bytes) else json.dumps(stats).encode())
    problem = json.loads(adoption.read_tar(0))["problem"]
    assert "00000_stats.json" in problem and "\n" not in problem and len(problem) < 700
    with pytest.raises(SnapshotError, match="was not written by clipmill") as error:
        read_stats(folder, "00000")
    sentence(error)


@pytest.mark.parametrize(
    "known",
    [
        b"",
        parquet({"name": ["00000"]}),
        parquet({"name": ["00000"], "stamp": ["x"], "stats": ["["]}),
        parquet({"name": ["00000"], "stamp": ["x"], "stats": ['{"shard": "../../x"}']}),
        parquet({"name": [None], "stamp": [None], "stats": [None]}),
        parquet({"name": ["00000"], "stamp": ["x"], "stats": ["[" * 50_000]}),
    ],
    ids=range(6),
)
def test_what_an_adoption_remembers_is_read_again_where_it_is_not_whole(
    make_snapshot: Any, tmp_path: Path, known: bytes
) -> None:
    make_snapshot((2,), tmp_path)
    folder = Folder(tmp_path)
    folder.folder("_snapshots").write_atomic("adopted.parquet", known)
    adoption = find_shards(folder)
    assert adoption.known == {} and json.loads(adoption.read_tar(0))["successes"] == 2
    for before in (b"", b"[]", b'{"stamp": 1}', b"[" * 50_000, b'{"stamp": "x", "stats": "[]"}'):
        folder.folder("_snapshots/adopting").write_atomic("00000.json", before)
        assert json.loads(adoption.read_tar(0))["successes"] == 2
