"""A batch in parts against the same batch at once: every gradient, random numbers, batch normalisation."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.clip import Clip
from pipeline.models.losses import tiled_contrastive_loss, tiled_sigmoid_loss
from pipeline.models.method import EmbeddingMethod
from pipeline.training.gradient_cache import backward_in_parts, normalises_batches

BATCH, PART = 8, 3


@dataclass(frozen=True, kw_only=True)
class Config:
    loss: str = "softmax"
    dropout: float = 0.0
    normalised: bool = False


class Towers(EmbeddingMethod):
    """Two towers of one layer in float64, a head within the loss, a scale and a bias; counts its rows."""

    fields = ("image", "text")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        torch.manual_seed(1)
        norm = nn.BatchNorm1d(6) if config.normalised else nn.Identity()
        self.image = nn.Sequential(nn.Linear(4, 6), norm, nn.Dropout(config.dropout)).double()
        self.text = nn.Sequential(nn.Linear(4, 6), nn.Dropout(config.dropout)).double()
        self.head = nn.Linear(6, 6).double()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
        self.rows: list[int] = []

    @classmethod
    def smallest(cls) -> Config:
        return Config()

    def readers(self, train: bool, *, seed: int = 0, settings: Any = None) -> Any:
        raise NotImplementedError

    def embed(self, batch: Any) -> dict[str, Tensor]:
        self.rows.append(len(batch["image"]))
        return {"image": self.image(batch["image"]), "text": self.text(batch["text"])}

    def compare(self, embeddings: Any) -> dict[str, Tensor]:
        image = functional.normalize(self.head(embeddings["image"]), dim=1)
        text = functional.normalize(embeddings["text"], dim=1)
        if self.config.loss == "sigmoid":
            return {"contrastive": tiled_sigmoid_loss(image, text, self.scale.exp(), self.bias, tile=5)}
        return {"contrastive": tiled_contrastive_loss(image, text, self.scale.exp(), tile=5)}


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {key: torch.randn(BATCH, 4, generator=generator, dtype=torch.float64) for key in ("image", "text")}


def gradients(method: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in method.named_parameters() if value.grad is not None}


def in_parts(method: EmbeddingMethod, rows: int = PART) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(3)
    losses = backward_in_parts(method, batch(), rows, nullcontext)
    return losses, gradients(method)


def part_by_part(method: Towers, rows: int = PART) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same embeddings with all their graphs at once, and the same random numbers."""
    torch.manual_seed(3)
    split = zip(batch()["image"].split(rows), batch()["text"].split(rows), strict=True)
    embedded = [method.embed({"image": image, "text": text}) for image, text in split]
    losses = method.compare({key: torch.cat([part[key] for part in embedded]) for key in ("image", "text")})
    losses["contrastive"].backward()
    return losses, gradients(method)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_the_gradient_is_that_of_the_whole_batch(loss: str, rows: int) -> None:
    method, whole = Towers(Config(loss=loss)), Towers(Config(loss=loss))
    losses, found = in_parts(method, rows)
    expected = whole.training_step(batch())
    expected["contrastive"].backward()
    assert float(losses["contrastive"]) == pytest.approx(expected["contrastive"].item(), rel=1e-13)
    assert found.keys() == gradients(whole).keys() and ("bias" in found) == (loss == "sigmoid")
    for name, slope in gradients(whole).items():
        torch.testing.assert_close(found[name], slope, rtol=1e-11, atol=1e-14, msg=name)
    assert max(method.rows) == min(rows, BATCH) and sum(method.rows) == 2 * BATCH


@pytest.mark.parametrize(("loss", "theirs"), [("softmax", ClipLoss()), ("sigmoid", SigLipLoss())])
def test_open_clips_accumulation_counts_the_scale_too_often(loss: str, theirs: nn.Module) -> None:
    """Its ``--accum-freq k``: each part again among the others' stored features, and the whole loss each time."""
    method, whole = Towers(Config(loss=loss)), Towers(Config(loss=loss))
    whole.training_step(batch())["contrastive"].backward()
    expected, (_, ours) = gradients(whole), in_parts(Towers(Config(loss=loss)), 2)

    def features(rows: Any) -> list[Tensor]:
        found = method.embed({key: values[rows] for key, values in batch().items()})
        return [functional.normalize(side, dim=1) for side in (method.head(found["image"]), found["text"])]

    parts = [slice(start, start + 2) for start in range(0, BATCH, 2)]
    with torch.no_grad():
        stored = [features(rows) for rows in parts]
    for number, rows in enumerate(parts):
        mixed = [*stored[:number], features(rows), *stored[number + 1 :]]
        image, text = (torch.cat(side) for side in zip(*mixed, strict=True))
        scalars = [method.scale.exp(), *([method.bias] if loss == "sigmoid" else [])]
        theirs(image, text, *scalars).backward()
    for name, slope in gradients(method).items():
        times = len(parts) if name in ("scale", "bias") else 1
        torch.testing.assert_close(slope, times * expected[name], rtol=1e-10, atol=1e-13, msg=name)
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-10, atol=1e-13, msg=name)


def test_both_passes_draw_the_same_random_numbers() -> None:
    config = Config(dropout=0.5)
    losses, found = in_parts(Towers(config))
    state = torch.get_rng_state()
    expected, slopes = part_by_part(Towers(config))
    assert torch.equal(state, torch.get_rng_state())  # what comes next is as after one pass
    assert torch.equal(losses["contrastive"], expected["contrastive"])
    for name, slope in slopes.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-11, atol=1e-14, msg=name)


def test_batch_normalisation_is_by_parts_and_counted_once() -> None:
    config = Config(normalised=True)
    method, other = Towers(config), Towers(config)
    assert normalises_batches(method) and not normalises_batches(Towers(Config()))
    _, found = in_parts(method)
    _, expected = part_by_part(other)
    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-10, atol=1e-13, msg=name)
    assert all(torch.equal(value, other.get_buffer(name)) for name, value in method.named_buffers())
    whole = Towers(config)
    whole.training_step(batch())["contrastive"].backward()
    assert not torch.allclose(whole.image[0].weight.grad, method.image[0].weight.grad, rtol=1e-3)  # so it is said


def test_a_locked_tower() -> None:
    method = Towers(Config())
    method.image.requires_grad_(False)
    _, found = in_parts(method)
    _, expected = in_parts(Towers(Config()))
    assert found.keys() == {name for name in expected if not name.startswith("image.")}
    for name, slope in found.items():
        torch.testing.assert_close(slope, expected[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_clip_in_parts(loss: str) -> None:
    """With autocast, which must not hand the weights it cast without a graph to the second pass."""
    torch.manual_seed(0)
    method = Clip(replace(Clip.smallest(), loss=loss, loss_tile=3))
    tokens = method.tokenizer([f"a {colour} square" for colour in ("red", "blue", "green", "grey", "white")])
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    given = {"image": images, "text": tokens}
    for kind, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.15)):
        enabled = kind == torch.bfloat16
        method.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = method(given)["contrastive"]
        value.backward()
        expected = gradients(method)
        method.zero_grad()
        losses = backward_in_parts(
            method, given, 2, lambda enabled=enabled: torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        )
        assert float(losses["contrastive"]) == pytest.approx(value.item(), rel=tolerance)
        found = gradients(method)
        assert found.keys() == expected.keys()
        for name, slope in expected.items():
            assert (found[name] - slope).norm() <= tolerance * slope.norm() + 1e-7, name
