"""AudioCLIP's pair loss against torch's cross-entropies, with missing modalities, groups, tiles and ranks.

Run as a script, this file is one rank of a process group: see ``results_of_ranks``.
"""

import itertools
import math
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
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models.audioclip.loss import pair_loss, text_groups, tiled_pair_loss
from pipeline.training import distributed

BATCH, WIDTH = 12, 5
GROUPS = [0, 1, 2, 0, 3, 1, 0, 4, 5, 6, 7, 8]
PRESENT = {
    "all": [1] * BATCH,
    "some": [1, 0, 1, 1, 1, 1, 0, 1, 1, 0, 1, 0],
    "half": [0] * (BATCH // 2) + [1] * (BATCH // 2),  # with two ranks, one has none
    "one": [0] * 7 + [1] + [0] * 4,
    "none": [0] * BATCH,
}
TILES = (1, 4, 5, 100)
CASES = list(itertools.product(PRESENT, (False, True)))


def features(batch: int = BATCH, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(batch, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    tensors = [functional.normalize(one, dim=1).to(dtype) for one in rows]
    return [tensor.requires_grad_() for tensor in (*tensors, torch.tensor(9.0, dtype=dtype))]


def marks(present: str, grouped: bool) -> tuple[Tensor, Tensor | None]:
    groups = torch.tensor([GROUPS, GROUPS]).T.float() if grouped else None
    return torch.tensor(PRESENT[present]).float(), groups


def plain(first: Tensor, second: Tensor, scale: Tensor, present: Tensor, groups: Tensor | None) -> Tensor:
    """Cross-entropies of the rows that are there, with soft targets, by torch."""
    rows = present.nonzero().squeeze(1)
    if not len(rows):
        return 0 * (first.sum() + second.sum() + scale)
    logits = scale * first[rows] @ second[rows].T
    targets = torch.eye(len(rows), dtype=logits.dtype)
    if groups is not None:
        names = [int(one) for one in groups[rows, 0]]
        rows_of = [[float(a == b) / names.count(a) for b in names] for a in names]
        targets = torch.tensor(rows_of, dtype=logits.dtype)
    return functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)


def value_and_gradients(loss: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    value = loss(*tensors)
    return [value.detach(), *torch.autograd.grad(value, tensors)]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("present", "grouped"), CASES)
def test_both_forms_are_torchs_cross_entropies(present: str, grouped: bool) -> None:
    here, groups = marks(present, grouped)
    expected = value_and_gradients(lambda *given: plain(*given, here, groups), features())

    def whole(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return pair_loss(a, b, here, scale, groups=groups)

    assert_equal(value_and_gradients(whole, features()), expected)
    for tile in TILES:
        found = value_and_gradients(
            lambda a, b, scale, tile=tile: tiled_pair_loss(a, b, here, scale, tile=tile, groups=groups), features()
        )
        assert_equal(found, expected)


def test_rows_without_the_other_modality_have_no_influence() -> None:
    """Not even as rows of NaN-free rubbish of any size, and they get no gradient."""
    here, _ = marks("some", False)
    first, second, scale = features()
    spoilt = [
        torch.where(here[:, None] > 0, one.detach(), torch.full_like(one, 0.5)).requires_grad_()
        for one in (first, second)
    ]
    for loss in (pair_loss, tiled_pair_loss):
        clean = value_and_gradients(lambda a, b, t, loss=loss: loss(a, b, here, t), [first, second, scale])
        other = value_and_gradients(lambda a, b, t, loss=loss: loss(a, b, here, t), [*spoilt, scale])
        assert_equal(other, clean)
        assert not other[1][here == 0].any() and not other[2][here == 0].any()


def test_two_pairs_by_hand() -> None:
    """Orthogonal pairs at scale 2: each of four rows has the logits 2 and 0; half of them are summed in a direction."""
    rows, scale = torch.eye(2, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    expected = 2 * math.log(1 + math.exp(-2))
    for loss in (pair_loss, tiled_pair_loss):
        assert float(loss(rows, rows, torch.ones(2), scale)) == pytest.approx(expected)
        same = torch.ones(2, 1)  # both in one group: targets of 1/2 each, logits of 2 and 0
        expected_same = 2 * (math.log(math.exp(2) + 1) - 1)
        assert float(loss(rows, rows, torch.ones(2), scale, groups=same)) == pytest.approx(expected_same)


@pytest.mark.parametrize("grouped", [False, True])
def test_slopes_by_finite_differences(grouped: bool) -> None:
    here, groups = torch.tensor([1.0, 0, 1, 1, 1]), torch.tensor([[0.0], [0], [0], [1], [2]]) if grouped else None
    assert torch.autograd.gradcheck(
        lambda a, b, scale: tiled_pair_loss(a, b, here, scale, tile=2, groups=groups), features(5)
    )


def test_float32_whatever_autocast_says() -> None:
    here, groups = marks("some", True)
    tensors = features(dtype=torch.float32)
    for loss in (pair_loss, tiled_pair_loss):
        expected = value_and_gradients(lambda a, b, t, loss=loss: loss(a, b, here, t, groups=groups), tensors)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(*tensors[:2], here, tensors[2], groups=groups)
        found = [value.detach(), *torch.autograd.grad(value, tensors)]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class Largest(TorchDispatchMode):
    """Elements of the largest storage that any operation gave, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("grouped", [False, True])
def test_no_matrix_of_all_pairs_is_ever_made(grouped: bool) -> None:
    batch, tile = 512, 32
    here = torch.ones(batch)
    groups = (torch.arange(2 * batch).reshape(batch, 2) % 40).double() if grouped else None
    with Largest() as whole:
        value_and_gradients(lambda a, b, t: pair_loss(a, b, here, t, groups=groups), features(batch))
    assert whole.elements >= batch * batch  # the measure sees it where there is one
    with Largest() as largest:
        value_and_gradients(lambda a, b, t: tiled_pair_loss(a, b, here, t, tile=tile, groups=groups), features(batch))
    assert tile * tile <= largest.elements <= batch * (WIDTH + 5)


def test_what_is_kept_for_the_backward_pass_is_linear() -> None:
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda it: it):
        first, second, scale = features(256)
        tiled_pair_loss(first, second, torch.ones(256), scale, tile=32)
    assert sum(kept) <= 256 * (2 * WIDTH + 4) + 3


def test_equal_texts_have_equal_hashes_and_others_do_not() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 49408, (4000, 20), generator=generator)
    tokens[:, 12:] = 0
    hashes = text_groups(tokens)
    assert len(torch.unique(hashes, dim=0)) == 4000
    assert torch.equal(hashes, text_groups(tokens[:, :12]))  # cut at the longest text
    assert torch.equal(hashes, text_groups(tokens + 1, padding=1))  # of another padding
    assert hashes.min() >= 0 and hashes.max() < 2**24 and torch.equal(hashes, hashes.round())
    longest = text_groups(torch.full((1, 512), 250_000))
    assert longest.min() >= 0  # no overflow


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_are_one(world: int, tmp_path: Path) -> None:
    """The mean of values, features' gradients in their places, and the mean of the scale's gradients."""
    ranks = results_of_ranks(world, tmp_path)
    for present, grouped in CASES:
        expected = value_and_gradients(lambda *given: plain(*given, *marks(present, grouped)), features())  # noqa: B023
        for way in ("whole", "gather", "ring"):
            value, first, second, scale = zip(*(results[present, grouped, way] for results in ranks), strict=True)
            together = [torch.stack(value).mean(), torch.cat(first) / world, torch.cat(second) / world]
            assert_equal([*together, torch.stack(scale).mean()], expected)


def results_of_ranks(world: int, folder: Path) -> list[dict[Any, list[Tensor]]]:
    command = [sys.executable, __file__, str(world), str(folder)]
    ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(world)]
    assert [rank.wait(timeout=200) for rank in ranks] == [0] * world
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world)]


def _rank(world: int, folder: str, rank: int) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
    own, results = slice(rank * BATCH // world, (rank + 1) * BATCH // world), {}
    for present, grouped in CASES:
        here, groups = marks(present, grouped)
        mine = here[own], None if groups is None else groups[own]
        first, second, scale = features()
        tensors = [first.detach()[own].requires_grad_(), second.detach()[own].requires_grad_(), scale]
        results[present, grouped, "whole"] = value_and_gradients(
            lambda a, b, t: pair_loss(a, b, mine[0], t, distributed.gather, mine[1]),  # noqa: B023
            tensors,
        )
        for kind in ("gather", "ring"):
            exchange = distributed.exchange(kind)
            results[present, grouped, kind] = value_and_gradients(
                lambda a, b, t: tiled_pair_loss(a, b, mine[0], t, exchange, 3, mine[1]),  # noqa: B023
                tensors,
            )
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    _rank(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
