"""Classes spread over workers: the values and gradients of one process, in double precision and over two processes."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.models.adapters import coop
from pipeline.models.adapters.adapter import Adapter, FrozenClip, adapter_class
from pipeline.models.adapters.text import Spread, group
from pipeline.training import distributed
from pipeline.training.adapt import _spread, adapt
from tests.training.few_shot import TEMPLATES, make_clip, make_images, short, small

pytestmark = pytest.mark.slow

FIVE = ("red", "dark green", "blue", "very light and pale yellow", "black and white")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "coop": ("coop", {}),
    "coop in parts": ("coop", {"classes_at_once": 2}),
    "coop class-specific": ("coop", {"class_specific": True, "context": 3}),
    "coop middle": ("coop", {"position": "middle", "context": 3}),
    "cocoop": ("cocoop", {}),
    "maple": ("maple", {"depth": 2}),
    "ivlp": ("ivlp", {"text_depth": 2, "vision_depth": 2}),
}
MODULE, ROOT = "tests.training.test_adapt_spread", Path(__file__).parents[2]
LEARNED = ("coop", "cocoop", "maple")


def make(case: str, clip: FrozenClip) -> Adapter:
    method, values = CASES[case]
    kind = adapter_class(method)
    module = sys.modules[kind.__module__]
    return kind(module.Config(**values), clip, FIVE, TEMPLATES).double()


def value_and_gradients(case: str, clip: FrozenClip) -> dict[str, Tensor]:
    """With the spread of the group that this process is in, or alone."""
    adapter = make(case, clip)
    labels = torch.tensor([0, 1, 2, 3, 4, 1])
    images = torch.randn(6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if adapter.reads == "pixels":
        images = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    with _spread(adapter):
        loss = adapter.loss(images, labels)
        loss.backward()
        distributed.average_gradients(adapter)
        with torch.no_grad():
            logits = adapter.logits(images)
    assert adapter.tower.spread is None
    gradients = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(adapter.parameters()))
    return {"loss": loss.detach(), "logits": logits, **gradients}


def learned(method: str, clip: FrozenClip) -> dict[str, Tensor]:
    recipe = short(method, batch_size=4, epochs=2)
    train, validation = make_images(clip, 10, 0, classes=5), make_images(clip, 10, 1, classes=5)
    return adapt(method, small(method), recipe, clip, FIVE, TEMPLATES, train, validation).adapter.state_dict()


def results(folder: Path) -> dict[str, dict[str, Tensor]]:
    clip = make_clip(folder)
    found = {method: learned(method, clip) for method in LEARNED}
    clip.method.double()
    return found | {f"one step of {case}": value_and_gradients(case, clip) for case in CASES}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    for rank in range(2):
        (folder / f"clip-{rank}").mkdir()
    ranks = [subprocess.Popen([sys.executable, "-m", MODULE, str(rank), str(folder)], cwd=ROOT) for rank in range(2)]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    return results(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_one_process(case: str, alone: Any, of_two: Any) -> None:
    expected = alone[f"one step of {case}"]
    assert any(tensor.abs().max() > 1e-6 for name, tensor in expected.items() if name not in ("loss", "logits"))
    for found in of_two:
        assert found[f"one step of {case}"].keys() == expected.keys()
        for name, tensor in found[f"one step of {case}"].items():
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", LEARNED)
def test_a_whole_adaptation_is_that_of_one_process(method: str, alone: Any, of_two: Any) -> None:
    for name, tensor in alone[method].items():
        torch.testing.assert_close(of_two[0][method][name], tensor, rtol=1e-3, atol=1e-5)
        assert torch.equal(of_two[0][method][name], of_two[1][method][name])


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_class_is_run_once_and_comes_back_to_its_place(world: int) -> None:
    """Seven classes with one to three rows; their features are their numbers, for two images."""
    tokens = [[5], [5, 6], [5], [5, 6, 7], [5, 6], [5], [5, 6]]
    rows = group(tokens, [[-1] * len(each) for each in tokens])
    order = torch.cat([part.classes for part in rows])
    own = [Spread(rank, world, lambda tensor: tensor).own(rows) for rank in range(world)]
    numbers = [torch.cat([part.classes for part in parts]) for parts in own]
    assert sorted(torch.cat(numbers).tolist()) == list(range(7))
    assert max(map(len, numbers)) - min(map(len, numbers)) <= 1
    for parts in own:
        assert all(part.tokens.tolist() == [tokens[number] for number in part.classes] for part in parts)
    features = [torch.stack([each, 10 * each])[..., None].float() for each in numbers]
    most = -(-7 // world)
    sent = []
    for rank, feature in enumerate(features):
        gathered = torch.zeros(world * most, 2, 1)

        def gather(tensor: Tensor, rank: int = rank, gathered: Tensor = gathered) -> Tensor:
            sent.append(tensor)
            return gathered

        Spread(rank, world, gather).together(feature, 7)
    everything = torch.cat(sent)
    together = Spread(0, world, lambda tensor: everything).together(features[0], 7)
    assert torch.equal(together[0, :, 0], order.float()) and torch.equal(together[1, :, 0], 10 * order.float())


def test_more_workers_than_classes(tmp_path: Path) -> None:
    adapter = coop.CoOp(coop.Config(), make_clip(tmp_path), FIVE, ())
    adapter.tower.spread = Spread(0, 6, lambda tensor: tensor)
    with pytest.raises(SettingError, match="workers: got 6.*at most 5"):
        adapter.class_vectors()


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    found = results(Path(folder) / f"clip-{rank}")
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _rank(int(sys.argv[1]), sys.argv[2])
