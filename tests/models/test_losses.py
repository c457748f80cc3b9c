"""The tiled losses against the plain formulas, in float64, for one to four processes; and what they allocate.

Run as a script, this file is one rank of a process group: see ``results_of_ranks``.
"""

import itertools
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models import losses
from pipeline.models.losses import (
    contrastive_loss,
    tiled_contrastive_loss,
    tiled_distillation_loss,
    tiled_sigmoid_loss,
)
from pipeline.training import distributed

BATCH, WIDTH, TEACHER_WIDTH = 24, 5, 7
TEXTS = 3  # of each image, for the loss "several"
LOSSES = ("softmax", "several", "sigmoid", "distillation")
EXCHANGES = ("gather", "ring")
TILES = (1, 5, 6, 100)  # of 24, 12 and 6 rows a rank: one by one, not dividing, dividing, all at once


def inputs(kind: str, batch: int = BATCH, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Features whose rows are not contiguous in memory, scale, and for the sigmoid a bias."""
    generator = torch.Generator().manual_seed(0)
    features = [
        functional.normalize(torch.randn(batch, WIDTH, generator=generator, dtype=torch.float64), dim=1)
        .to(dtype)
        .T.contiguous()
        .T
        for _ in range(2)
    ]
    if kind == "several":
        texts = torch.randn(batch, TEXTS, WIDTH, generator=generator, dtype=torch.float64)
        features[1] = functional.normalize(texts, dim=2).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    scalars = [torch.tensor(9.0, dtype=dtype), torch.tensor(-4.0, dtype=dtype)][: 2 if kind == "sigmoid" else 1]
    return [tensor.requires_grad_() for tensor in (*features, *scalars)]


def teacher(batch: int, dtype: torch.dtype) -> list[Tensor]:
    """Features of another width, those of images times a scale of 6, the same in every rank."""
    generator = torch.Generator().manual_seed(1)
    rows = (torch.randn(batch, TEACHER_WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    images, texts = (functional.normalize(row, dim=1).to(dtype) for row in rows)
    return [6 * images, texts]


def divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows, by torch."""
    return functional.kl_div(logits.log_softmax(dim=1), targets.softmax(dim=1), reduction="batchmean")


def plain(kind: str, images: Tensor, texts: Tensor, scale: Tensor, *bias: Tensor) -> Tensor:
    """The loss as its paper writes it."""
    if kind == "several":
        logits = scale * images @ texts.flatten(0, 1).T
        own = torch.eye(len(images), dtype=images.dtype).repeat_interleave(TEXTS, dim=1)
        by_image = functional.cross_entropy(logits, own / TEXTS)
        return (by_image + functional.cross_entropy(logits.T, own.T)) / 2
    logits = scale * images @ texts.T
    numbers = torch.arange(len(images))
    if kind == "softmax":
        return (functional.cross_entropy(logits, numbers) + functional.cross_entropy(logits.T, numbers)) / 2
    if kind == "distillation":
        their_images, their_texts = teacher(len(images), images.dtype)
        targets = their_images @ their_texts.T
        return (divergence(logits, targets) + divergence(logits.T, targets.T)) / 2
    signs = 2 * torch.eye(len(images), dtype=images.dtype) - 1
    return -functional.logsigmoid(signs * (logits + bias[0])).sum() / len(images)


def tiled(kind: str, *tensors: Tensor, rank: int = 0, world: int = 1, **settings: Any) -> Tensor:
    if kind == "distillation":
        theirs = teacher(world * len(tensors[0]), tensors[0].dtype)
        return tiled_distillation_loss(*tensors, *(features.chunk(world)[rank] for features in theirs), **settings)
    return (tiled_sigmoid_loss if kind == "sigmoid" else tiled_contrastive_loss)(*tensors, **settings)


def value_and_gradients(loss: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    value = loss(*tensors)
    return [value.detach(), *torch.autograd.grad(value, tensors)]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("tile", TILES)
def test_one_process(kind: str, tile: int) -> None:
    tensors = inputs(kind)
    expected = value_and_gradients(lambda *given: plain(kind, *given), tensors)
    assert not tensors[0].is_contiguous()
    assert_equal(value_and_gradients(lambda *given: tiled(kind, *given, tile=tile), tensors), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["softmax", "several", "sigmoid"])
def test_compiled_tiles_are_the_plain_formula(kind: str) -> None:
    """By torch's compiler for CPUs; the last tiles are smaller than the others."""
    tensors = inputs(kind)
    expected = value_and_gradients(lambda *given: plain(kind, *given), tensors)
    assert_equal(value_and_gradients(lambda *given: tiled(kind, *given, tile=5, compiled=True), tensors), expected)


def test_only_compiled_tiles_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced without generating code, each computation once for all tiles and both kinds of texts."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda work: seen.append(work.__name__) or work)
    losses._compiled.cache_clear()
    for kind in ("softmax", "several", "sigmoid"):
        for compiled in (False, True):
            tensors = inputs(kind)
            expected = value_and_gradients(lambda *given, kind=kind: plain(kind, *given), tensors)
            found = value_and_gradients(partial(tiled, kind, tile=5, compiled=compiled), tensors)
            assert_equal(found, expected)
            assert bool(seen) == (compiled or kind != "softmax")
    losses._compiled.cache_clear()
    assert sorted(seen) == ["_added_sums", "_sigmoid_slopes", "_softmax_slopes", "_sum_of_softplus"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_are_one(world: int, tmp_path: Path) -> None:
    """Mean of the values, features' gradients in their places, and the mean of the scalars' gradients."""
    ranks = results_of_ranks(world, tmp_path)
    for kind, exchange, tile in itertools.product(LOSSES, EXCHANGES, TILES):
        found = [results[kind, exchange, tile] for results in ranks]
        value, images, texts, *scalars = zip(*found, strict=True)
        # A rank's features get the gradient of the sum over ranks, which averaging parameters' gradients divides.
        together = [torch.stack(value).mean(), torch.cat(images) / world, torch.cat(texts) / world]
        together += [torch.stack(scalar).mean() for scalar in scalars]
        expected = value_and_gradients(lambda *given, kind=kind: plain(kind, *given), inputs(kind))
        assert_equal(together, expected)


@pytest.mark.slow
def test_ranks_may_weigh_their_losses(tmp_path: Path) -> None:
    """Rank r multiplies its value by r + 1: features' gradients are those of the weighted sum."""
    ranks = results_of_ranks(2, tmp_path)
    images, texts, scale = inputs("softmax")
    logits, numbers = scale * images @ texts.T, torch.arange(BATCH)
    each = [functional.cross_entropy(one, numbers, reduction="none") for one in (logits, logits.T)]
    weights = (torch.arange(BATCH) >= BATCH // 2) + 1.0
    weighted = (weights * (each[0] + each[1]) / 2).sum() / (BATCH // 2)
    expected = list(torch.autograd.grad(weighted, (images, texts, scale)))
    for exchange in EXCHANGES:
        first, second = (results["weighted", exchange] for results in ranks)
        together = [torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]), first[2] + second[2]]
        assert_equal(together, expected)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("tile", [2, 3])
def test_slopes_by_finite_differences(kind: str, tile: int) -> None:
    assert torch.autograd.gradcheck(lambda *given: tiled(kind, *given, tile=tile), inputs(kind, batch=5))


def test_two_pairs_by_hand() -> None:
    """Orthogonal pairs with scale 2: softmax rows have logits (2, 0); sigmoid with bias -1 has 1 and twice -1."""
    features = torch.eye(2, dtype=torch.float64)
    scale, bias = torch.tensor([2.0, -1.0], dtype=torch.float64)
    assert float(tiled_contrastive_loss(features, features, scale)) == pytest.approx(math.log(1 + math.exp(-2)))
    expected = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-1))
    assert float(tiled_sigmoid_loss(features, features, scale, bias, tile=1)) == pytest.approx(expected)


def test_values_and_slopes_are_open_clips() -> None:
    for kind, theirs in (("softmax", ClipLoss()), ("sigmoid", SigLipLoss())):
        tensors = inputs(kind)
        assert_equal(
            value_and_gradients(lambda *given, kind=kind: tiled(kind, *given, tile=7), tensors),
            value_and_gradients(theirs, tensors),
        )


def test_slopes_of_distillation_are_open_clips() -> None:
    """Its value is a cross-entropy: larger by the entropy of the teacher's softmaxes, which has no slope."""
    tensors, (images, texts) = inputs("distillation"), teacher(BATCH, torch.float64)
    found = value_and_gradients(lambda *given: tiled("distillation", *given, tile=7), tensors)
    loss = DistillClipLoss()
    expected = value_and_gradients(lambda *given: loss(*given, images / 6, texts, torch.tensor(6.0))[1], tensors)
    softmaxes = [torch.distributions.Categorical(logits=logits) for logits in (images @ texts.T, texts @ images.T)]
    entropy = torch.stack([softmax.entropy().mean() for softmax in softmaxes]).mean()
    assert_equal(found, [expected[0] - entropy, *expected[1:]])


def test_who_is_like_the_teacher_has_nothing_to_learn() -> None:
    images, texts, scale = inputs("softmax")
    loss = tiled_distillation_loss(images, texts, scale, scale.detach() * images.detach(), texts.detach(), tile=5)
    assert abs(float(loss.detach())) < 1e-12
    assert all(slope.abs().max() < 1e-12 for slope in torch.autograd.grad(loss, (images, texts, scale)))


@pytest.mark.parametrize("kind", ["softmax", "several"])
def test_the_plain_loss_is_the_formula(kind: str) -> None:
    tensors = inputs(kind)
    expected = value_and_gradients(lambda *given: plain(kind, *given), tensors)
    assert_equal(value_and_gradients(contrastive_loss, tensors), expected)


@pytest.mark.parametrize("kind", LOSSES)
def test_extreme_logits(kind: str) -> None:
    """Scale 1000: exponentials of single logits overflow float32, and rows lie further apart than it reaches."""
    exact, rough = inputs(kind), inputs(kind, dtype=torch.float32)
    for tensors in (exact, rough):
        tensors[2].data.fill_(1000.0)
    expected = value_and_gradients(lambda *given: plain(kind, *given), exact)
    found = value_and_gradients(lambda *given: tiled(kind, *given, tile=5), rough)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", LOSSES)
def test_float32_whatever_autocast_says(kind: str) -> None:
    """Also for features in bfloat16, and where the backward pass runs under autocast too."""
    tensors = inputs(kind, dtype=torch.float32)
    expected = value_and_gradients(lambda *given: tiled(kind, *given, tile=5), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(lambda *given: tiled(kind, *given, tile=5), tensors)
        half = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors]
        from_half = value_and_gradients(lambda *given: tiled(kind, *given, tile=5), half)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert from_half[0].dtype == torch.float32 and from_half[1].dtype == torch.bfloat16
    torch.testing.assert_close(from_half[0], expected[0], rtol=0.02, atol=0.0)


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


@pytest.mark.parametrize("kind", LOSSES)
def test_no_matrix_of_all_pairs_is_ever_made(kind: str) -> None:
    batch, tile = 512, 32
    tensors = inputs(kind, batch=batch)
    with Largest() as whole:
        value_and_gradients(lambda *given: plain(kind, *given), tensors)
    assert whole.elements >= batch * batch  # the measure sees it where there is one
    with Largest() as largest:
        value_and_gradients(lambda *given: tiled(kind, *given, tile=tile), tensors)
    widest = WIDTH + 2 if kind != "distillation" else WIDTH + TEACHER_WIDTH + 3
    columns = TEXTS * batch if kind == "several" else batch
    assert tile * (tile - TEXTS) <= largest.elements <= columns * widest


@pytest.mark.parametrize("kind", LOSSES)
def test_what_is_kept_for_the_backward_pass_is_linear(kind: str) -> None:
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda it: it):
        tiled(kind, *inputs(kind, batch=256), tile=32)
    theirs = 2 * 256 * TEACHER_WIDTH + 2 * 256 if kind == "distillation" else 0
    columns = TEXTS * 256 if kind == "several" else 256
    assert sum(kept) <= (256 + columns) * (WIDTH + 1) + 2 + theirs


def results_of_ranks(world: int, folder: Path) -> list[dict[Any, list[Tensor]]]:
    """Each rank's value and gradients, by loss, exchange and tile."""
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(world), str(folder)]) for rank in range(world)]
    assert [rank.wait(timeout=200) for rank in ranks] == [0] * world
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world)]


def _rank(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
    results: dict[Any, list[Tensor]] = {}
    for exchange in EXCHANGES:
        together = distributed.exchange(exchange)
        for kind, tile in itertools.product(LOSSES, TILES):
            place = {"rank": rank, "world": world, "exchange": together, "tile": tile}
            loss = lambda *given, kind=kind, place=place: tiled(kind, *given, **place)  # noqa: E731
            results[kind, exchange, tile] = value_and_gradients(loss, _mine(inputs(kind), rank, world))
        weighted = lambda *given: (rank + 1) * tiled_contrastive_loss(*given, exchange=together, tile=5)  # noqa: B023, E731
        results["weighted", exchange] = value_and_gradients(weighted, _mine(inputs("softmax"), rank, world))[1:]
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    torch.distributed.destroy_process_group()


def _mine(tensors: list[Tensor], rank: int, world: int) -> list[Tensor]:
    images, texts, *scalars = tensors
    mine = [tensor.detach().chunk(world)[rank] for tensor in (images, texts)]
    return [tensor.requires_grad_() for tensor in (*mine, *(scalar.detach() for scalar in scalars))]


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    _rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
