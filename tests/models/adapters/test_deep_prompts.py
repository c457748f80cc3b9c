"""MaPLe, IVLP and VPT against whole prompts through open_clip's blocks, with hooks that put rows in their places."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.models.adapters import ivlp, maple, vpt
from pipeline.models.adapters.adapter import FrozenClip
from tests.models.adapters.conftest import NAMES


@contextmanager
def hooked(clip: FrozenClip, text: Sequence[Tensor], vision: Sequence[Tensor]) -> Iterator[None]:
    """open_clip's own forward passes with rows in their places: the other way to build these methods."""

    def before_text(rows: Tensor) -> Callable[..., Any]:
        def change(block: nn.Module, arguments: Any, more: Any) -> Any:
            hidden = arguments[0]
            tail = hidden[:, 1 + len(rows) :]
            return (torch.cat([hidden[:, :1], rows.expand(len(hidden), -1, -1), tail], 1), *arguments[1:]), more

        return change

    def before_vision(rows: Tensor) -> Callable[..., Any]:
        def change(block: nn.Module, arguments: Any, more: Any) -> Any:
            hidden = arguments[0]
            return (torch.cat([hidden[:, : -len(rows)], rows.expand(len(hidden), -1, -1)], 1), *arguments[1:]), more

        return change

    def append(module: nn.Module, arguments: Any) -> Any:
        hidden = arguments[0]
        return (torch.cat([hidden, vision[0].expand(len(hidden), -1, -1)], 1),)

    handles = []
    for block, rows in zip(clip.model.transformer.resblocks[1:], text, strict=False):
        handles.append(block.register_forward_pre_hook(before_text(rows), with_kwargs=True))
    for block, rows in zip(clip.model.visual.transformer.resblocks[1:], vision[1:], strict=False):
        handles.append(block.register_forward_pre_hook(before_vision(rows), with_kwargs=True))
    if vision:
        handles.append(clip.model.visual.ln_pre.register_forward_pre_hook(append))
    yield
    for handle in handles:
        handle.remove()


def plain_logits(
    clip: FrozenClip, first: Tensor, deep: Sequence[Tensor], vision: Sequence[Tensor], images: Tensor
) -> Tensor:
    """Logits with "a photo of a NAME." whose first words are overwritten by ``first``."""
    model = clip.model
    tokens = clip.method.tokenizer([f"a photo of a {name}." for name in NAMES])
    embedded = model.token_embedding(tokens)
    rows = first.expand(len(tokens), -1, -1)
    prompts = torch.cat([embedded[:, :1], rows, embedded[:, 1 + len(first) :]], 1) + model.positional_embedding
    with hooked(clip, deep, vision):
        hidden = model.transformer(prompts, attn_mask=model.attn_mask)
        features = model.visual(clip.normalised(images).double())
    ends = tokens.argmax(dim=-1)
    texts = model.ln_final(hidden)[torch.arange(len(tokens)), ends] @ model.text_projection
    return clip.scale * functional.normalize(features, dim=-1) @ functional.normalize(texts, dim=-1).T


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("depth", [1, 3, 4])
@pytest.mark.parametrize("at_once", [None, 2])
def test_maple_is_the_plain_computation(clip: FrozenClip, images: Tensor, depth: int, at_once: int | None) -> None:
    adapter = maple.MaPLe(maple.Config(depth=depth, classes_at_once=at_once), clip, NAMES, ()).double()
    logits = adapter.logits(images.double())
    vision = [
        each(rows)
        for each, rows in zip([adapter.first_map, *adapter.maps], [adapter.context, *adapter.deep], strict=True)
    ]
    expected = plain_logits(clip, adapter.context, list(adapter.deep), vision, images)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    labels = torch.tensor([0, 1, 2, 3, 4])
    parameters = list(adapter.parameters())
    found = torch.autograd.grad(functional.cross_entropy(logits, labels), parameters)
    other = torch.autograd.grad(functional.cross_entropy(expected, labels), parameters)
    for one, two in zip(found, other, strict=True):
        assert two.abs().max() > 0
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-10)


def test_maple_begins_as_the_paper_has_it(clip: FrozenClip) -> None:
    adapter = maple.MaPLe(maple.Config(depth=4), clip, NAMES, ())
    words = clip.method.tokenizer.encode("a photo of a")
    torch.testing.assert_close(adapter.context.detach(), clip.model.token_embedding(torch.tensor(words[:2])).float())
    assert adapter.words == words[2:]
    assert all(torch.equal(adapter.maps[0].weight, each.weight) for each in adapter.maps)  # type: ignore[arg-type]
    assert not torch.equal(adapter.maps[0].weight, adapter.first_map.weight)  # type: ignore[arg-type]


def test_the_papers_number_of_parameters(make_clip: Callable[..., FrozenClip]) -> None:
    """Of ViT-B/16: 3,555,072 for MaPLe, 30,720 for IVLP, 73,728 for VPT with eight rows."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 0.1}
    vision = {"image_size": 32, "layers": 12, "width": 768, "head_width": 64, "patch_size": 16, "mlp_ratio": 0.1}
    wide = make_clip(double=False, text_cfg=text, embed_dim=512, vision=vision)

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(maple.MaPLe(maple.Config(), wide, NAMES, ())) == 3_555_072
    assert count(ivlp.IndependentPrompts(ivlp.Config(), wide, NAMES, ())) == 30_720
    assert count(vpt.VisualPrompts(vpt.Config(), wide, NAMES, ("a photo of a {}.",))) == 12 * 8 * 768


def test_the_text_rows_learn_from_the_images(clip: FrozenClip, images: Tensor) -> None:
    adapter = maple.MaPLe(maple.Config(depth=3), clip, NAMES, ()).double()
    features = adapter.vision.features(
        clip.normalised(images.double()),
        [
            each(rows)
            for each, rows in zip([adapter.first_map, *adapter.maps], [adapter.context, *adapter.deep], strict=True)
        ],
    )
    features.sum().backward()
    assert all(rows.grad is not None and rows.grad.abs().max() > 0 for rows in (adapter.context, *adapter.deep))


@pytest.mark.parametrize("depths", [(4, 4), (2, 3), (3, 0), (1, 1)])
def test_independent_rows_are_the_plain_computation(clip: FrozenClip, images: Tensor, depths: tuple[int, int]) -> None:
    config = ivlp.Config(text_depth=depths[0], vision_depth=depths[1], vision_length=3)
    adapter = ivlp.IndependentPrompts(config, clip, NAMES, ()).double()
    expected = plain_logits(clip, adapter.context, list(adapter.deep), list(adapter.rows), images)
    torch.testing.assert_close(adapter.logits(images.double()), expected, rtol=1e-9, atol=1e-9)


def test_visual_rows_are_the_plain_computation(clip: FrozenClip, images: Tensor) -> None:
    adapter = vpt.VisualPrompts(vpt.Config(depth=3, length=2), clip, NAMES, ("a photo of a {}.",)).double()
    with hooked(clip, (), list(adapter.rows)):
        features = clip.model.visual(clip.normalised(images).double())
    expected = clip.scale * functional.normalize(features, dim=-1) @ adapter.vectors.double().T
    torch.testing.assert_close(adapter.logits(images.double()), expected, rtol=1e-9, atol=1e-9)


def test_towers_that_average_do_not_average_the_rows(make_clip: Callable[..., FrozenClip], images: Tensor) -> None:
    """Rows that no attention sees change nothing: here they come in the last layer but after its attention."""
    vision = {"image_size": 64, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "pool_type": "avg"}
    averaging = make_clip(vision=vision)
    tower = vpt.VisualPrompts(vpt.Config(depth=1, length=2), averaging, NAMES, ("{}",)).double()
    for block in averaging.model.visual.transformer.resblocks:
        nn.init.zeros_(block.attn.out_proj.weight)
        nn.init.zeros_(block.attn.out_proj.bias)
    with torch.no_grad():
        tower.rows[0].fill_(50)
        found = tower.vision.features(averaging.normalised(images.double()), list(tower.rows))
        torch.testing.assert_close(found, averaging.model.visual(averaging.normalised(images.double())))


def test_towers_without_rows_and_too_many_layers(clip: FrozenClip, make_clip: Callable[..., FrozenClip]) -> None:
    resnet = make_clip(vision={"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None})
    for make in (
        lambda: maple.MaPLe(maple.Config(depth=2), resnet, NAMES, ()),
        lambda: ivlp.IndependentPrompts(ivlp.Config(text_depth=2, vision_depth=2), resnet, NAMES, ()),
        lambda: vpt.VisualPrompts(vpt.Config(depth=2), resnet, NAMES, ("{}",)),
    ):
        with pytest.raises(SettingError, match="ModifiedResNet.*vision transformer"):
            make()
    with pytest.raises(SettingError, match="at most 4, the layers"):
        maple.MaPLe(maple.Config(depth=5), clip, NAMES, ())
