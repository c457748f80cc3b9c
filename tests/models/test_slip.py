"""SLIP's losses against a plain statement in float64, its colours against torchvision, its tower outputs by hand.

Run as a script, this file is one rank of a process group: see ``test_two_ranks_give_the_plain_loss_and_gradient``.
"""

import pickle
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2 import functional as peer

from pipeline.loaders.augment import NUMBERS, Colours
from pipeline.loaders.order import random_bits
from pipeline.models.slip import Config, Head, Slip, nt_xent
from pipeline.models.towers.batch_norm import GatheredBatchNorm
from pipeline.models.towers.colours import recolour
from pipeline.models.towers.unprojected import unprojected, unprojected_width
from pipeline.training import distributed

ROWS, WIDTH = 8, 12


def inputs() -> dict[str, Tensor]:
    """What the embedding of a batch gives, float64."""
    torch.manual_seed(3)
    unit = {key: functional.normalize(torch.randn(ROWS, 32).double(), dim=-1) for key in ("image", "text")}
    return {**unit, "first": torch.randn(ROWS, 64).double(), "second": torch.randn(ROWS, 64).double()}


def slip() -> Slip:
    torch.manual_seed(0)
    return Slip(Config(architecture="clipmill-tiny", ssl_hidden=WIDTH, ssl_width=6, self_supervision=0.7)).double()


def gradients(method: Slip, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses, and the gradients of the inputs and of what the comparison learns."""
    leaves = {key: value.clone().requires_grad_() for key, value in batch.items()}
    losses = method.compare(leaves)
    torch.stack(list(losses.values())).sum().backward()
    distributed.average_gradients(method)
    named = {name: parameter.grad for name, parameter in method.named_parameters() if parameter.grad is not None}
    return {
        **{name: loss.detach() for name, loss in losses.items()},
        **{name: gradient.clone() for name, gradient in named.items()},
        **{key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None},
    }


def plain(method: Slip, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The two losses with loops over rows and torch's own batch normalisation."""
    norms = [nn.BatchNorm1d(WIDTH).double(), nn.BatchNorm1d(WIDTH).double()]

    def project(features: Tensor) -> Tensor:
        hidden = torch.relu(norms[0](features @ method.head.first.weight.T))
        hidden = torch.relu(norms[1](hidden @ method.head.second.weight.T))
        output = hidden @ method.head.last.weight.T + method.head.last.bias
        return output / output.norm(dim=1, keepdim=True)

    a, b = project(batch["first"]), project(batch["second"])
    total = torch.zeros((), dtype=torch.float64)
    for x, y in ((a, b), (b, a)):
        for i in range(ROWS):
            others = [x[i] @ y[j] for j in range(ROWS)] + [x[i] @ x[j] for j in range(ROWS) if j != i]
            total = total - (x[i] @ y[i] / 0.1 - torch.logsumexp(torch.stack(others) / 0.1, dim=0))
    logits = method.logit_scale.exp() * batch["image"] @ batch["text"].T
    target = torch.arange(ROWS)
    clip = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
    return {"contrastive": clip, "self_supervised": 0.7 * total / (2 * ROWS)}


def plain_gradients() -> dict[str, Tensor]:
    method, leaves = slip(), {key: value.requires_grad_() for key, value in inputs().items()}
    losses = plain(method, leaves)
    torch.stack(list(losses.values())).sum().backward()
    trained = {name: parameter.grad for name, parameter in method.named_parameters() if parameter.grad is not None}
    together = {**{name: loss.detach() for name, loss in losses.items()}, **trained}
    return {**together, **{key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}}


def test_the_loss_and_its_gradients_are_the_plain_ones() -> None:
    expected, found = plain_gradients(), gradients(slip(), inputs())
    assert expected.keys() <= found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.slow
def test_two_ranks_give_the_plain_loss_and_gradient(tmp_path: Path) -> None:
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    first, second = (pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2))
    for key, value in plain_gradients().items():
        if key in inputs():  # a row's gradient is that of the sum of both ranks' means
            found = torch.cat([first[key], second[key]]) / 2
        else:
            found = (first[key] + second[key]) / 2
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-11, msg=key)


def test_two_images_by_hand() -> None:
    """Views equal, images orthogonal: the own logit is 1 / t, the two others are 0."""
    rows = torch.eye(2)
    expected = -torch.log(torch.exp(torch.tensor(2.0)) / (torch.exp(torch.tensor(2.0)) + 2))
    torch.testing.assert_close(nt_xent(rows, rows, 0.5), expected)


def test_batch_normalisation_is_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = GatheredBatchNorm(5), nn.BatchNorm1d(5)
    for _ in range(3):
        features = torch.randn(7, 5) * 3 + 1
        torch.testing.assert_close(ours(features), theirs(features))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    features = torch.randn(2, 5)
    torch.testing.assert_close(ours.eval()(features), theirs.eval()(features))


def test_the_head_has_the_papers_sizes() -> None:
    config = Config()
    head = Head(768, config.ssl_hidden, config.ssl_width)
    shapes = [tuple(layer.weight.shape) for layer in (head.first, head.second, head.last)]
    assert shapes == [(4096, 768), (4096, 4096), (256, 4096)]


def test_colours_are_torchvisions_row_by_row() -> None:
    torch.manual_seed(1)
    images = torch.rand(24, 3, 20, 28)
    images[0] = 0.5  # grey: no hue
    rows = [Colours().draw(random_bits(5, 9, 0, number, 12)) for number in range(24)]
    numbers = torch.tensor(rows, dtype=torch.float32)
    found = recolour(images, numbers, 2.0)
    for number, row in enumerate(numbers):
        torch.testing.assert_close(found[number], by_torchvision(images[number], row), rtol=1e-4, atol=2e-5)
    assert len(set(map(tuple, numbers[:, :4].tolist()))) > 8  # orders differ


def by_torchvision(image: Tensor, numbers: Tensor) -> Tensor:
    changes = [peer.adjust_brightness, peer.adjust_contrast, peer.adjust_saturation, peer.adjust_hue]
    for operation in numbers[:4].int().tolist():
        if operation >= 0:
            image = changes[operation](image, float(numbers[4 + operation]))
    if numbers[8] > 0:
        image = peer.rgb_to_grayscale(image, num_output_channels=3)
    return peer.gaussian_blur(image, [13, 13], [float(numbers[9])] * 2) if numbers[9] > 0 else image


def test_random_colours_have_the_papers_distribution() -> None:
    numbers = torch.tensor([Colours().draw(random_bits(0, 9, 0, number, 12)) for number in range(4000)])
    assert numbers.shape[1] == NUMBERS
    jittered = numbers[numbers[:, 0] >= 0]
    assert len(jittered) / 4000 == pytest.approx(0.8, abs=0.03)
    assert numbers[:, 8].mean() == pytest.approx(0.2, abs=0.03)
    blurred = numbers[numbers[:, 9] > 0, 9]
    assert len(blurred) / 4000 == pytest.approx(0.5, abs=0.03)
    assert 0.1 <= blurred.min() and blurred.max() <= 2 and blurred.mean() == pytest.approx(1.05, abs=0.06)
    assert numbers[:, 4:7].min() >= 0.6 and numbers[:, 4:7].max() <= 1.4 and numbers[:, 7].abs().max() <= 0.1
    assert all(sorted(order) == [0, 1, 2, 3] for order in jittered[:, :4].tolist())


@pytest.mark.parametrize("architecture", ["clipmill-tiny", "clipmill-small", "RN50", "convnext_base", "ViT-B-32-256"])
def test_projecting_what_is_not_projected_gives_the_towers_output(architecture: str) -> None:
    torch.manual_seed(0)
    if architecture == "ViT-B-32-256":
        visual = open_clip.transformer.VisionTransformer(32, 16, 24, 2, 2, 2.0, pool_type="avg", output_dim=5)
        size = 32
    else:
        visual = open_clip.create_model(architecture).visual
        size = 64 if architecture.startswith("clipmill") else 224
    visual.eval()
    image = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features, output = unprojected(visual, image), visual(image)
        assert features.shape == (2, unprojected_width(visual))
        if hasattr(visual, "proj"):
            projected = features @ visual.proj
        elif hasattr(visual, "attnpool"):
            projected = visual.attnpool.c_proj(features)
        else:
            projected = visual.head(features) if architecture == "convnext_base" else visual.trunk.head(features)
    torch.testing.assert_close(projected, output, rtol=1e-4, atol=1e-5)


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    method = slip()
    method.gather = distributed.gather
    own = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    found = gradients(method, {key: value[own] for key, value in inputs().items()})
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _rank(int(sys.argv[1]), sys.argv[2])
