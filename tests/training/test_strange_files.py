"""Files of a run, a checkpoint and an adaptation that a stranger wrote: one sentence, and no path is followed."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import from_json, from_plain
from pipeline.errors import ClipmillError, DataError, SettingError
from pipeline.models.clip import Clip
from pipeline.runs.child_runs import RUNS
from pipeline.runs.few_shot_records import FewShotRecord
from pipeline.shards.storage import Folder
from pipeline.tracking.runs import Tracking
from pipeline.training.adapt_artifact import read_record as read_adapter
from pipeline.training.checkpoint import (
    CONFIG,
    EVALUATION,
    META,
    Checkpoints,
    Meta,
    clip_address,
    load_method,
    read_evaluation,
    read_meta,
    stored_score,
)
from pipeline.training.optimizer import AdamW, make_optimizer
from pipeline.training.run import RECORD, RunRecord, read_record, write_record

DEEP = b'{"a":' * 20_000
TEXTS = [
    b"",
    b"null",
    b"[]",
    b"3",
    b'"x"',
    b"{}",
    DEEP,
    b"[" * 100_000,
    b"\xff\xfe",
    b'{"step": ' + b"9" * 5_000 + b"}",
]
IDS = ["empty", "null", "list", "number", "text", "no-keys", "deep", "deep-list", "no-utf8", "huge"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint of the tiny CLIP."""
    method = Clip(Clip.smallest())
    meta = Meta(step=3, samples_seen=6, batch_size=2, lanes=1, seed=0, snapshot="x")
    run = tmp_path_factory.mktemp("run")
    return Path(Checkpoints(str(run)).save(method, make_optimizer(AdamW(), method), meta).folder.path)


@pytest.fixture
def planted(checkpoint: Path) -> Any:
    """``planted(name, content)`` replaces a file of the checkpoint until the end of the test."""
    before: dict[Path, bytes | None] = {}

    def plant(name: str, content: bytes | dict[str, Any]) -> None:
        path = checkpoint / name
        before.setdefault(path, path.read_bytes() if path.exists() else None)
        if isinstance(content, dict):
            content = json.dumps({**json.loads(before[path] or b"{}"), **content}).encode()
        path.write_bytes(content)

    yield plant
    for path, content in before.items():
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)


def sentence(error: pytest.ExceptionInfo[ClipmillError]) -> None:
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize("text", TEXTS, ids=IDS)
def test_files_of_a_checkpoint_that_are_none(checkpoint: Path, planted: Any, text: bytes) -> None:
    planted(EVALUATION, text)
    with pytest.raises(DataError, match="is not the result of an evaluation") as error:
        stored_score(str(checkpoint), "a")
    sentence(error)
    planted(CONFIG, text)
    for read in (load_method, clip_address):
        with pytest.raises(DataError, match="does not describe a method") as error:
            read(str(checkpoint))
        sentence(error)
    planted(META, text)
    with pytest.raises(DataError, match="is not the meta data of a checkpoint") as error:
        read_meta(Folder(checkpoint))
    sentence(error)


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": 2**70},
        {"step": None},
        {"step": "x"},
        {"batch_size": -2},
        {"description": ["../../secret"]},
        {"description": ["/etc/passwd"]},
        {"description": [None]},
        {"description": 5},
        {"more": 1},
    ],
    ids=str,
)
def test_meta_data_are_in_range_and_name_files_of_the_folder(
    checkpoint: Path, planted: Any, change: dict[str, Any]
) -> None:
    planted(META, change)
    with pytest.raises(DataError, match="is not the meta data of a checkpoint") as error:
        load_method(str(checkpoint))
    sentence(error)


@pytest.mark.parametrize(
    "change",
    [
        {"method": 5},
        {"method": None},
        {"method": "../clip"},
        {"method": "os"},
        {"config": None},
        {"config": []},
        {"config": {"architecture": 7}},
        {"config": {"unknown": 7}},
        {"config": {"image_size": {"a": [[[[]]]]}}},
    ],
    ids=str,
)
def test_a_config_of_no_method_is_a_sentence(checkpoint: Path, planted: Any, change: dict[str, Any]) -> None:
    planted(CONFIG, change)
    with pytest.raises(DataError) as error:
        load_method(str(checkpoint))
    sentence(error)


@pytest.mark.parametrize(
    "text",
    [*TEXTS, b'{"preprocess_cfg": 5}', b'{"preprocess_cfg": {"mean": "x"}}'],
    ids=[*IDS, "number-of-images", "mean"],
)
def test_what_open_clip_reads_beside_it_is_checked(checkpoint: Path, planted: Any, text: bytes) -> None:
    planted("open_clip_config.json", text)
    if text == b"{}":
        load_method(str(checkpoint))
        return
    with pytest.raises(DataError, match="is not a complete checkpoint") as error:
        load_method(str(checkpoint))
    sentence(error)


@pytest.mark.parametrize("metrics", [None, 3, [1], {"a": "x"}, {"a": None}, {"a": [1]}], ids=str)
def test_an_evaluation_has_numbers(checkpoint: Path, planted: Any, metrics: Any) -> None:
    planted(EVALUATION, {"step": 3, "metrics": metrics})
    with pytest.raises(DataError, match="is not the result of an evaluation"):
        stored_score(str(checkpoint), "a")
    planted(EVALUATION, b'{"step": 3, "metrics": {"a": 0.5, "b": NaN}}')
    assert stored_score(str(checkpoint), "a") == 0.5 and stored_score(str(checkpoint), "b") is None
    (one,) = Checkpoints(str(checkpoint.parents[1])).whole()
    found = read_evaluation(one)
    assert found is not None and found.metrics["a"] == 0.5


@pytest.mark.parametrize("text", TEXTS, ids=IDS)
def test_records_that_are_none(tmp_path: Path, text: bytes) -> None:
    """Of a run, of an adaptation, of few-shot runs in MLflow, and configs given with ``--from``."""
    (tmp_path / RECORD).write_bytes(text)
    with pytest.raises(DataError, match=r"run\.json was not written by a training run") as error:
        read_record(Folder(tmp_path))
    sentence(error)
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(DataError, match="does not describe an adapter") as error:
        read_adapter(Folder(tmp_path))
    sentence(error)
    if text != b"{}":
        (tmp_path / RUNS).write_bytes(text)
        with pytest.raises(DataError, match="is no list of MLflow runs") as error:
            FewShotRecord(Tracking(), None, Folder(tmp_path), track=True)
        sentence(error)
    with pytest.raises(SettingError):
        from_json(RunRecord, text.decode(errors="replace"))


@pytest.mark.parametrize("value", ["../../run", "a b", "x' OR '1'='1", "a" * 65, 7, None, ["a"]], ids=str)
def test_ids_of_runs_are_words(tmp_path: Path, value: Any) -> None:
    record = {"settings": {}, "snapshot": "x", "digest": "y"}
    for name in ("tracking_run", "tracking_token"):
        (tmp_path / RECORD).write_text(json.dumps({**record, name: value}))
        with pytest.raises(DataError, match="was not written by a training run"):
            read_record(Folder(tmp_path))
    (tmp_path / RUNS).write_text(json.dumps({"parent": value}))
    with pytest.raises(DataError, match="is no list of MLflow runs"):
        FewShotRecord(Tracking(), None, Folder(tmp_path), track=True)


def test_a_record_comes_back_with_its_token(tmp_path: Path) -> None:
    one, other = (RunRecord(settings={"a": 1}, snapshot="x", digest="y") for _ in range(2))
    assert one.tracking_token != other.tracking_token
    write_record(Folder(tmp_path), one)
    assert read_record(Folder(tmp_path)) == one


def test_deep_values_in_a_config_are_a_sentence() -> None:
    value: Any = 1
    for _ in range(90):
        value = {"a": value}
    with pytest.raises(SettingError) as error:
        from_plain(RunRecord, {"settings": value, "snapshot": "x", "digest": "y"})
    assert len(str(error.value)) < 700
