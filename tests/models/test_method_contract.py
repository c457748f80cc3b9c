"""What every method in pipeline/models promises; a new one is tested here without a new test.

Run as a script, this file is both ranks of a process group: see ``two_processes``.
"""

import dataclasses
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import flatten, from_json, to_json
from pipeline.errors import SettingError
from pipeline.loaders.batches import LoaderConfig, training_batches
from pipeline.loaders.order import Order
from pipeline.loaders.samples import check_fields
from pipeline.models.class_vectors import clip_digest, open_teacher
from pipeline.models.method import Method, build_method, config_class, method_class, method_name, method_names
from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.training import distributed
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.optimizer import AdamW, make_optimizer, rate_scales

EVERY = pytest.mark.parametrize("name", method_names())
BATCH = 8


def build(name: str) -> Method:
    torch.manual_seed(0)
    return build_method(method_class(name).smallest())


def first_batch(method: Method, snapshot: Snapshot, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    order = Order([shard.samples for shard in snapshot.shards], seed=0, batch_size=BATCH, lanes=2)
    batches = training_batches(
        snapshot,
        method.readers(train=True),
        order,
        steps=range(1),
        rank=rank,
        world=world,
        config=LoaderConfig(loader_workers=0),
    )
    batch = next(batches)
    del batch["replaced"]
    return batch


def gradients(method: Method, batch: dict[str, Tensor], module: torch.nn.Module | None = None) -> dict[str, Tensor]:
    """The loss under the name ``loss``, and the gradient of each parameter under its name."""
    torch.manual_seed(0)
    total = torch.stack(list((module or method)(batch).values())).sum()
    total.backward()
    distributed.average_gradients(module or method)
    found = {name: value.grad for name, value in method.named_parameters() if value.grad is not None}
    return {"loss": total.detach(), **found}


def make_data(make: Callable[..., Snapshot]) -> Snapshot:
    """Samples with every field and sidecar that some method reads, by ``make_snapshot`` or its like."""
    teacher = open_teacher("clipmill-tiny:untrained")
    width = teacher.encode_text(teacher.tokenizer(["a word"])).shape[1]
    return make((12, 12), regions=(clip_digest(teacher), width))


@pytest.fixture(scope="module")
def snapshot(make_snapshot: Callable[..., Snapshot]) -> Snapshot:
    return make_data(make_snapshot)


@EVERY
def test_losses_are_scalars_and_gradients_are_where_they_should_be(name: str, snapshot: Snapshot) -> None:
    method = build(name)
    batch = first_batch(method, snapshot)
    assert set(method.batch_keys) <= set(batch)
    losses = method.training_step(batch)
    assert losses and all(loss.shape == () and loss.isfinite() for loss in losses.values())
    found = gradients(method, batch)
    for parameter_name, parameter in method.named_parameters():
        assert (parameter_name in found) == parameter.requires_grad, parameter_name
        if parameter.requires_grad:
            assert found[parameter_name].isfinite().all() and found[parameter_name].any(), parameter_name


@EVERY
def test_a_few_steps_lower_the_loss(name: str, snapshot: Snapshot) -> None:
    method = build(name)
    batch = first_batch(method, snapshot)
    optimizer = make_optimizer(AdamW(learning_rate=1e-3), method)
    losses = []
    for _ in range(8):
        losses.append(float(gradients(method, batch)["loss"]))
        optimizer.step()
        optimizer.zero_grad()
        method.after_step()
    assert losses[-1] < losses[0]


@EVERY
def test_every_trainable_parameter_is_in_one_group(name: str) -> None:
    method = build(name)
    grouped = [parameter for group in method.parameter_groups() for parameter in group["params"]]
    assert len({id(parameter) for parameter in grouped}) == len(grouped)
    assert {id(parameter) for parameter in grouped} == {
        id(parameter) for parameter in method.parameters() if parameter.requires_grad
    }


@EVERY
def test_layer_decay_divides_the_groups_and_drops_nothing(name: str) -> None:
    method = build(name)
    groups = make_optimizer(AdamW(layer_decay=0.5, text_rate=0.1), method).param_groups
    names = {id(parameter): parameter_name for parameter_name, parameter in method.named_parameters()}
    found = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    assert set(found) == {key for key, parameter in method.named_parameters() if parameter.requires_grad}
    scales = rate_scales(AdamW(layer_decay=0.5, text_rate=0.1), method)
    decays = {
        names[id(value)]: group.get("weight_decay") for group in method.parameter_groups() for value in group["params"]
    }
    for key, group in found.items():
        assert group["rate_scale"] == scales.get(key, 1.0), key
        assert group["weight_decay"] == (AdamW().weight_decay if decays[key] is None else decays[key]), key


@EVERY
def test_bfloat16_stays_near_float32(name: str, snapshot: Snapshot) -> None:
    method = build(name)
    batch = first_batch(method, snapshot)
    exact = gradients(method, batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = torch.stack(list(method(batch).values())).sum().detach()
    assert rough.dtype == torch.float32
    assert float(rough) == pytest.approx(float(exact), rel=0.05)


@EVERY
def test_a_checkpoint_gives_the_method_back(name: str, snapshot: Snapshot, tmp_path: Path) -> None:
    method = build(name)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.01)
    optimizer = make_optimizer(AdamW(), method)
    meta = Meta(step=3, samples_seen=24, batch_size=BATCH, lanes=2, seed=0, snapshot=snapshot.digest)
    saved = Checkpoints(str(tmp_path)).save(method, optimizer, meta)
    loaded = load_method(saved.folder.uri)
    assert not loaded.training
    assert loaded.state_dict().keys() == method.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in method.state_dict().items())
    batch = first_batch(method, snapshot)
    torch.manual_seed(0)
    expected = method.eval()(batch)
    torch.manual_seed(0)
    assert all(torch.equal(loss, expected[part]) for part, loss in loaded(batch).items())


@EVERY
def test_configs_go_through_json_and_the_command_line(name: str) -> None:
    config = method_class(name).smallest()
    kind = config_class(name)
    assert isinstance(config, kind) and dataclasses.fields(kind)
    assert method_name(config) == name
    assert from_json(kind, to_json(config)) == config
    assert flatten(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.anything = 1


@EVERY
def test_the_docstring_says_what_it_is(name: str) -> None:
    text = sys.modules[method_class(name).__module__].__doc__ or ""
    assert "arXiv" in text and "left out" in text.lower() and len(text) > 600


@EVERY
def test_two_processes_equal_one(name: str, two_processes: list[dict[str, Any]], snapshot: Snapshot) -> None:
    """Half of the batch in each of two ranks gives the loss and the gradients of the whole in one."""
    method = build(name)
    alone = gradients(method, first_batch(method, snapshot))
    first, second = (results[name] for results in two_processes)
    assert float(first["loss"] + second["loss"]) / 2 == pytest.approx(float(alone["loss"]), rel=1e-5)
    assert first.keys() == alone.keys()
    for key in alone.keys() - {"loss"}:
        assert torch.equal(first[key], second[key]), key
        largest = float(alone[key].abs().max())
        slack = max(2e-6, method.parity_tolerance * largest)
        far = float((first[key] - alone[key]).abs().max())
        said = f"{name} {key}: {far:.2g} apart, the largest entry is {largest:.2g}"
        torch.testing.assert_close(first[key], alone[key], rtol=2e-4, atol=slack, msg=said)


@EVERY
def test_what_a_method_says_of_itself(name: str, snapshot: Snapshot) -> None:
    """It names its model, and before it is built the fields and sidecars that its readers ask for."""
    method, config = build(name), method_class(name).smallest()
    readers = method.readers(train=True)
    assert method.registered_as in (name, "clip")
    assert 0 <= method.parity_tolerance <= 1e-3
    assert set(method.sample_fields(config)) == {field for reader in readers for field in reader.fields}
    wanted = [one.name for reader in readers for one in getattr(reader, "sidecars", ())]
    assert [one.name for one in method.sidecars(config)] == wanted
    check_fields(snapshot, method.sample_fields(config))


def test_unknown_methods_are_listed() -> None:
    with pytest.raises(SettingError, match="one of .*clip"):
        method_class("clipp")
    with pytest.raises(SettingError):
        method_class("method")


@pytest.fixture(scope="module")
def two_processes(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each rank's losses and gradients of every method."""
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, __file__, snapshot.folder, str(folder)], check=True, timeout=200)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


def _rank(rank: int, data: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    results = {}
    for name in method_names():
        method = build(name)
        method.gather = distributed.gather
        batch = first_batch(method, read_snapshot(data), rank, 2)
        results[name] = gradients(method, batch, distributed.parallel(method, torch.device("cpu")))
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    torch.distributed.destroy_process_group()


def _ranks(data: str, folder: str) -> None:
    """Both ranks, as forks of a process that has imported the methods."""
    for name in method_names():
        method_class(name)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, data, folder)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    _ranks(*sys.argv[1:])
