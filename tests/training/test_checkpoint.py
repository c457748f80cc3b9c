"""Checkpoints: whole or not there, on disks and in object stores."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipeline.errors import DataError, SettingError, StorageError
from pipeline.models.clip import Clip
from pipeline.models.slip import Slip
from pipeline.shards.storage import Folder
from pipeline.training.checkpoint import (
    Checkpoints,
    EvaluationRecord,
    Meta,
    check_position,
    checkpoint_folder,
    load_method,
    load_optimizer,
    read_evaluation,
    read_meta,
    read_weights,
    write_evaluation,
)
from pipeline.training.optimizer import AdamW, make_optimizer


@pytest.fixture(scope="module")
def method() -> Clip:
    return Clip(Clip.smallest())


def meta(step: int, evaluate: bool = False) -> Meta:
    return Meta(step=step, samples_seen=8 * step, batch_size=8, lanes=2, seed=0, snapshot="d" * 64, evaluate=evaluate)


def stepped(method: Clip) -> torch.optim.Optimizer:
    """An optimiser with a state."""
    optimizer = make_optimizer(AdamW(), method)
    for parameter in method.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "disk" else f"{request.getfixturevalue('s3')}/run"


def test_life_of_checkpoints(place: str, method: Clip) -> None:
    """Saved, found, read back, evaluated, half written, pruned: the same on a disk and on S3."""
    checkpoints = Checkpoints(place)
    assert checkpoints.latest() is None and checkpoints.whole() == []
    optimizer = stepped(method)
    for step, evaluate in ((2, True), (4, False), (10, False)):
        checkpoints.save(method, optimizer, meta(step, evaluate))
    checkpoints.at(12).write_atomic("model.safetensors", b"half")
    assert [found.meta.step for found in checkpoints.whole()] == [2, 4, 10]
    latest = checkpoints.latest()
    assert latest is not None and latest.meta == Meta(
        **{**vars(meta(10)), "created": latest.meta.created, "description": latest.meta.description}
    )

    loaded = load_method(place)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in method.state_dict().items())
    restored = make_optimizer(AdamW(), method)
    load_optimizer(restored, latest.folder)
    for first, second in zip(
        optimizer.state_dict()["state"].values(), restored.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(first[name], second[name]) for name in first)

    checkpoints.remove_broken()
    assert not checkpoints.at(12).names()
    checkpoints.prune(keep=1, keep_waiting=10)
    assert [found.meta.step for found in checkpoints.whole()] == [2, 10]  # 2 still waits for its evaluation
    waiting = checkpoints.whole()[0]
    assert waiting.waits and read_evaluation(waiting) is None
    write_evaluation(waiting, EvaluationRecord(step=2, metrics={"a": 1.0}))
    assert not waiting.waits and read_evaluation(waiting) == EvaluationRecord(step=2, metrics={"a": 1.0})
    checkpoints.prune(keep=1, keep_waiting=10)
    assert [found.meta.step for found in checkpoints.whole()] == [10]
    assert not checkpoints.at(2).names()


def test_waiting_checkpoints_are_bounded(tmp_path: Path, method: Clip, caplog: pytest.LogCaptureFixture) -> None:
    """The oldest may be under evaluation and stays; those after it go, each with a sentence."""
    checkpoints = Checkpoints(str(tmp_path))
    left = []
    for step in range(1, 9):
        checkpoints.save(method, stepped(method), meta(step, evaluate=step != 2))
        checkpoints.prune(keep=2, keep_waiting=step + 1)
        checkpoints.prune(keep=2, keep_waiting=3)
        left.append([found.meta.step for found in checkpoints.whole()])
    assert left[3:] == [[1, 3, 4], [1, 3, 4, 5], [1, 3, 4, 5, 6], [1, 4, 5, 6, 7], [1, 5, 6, 7, 8]]
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(" before it was evaluated: ")[0][-1] for message in messages] == ["3", "4"]
    checkpoints.prune(keep=2, keep_waiting=1)
    assert [found.meta.step for found in checkpoints.whole()] == [1, 7, 8]


def test_state_loads_without_unpickling(tmp_path: Path, method: Clip) -> None:
    saved = Checkpoints(str(tmp_path)).save(method, stepped(method), meta(1))
    state = torch.load(Path(saved.folder.path) / "state.pt", weights_only=True)
    assert set(state) == {"optimizer"}


def test_a_hostile_state_is_refused(tmp_path: Path, method: Clip) -> None:
    optimizer = stepped(method)
    saved = Checkpoints(str(tmp_path)).save(method, optimizer, meta(1))

    class Hostile:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return os.system, (f"touch {tmp_path}/pwned",)

    torch.save({"optimizer": Hostile()}, Path(saved.folder.path) / "state.pt")
    with pytest.raises(DataError, match=r"state\.pt holds more than plain tensors"):
        load_optimizer(optimizer, saved.folder)
    assert not (tmp_path / "pwned").exists()


def test_overwriting_is_never_seen_half(tmp_path: Path, method: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that dies on its last file leaves no checkpoint, even where a whole one stood."""
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(method, stepped(method), meta(1))
    whole = Folder.write_atomic

    def full(self: Folder, name: str, content: object) -> None:
        if name == "state.pt":
            raise OSError(28, "No space left on device")
        whole(self, name, content)  # type: ignore[arg-type]

    monkeypatch.setattr(Folder, "write_atomic", full)
    with pytest.raises(StorageError, match="the disk is full"):
        checkpoints.save(method, stepped(method), meta(1))
    assert checkpoints.whole() == []
    with pytest.raises(StorageError):
        checkpoints.save(method, stepped(method), meta(2))
    monkeypatch.undo()
    checkpoints.remove_broken()
    assert os.listdir(tmp_path / "checkpoints") == []


def test_older_names_of_weights_load(tmp_path: Path) -> None:
    """SLIP's statistics were once called mean and variance."""
    torch.manual_seed(0)
    slip = Slip(Slip.smallest())
    for norm in (slip.head.first_norm, slip.head.second_norm):
        norm.running_mean.normal_()
        norm.running_var.uniform_(1, 2)
    saved = Checkpoints(str(tmp_path)).save(slip, stepped(slip), meta(2)).folder
    old = {
        name.replace("running_mean", "mean").replace("running_var", "variance"): tensor
        for name, tensor in safetensors.torch.load(saved.read_bytes("method.safetensors")).items()
    }
    assert {"head.first_norm.mean", "head.second_norm.variance"} < set(old)
    saved.write_atomic("method.safetensors", safetensors.torch.save(old))
    expected = slip.state_dict()
    for found in (load_method(saved.uri).state_dict(), read_weights(saved)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_state_in_another_order_of_memory_steps_alike(tmp_path: Path) -> None:
    """Fused optimisers trust state and weights to lie alike: a contiguous state of channels-last weights does not."""
    weights = [torch.arange(2.0 * 3 * 4 * 4).view(2, 3, 4, 4).to(memory_format=torch.channels_last) for _ in range(2)]
    ends = []
    for weight, other in zip(weights, (False, True), strict=True):
        weight.requires_grad_()
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        weight.grad = torch.sin(weight.detach())
        optimizer.step()
        if other:
            plain = optimizer.state_dict()
            state = {key: value.contiguous() for key, value in plain["state"][0].items()}
            torch.save({"optimizer": {**plain, "state": {0: state}}}, tmp_path / "state.pt")
            load_optimizer(optimizer, Folder(tmp_path))
        optimizer.step()
        ends.append(weight.detach())
    assert torch.equal(*ends)


def test_broken_meta_data_are_named(tmp_path: Path, method: Clip) -> None:
    saved = Checkpoints(str(tmp_path)).save(method, stepped(method), meta(1))
    for text in ("{", '{"step": "many"}', json.dumps({**vars(meta(1)), "surprise": 1})):
        saved.folder.write_atomic("meta.json", text.encode())
        with pytest.raises(DataError, match=r"meta\.json"):
            read_meta(saved.folder)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 16), ("lanes", 4), ("seed", 1), ("snapshot", "e" * 64)])
def test_a_position_in_another_order_is_refused(tmp_path: Path, method: Clip, name: str, value: object) -> None:
    saved = Checkpoints(str(tmp_path)).save(method, stepped(method), meta(1))
    settings = {"batch_size": 8, "lanes": 2, "seed": 0, "snapshot": "d" * 64}
    check_position(saved, **settings)  # type: ignore[arg-type]
    with pytest.raises(SettingError) as caught:
        check_position(saved, **{**settings, name: value})  # type: ignore[arg-type]
    assert caught.value.field == name


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("url,caption")
    assert checkpoint_folder(str(tmp_path / "list.csv")) is None
    with pytest.raises(SettingError, match=r"checkpoint: got '.*list.csv', expected a checkpoint's folder"):
        load_method(str(tmp_path / "list.csv"))
