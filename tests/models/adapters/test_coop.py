"""CoOp and CoCoOp against the papers' plain computation: 77 tokens for every class, and for every image."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.models.adapters import cocoop, coop
from pipeline.models.adapters.adapter import FrozenClip
from tests.models.adapters.conftest import NAMES, plain_features

PLACES = ("end", "middle", "front")


def plain_prompts(clip: FrozenClip, context: Tensor, position: str) -> tuple[Tensor, Tensor]:
    """The reference's construction: placeholders "X" are tokenised, then overwritten by position; [C, 77, width]."""
    model, tokenizer = clip.model, clip.method.tokenizer
    rows = context.shape[-2]
    tokens = tokenizer([" ".join(["X"] * rows) + f" {name}." for name in NAMES])
    embedded = model.token_embedding(tokens)
    prompts = []
    for number, (name, whole) in enumerate(zip(NAMES, embedded, strict=True)):
        own = context if context.ndim == 2 else context[number]
        length = len(tokenizer.encode(name))
        start, words, rest = whole[:1], whole[1 + rows : 1 + rows + length], whole[1 + rows + length :]
        half = rows // 2
        parts = {
            "end": [start, own, words, rest],
            "middle": [start, own[:half], words, own[half:], rest],
            "front": [start, words, own, rest],
        }[position]
        prompts.append(torch.cat(parts))
    return torch.stack(prompts), tokens.argmax(dim=-1)


def plain_coop(clip: FrozenClip, context: Tensor, position: str, images: Tensor) -> Tensor:
    vectors = functional.normalize(plain_features(clip, *plain_prompts(clip, context, position)), dim=-1)
    return clip.scale * functional.normalize(images, dim=-1) @ vectors.T


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("position", PLACES)
@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("context", [1, 5])
@pytest.mark.parametrize("at_once", [None, 2])
def test_coop_is_the_plain_computation(
    clip: FrozenClip, images: Tensor, position: str, specific: bool, context: int, at_once: int | None
) -> None:
    config = coop.Config(context=context, class_specific=specific, position=position, classes_at_once=at_once)  # type: ignore[arg-type]
    adapter = coop.CoOp(config, clip, NAMES, ()).double()
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    adapter.loss(images, labels).backward()
    again = adapter.context.detach().clone().requires_grad_()
    logits = plain_coop(clip, again, position, images)
    torch.testing.assert_close(adapter.logits(images).detach(), logits.detach(), rtol=1e-9, atol=1e-9)
    functional.cross_entropy(logits, labels).backward()
    assert again.grad is not None and again.grad.abs().max() > 1e-6
    torch.testing.assert_close(adapter.context.grad, again.grad, rtol=1e-7, atol=1e-10)


def test_a_worded_start_is_zero_shot(clip: FrozenClip, images: Tensor) -> None:
    """Before training, the context "a photo of a" is the template."""
    adapter = coop.CoOp(coop.Config(start="a photo of a"), clip, NAMES, ()).double()
    vectors = clip.class_vectors(NAMES, ["a photo of a {}."]).double()
    expected = clip.scale * functional.normalize(images, dim=-1) @ vectors.T
    torch.testing.assert_close(adapter.logits(images).detach(), expected, rtol=1e-5, atol=1e-4)
    assert adapter.context.shape == (4, 48)
    assert torch.equal(adapter.head(), adapter.class_vectors().detach())


def test_equal_class_specific_contexts_are_unified(clip: FrozenClip, images: Tensor) -> None:
    unified = coop.CoOp(coop.Config(context=4), clip, NAMES, ()).double()
    specific = coop.CoOp(coop.Config(context=4, class_specific=True), clip, NAMES, ()).double()
    with torch.no_grad():
        specific.context.copy_(unified.context.expand_as(specific.context))
    torch.testing.assert_close(specific.logits(images), unified.logits(images))


def test_other_blocks_see_whole_prompts(make_clip: Callable[..., FrozenClip], images: Tensor) -> None:
    """A tower with blocks of another kind: no sharing, the same result as open_clip's own encode_text."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2, "qk_norm": True}
    other = make_clip(text_cfg=text, custom_text=True)
    adapter = coop.CoOp(coop.Config(start="a photo of a", classes_at_once=2), other, NAMES, ()).double()
    assert not adapter.tower.shares
    vectors = other.class_vectors(NAMES, ["a photo of a {}."]).double()
    torch.testing.assert_close(adapter.class_vectors().detach(), vectors, rtol=1e-5, atol=1e-6)


def plain_cocoop(clip: FrozenClip, context: Tensor, net: nn.Module, images: Tensor) -> Tensor:
    rows = []
    for feature in functional.normalize(images, dim=-1):
        moved = context + net(feature)
        vectors = functional.normalize(plain_features(clip, *plain_prompts(clip, moved, "end")), dim=-1)
        rows.append(clip.scale * vectors @ feature)
    return torch.stack(rows)


@pytest.mark.parametrize("at_once", [None, 2])
def test_cocoop_in_a_batch_is_the_loop_over_images(clip: FrozenClip, images: Tensor, at_once: int | None) -> None:
    adapter = cocoop.CoCoOp(cocoop.Config(classes_at_once=at_once), clip, NAMES, ()).double()
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    loss = adapter.loss(images, labels)
    found = torch.autograd.grad(loss, list(adapter.parameters()))
    logits = plain_cocoop(clip, adapter.context, adapter.meta_net, images)
    torch.testing.assert_close(adapter.logits(images), logits, rtol=1e-9, atol=1e-9)
    expected = torch.autograd.grad(functional.cross_entropy(logits, labels), list(adapter.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_cocoop_whose_net_is_silent_is_coop(clip: FrozenClip, images: Tensor) -> None:
    moved = cocoop.CoCoOp(cocoop.Config(), clip, NAMES, ()).double()
    nn.init.zeros_(moved.meta_net[2].weight)  # type: ignore[arg-type]
    nn.init.zeros_(moved.meta_net[2].bias)  # type: ignore[arg-type]
    still = coop.CoOp(coop.Config(start="a photo of a"), clip, NAMES, ()).double()
    torch.testing.assert_close(moved.logits(images), still.logits(images))


def test_the_papers_number_of_parameters(make_clip: Callable[..., FrozenClip]) -> None:
    """ViT-B/16 has 512 features and a text width of 512: 35,360 for CoCoOp, 2,048 and 8,192 for CoOp."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 1}
    wide = make_clip(double=False, text_cfg=text, embed_dim=512)

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(cocoop.CoCoOp(cocoop.Config(), wide, NAMES, ())) == 35_360
    assert count(coop.CoOp(coop.Config(context=4), wide, NAMES, ())) == 2_048
    assert count(coop.CoOp(coop.Config(), wide, NAMES, ())) == 8_192


@pytest.mark.parametrize("kind", [coop, cocoop])
def test_clip_stays_as_it_is_and_names_can_change(clip: FrozenClip, images: Tensor, kind: object) -> None:
    adapter = (
        coop.CoOp(coop.Config(), clip, NAMES, ()) if kind is coop else cocoop.CoCoOp(cocoop.Config(), clip, NAMES, ())
    ).double()
    before = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    adapter.loss(images, torch.tensor([0, 1, 2, 3, 4, 0])).backward()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in clip.model.state_dict().items())
    assert all(parameter.grad is None for parameter in clip.model.parameters())
    learned = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    assert not any(name.startswith("clip") for name in learned)
    adapter.bind(("horse", "cow", "cat"), ())
    assert adapter.logits(images).shape == (6, 3)
    assert all(torch.equal(learned[name], tensor) for name, tensor in adapter.state_dict().items())


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ((), "two class names or more"),
        (("dog",), "two class names or more"),
        (("dog", " "), "not empty"),
        (("black dog", "cat", "Black_Dog"), "distinct names"),
        (("dog", "very " * 70 + "old cat"), "a name that fits 77 tokens with 16 of context"),
    ],
)
def test_class_names_that_cannot_be(clip: FrozenClip, classes: tuple[str, ...], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        coop.CoOp(coop.Config(), clip, classes, ())


@pytest.mark.parametrize("config", [coop.Config(context=74), coop.Config(start=" ")])
def test_contexts_that_cannot_be(clip: FrozenClip, config: coop.Config) -> None:
    with pytest.raises(SettingError):
        coop.CoOp(config, clip, NAMES, ())


def test_a_class_specific_context_stays_with_its_classes(clip: FrozenClip) -> None:
    adapter = coop.CoOp(coop.Config(class_specific=True), clip, NAMES, ())
    with pytest.raises(SettingError, match="those that it was trained with"):
        adapter.bind(NAMES[::-1], ())
