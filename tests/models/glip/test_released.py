"""Weights with the names and shapes of the authors' release, made up here: every one arrives where it belongs.

The tower and the heads are computed from the made-up file by their names there, with two softmaxes and plain loops;
the backbone by timm, which reads Swin's original files itself.
"""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import checkpoint_filter_fn
from torch import Tensor
from torch.nn import functional
from torchvision.ops import deform_conv2d

from pipeline.errors import SettingError
from pipeline.models.glip import Config, Glip
from pipeline.models.glip.network import EncodedText, align
from pipeline.models.glip.released import converted, is_released
from tests.glip_weights import CONFIG, FUSED, GROUPS, HEADS, TEXT, WIDTH, State, released


@pytest.fixture(scope="module")
def method() -> Glip:
    return Glip(CONFIG).eval()


def loaded(state: State, place: Path, config: Config = CONFIG) -> Glip:
    torch.save({"model": state, "iteration": 7}, place / "glip.pth")
    return Glip(replace(config, start_from=str(place / "glip.pth"))).eval()


@pytest.fixture(scope="module")
def both(method: Glip, tmp_path_factory: pytest.TempPathFactory) -> tuple[Glip, State]:
    """The method with made-up weights, and these without their wrapper."""
    state = released(method.tokenizer.vocab_size)
    found = loaded(state, tmp_path_factory.mktemp("released"))
    return found, {name.removeprefix("module."): tensor for name, tensor in state.items()}


def within(state: State, name: str) -> State:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def applied(state: State, name: str, values: Tensor) -> Tensor:
    return functional.linear(values, state[f"{name}.weight"].flatten(1), state[f"{name}.bias"])


def normed(state: State, name: str, values: Tensor, eps: float = 1e-5) -> Tensor:
    return functional.layer_norm(values, values.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def test_the_backbone_reads_blue_first(both: tuple[Glip, State]) -> None:
    """The stages are those that timm computes from the original file, for an image whose channels are reversed."""
    glip, state = both
    body = timm.create_model(
        "clipmill_small_swin", img_size=64, strict_img_size=False, always_partition=True, num_classes=0
    ).eval()
    original = {name: value for name, value in within(state, "backbone.body").items() if not name.startswith("norm")}
    body.load_state_dict(checkpoint_filter_fn(original, body), strict=False)
    torch.manual_seed(0)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        stages = body.forward_intermediates(image.flip(1), intermediates_only=True, norm=False)
        found = glip.model.image.body(image)
    for number, stage in enumerate(found, start=1):
        torch.testing.assert_close(stage.permute(0, 3, 1, 2), stages[number], rtol=1e-4, atol=1e-4)
        norms = [within(state, "backbone.body")[f"norm{number}.{part}"] for part in ("weight", "bias")]
        own = glip.model.image.norms[number - 1]
        assert torch.equal(own.weight, norms[0]) and torch.equal(own.bias, norms[1])


def test_the_pyramid(both: tuple[Glip, State]) -> None:
    glip, state = both
    torch.manual_seed(0)
    stages = {str(n): torch.randn(1, width, 8 >> n, 8 >> n) for n, width in enumerate((48, 96, 192))}

    def convolved(name: str, values: Tensor, stride: int = 1) -> Tensor:
        kernel = state[f"backbone.fpn.{name}.weight"]
        return functional.conv2d(values, kernel, state[f"backbone.fpn.{name}.bias"], stride, kernel.shape[-1] // 2)

    inner = convolved("fpn_inner4", stages["2"])
    expected = [convolved("fpn_layer4", inner)]
    for number in (3, 2):
        inner = convolved(f"fpn_inner{number}", stages[str(number - 2)]) + functional.interpolate(inner, scale_factor=2)
        expected.insert(0, convolved(f"fpn_layer{number}", inner))
    expected.append(convolved("top_blocks.p6", expected[-1], 2))
    expected.append(convolved("top_blocks.p7", expected[-1].relu(), 2))
    with torch.no_grad():
        found = glip.model.image.pyramid(stages)
    for one, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def fused(state: State, image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The authors' attention: one matrix of scores, 1 added to the scores of real tokens, two softmaxes."""
    image, text = normed(state, "layer_norm_v", image), normed(state, "layer_norm_l", text)
    heads = {
        name: applied(state, f"attn.{name}", values).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for name, values in (("v_proj", image), ("l_proj", text), ("values_v_proj", image), ("values_l_proj", text))
    }
    scores = heads["v_proj"] * (FUSED // HEADS) ** -0.5 @ heads["l_proj"].transpose(2, 3)
    to_text = scores.transpose(2, 3).softmax(dim=-1) @ heads["values_v_proj"]
    added = torch.where(mask, 1.0, -9e15)[:, None, None]
    to_image = (scores + added).softmax(dim=-1) @ heads["values_l_proj"]
    image = image + state["gamma_v"] * applied(state, "attn.out_v_proj", to_image.transpose(1, 2).flatten(2))
    return image, text + state["gamma_l"] * applied(state, "attn.out_l_proj", to_text.transpose(1, 2).flatten(2))


def bert(state: State, hidden: Tensor, mask: Tensor) -> Tensor:
    parts = {
        name: applied(state, f"attention.self.{name}", hidden).unflatten(-1, (2, -1)).transpose(1, 2)
        for name in ("query", "key", "value")
    }
    scores = parts["query"] @ parts["key"].transpose(2, 3) / math.sqrt(TEXT // 2)
    mixed = scores.masked_fill(~mask[:, None, None], -1e9).softmax(dim=-1) @ parts["value"]
    mixed = applied(state, "attention.output.dense", mixed.transpose(1, 2).flatten(2))
    hidden = normed(state, "attention.output.LayerNorm", hidden + mixed, 1e-12)
    inner = applied(state, "output.dense", functional.gelu(applied(state, "intermediate.dense", hidden)))
    return normed(state, "output.LayerNorm", hidden + inner, 1e-12)


def hard(values: Tensor) -> Tensor:
    return functional.relu6(values + 3) / 6


def dyconv(state: State, levels: list[Tensor]) -> list[Tensor]:
    def convolved(number: int, source: Tensor, moves: Tensor, mask: Tensor, stride: int = 1) -> Tensor:
        kernel, bias = (state[f"DyConv.{number}.conv.{part}"] for part in ("weight", "bias"))
        found = deform_conv2d(source, moves, kernel, bias, stride, 1, mask=mask)
        return functional.group_norm(
            found, GROUPS, *(state[f"DyConv.{number}.bn.{part}"] for part in ("weight", "bias"))
        )

    results = []
    for number, level in enumerate(levels):
        raw = functional.conv2d(level, state["offset.weight"], state["offset.bias"], padding=1)
        moves, mask = raw[:, :18].contiguous(), raw[:, 18:].sigmoid()
        branches = [convolved(1, level, moves, mask)]
        if number > 0:
            branches.append(convolved(2, levels[number - 1], moves, mask, 2))
        if number < len(levels) - 1:
            above = levels[number + 1]
            height, width = above.shape[2:]
            own = [
                torch.stack([one.flatten()[: count * height * width].view(count, height, width) for one in values])
                for count, values in ((18, moves), (9, mask))
            ]
            found = convolved(0, above, *own)
            size = level.shape[2:]
            branches.append(functional.interpolate(found, size=size, mode="bilinear", align_corners=True))
        attention = [
            hard(functional.conv2d(one.mean((2, 3), True), state["AttnConv.1.weight"], state["AttnConv.1.bias"]).relu())
            for one in branches
        ]
        mixed = torch.stack([one * weight for one, weight in zip(branches, attention, strict=True)]).mean(dim=0)
        numbers = hard(applied(state, "relu.fc.2", applied(state, "relu.fc.0", mixed.mean((2, 3))).relu()))
        a1, b1, a2, b2 = numbers[:, :, None, None].split(WIDTH, dim=1)
        results.append(torch.max(mixed * ((a1 - 0.5) * 2 + 1) + b1 - 0.5, mixed * ((a2 - 0.5) * 2) + b2 - 0.5))
    return results


def flat(levels: list[Tensor]) -> Tensor:
    return torch.cat([level.flatten(2) for level in levels], dim=2).transpose(1, 2)


def test_tower_and_heads(both: tuple[Glip, State]) -> None:
    """Two blocks and every head, from the names of the file."""
    glip, state = both
    torch.manual_seed(0)
    levels = [torch.randn(2, WIDTH, side, side) for side in (6, 3, 2, 1, 1)]
    hidden, mask = torch.randn(2, 8, TEXT), torch.ones(2, 8, dtype=torch.bool)
    mask[1, 6:] = False
    with torch.no_grad():
        ((found, weights),) = glip.model.compare(levels, [EncodedText(hidden, mask)])
        logits = align(found.features, weights)
    for block in range(2):
        pixels, hidden = fused(within(state, f"rpn.head.dyhead_tower.{3 * block}.b_attn"), flat(levels), hidden, mask)
        parts = pixels.transpose(1, 2).split([level.shape[2] ** 2 for level in levels], dim=2)
        levels = [part.unflatten(2, level.shape[2:]) for part, level in zip(parts, levels, strict=True)]
        hidden = bert(within(state, f"rpn.head.dyhead_tower.{3 * block + 1}"), hidden, mask)
        levels = dyconv(within(state, f"rpn.head.dyhead_tower.{3 * block + 2}"), levels)
    head = within(state, "rpn.head")
    unit = functional.normalize(hidden, dim=-1)
    projected, bias = applied(head, "dot_product_projection_text", unit / 2), unit @ head["bias_lang"] + head["bias0"]
    expected = flat(levels) @ projected.transpose(1, 2) / head["log_scale"].exp() + bias[:, None]
    torch.testing.assert_close(logits[0], expected[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits[1, :, :6], expected[1, :, :6], rtol=1e-3, atol=1e-3)
    moves = [head[f"scales.{n}.scale"] * applied(head, "bbox_pred", flat([level])) for n, level in enumerate(levels)]
    torch.testing.assert_close(found.moves, torch.cat(moves, dim=1), rtol=1e-3, atol=1e-3)
    centerness = applied(head, "centerness", flat(levels))[..., 0]
    torch.testing.assert_close(found.centerness, centerness, rtol=1e-3, atol=1e-3)


def test_the_text_tower(both: tuple[Glip, State]) -> None:
    glip, state = both
    own = within(state, "language_backbone.body.model")
    tokens, mask = torch.tensor([[2, 9, 11, 3, 0, 0, 0, 0]]), torch.tensor([[True] * 4 + [False] * 4])
    hidden = own["embeddings.word_embeddings.weight"][tokens] + own["embeddings.position_embeddings.weight"][:8]
    hidden = normed(own, "embeddings.LayerNorm", hidden + own["embeddings.token_type_embeddings.weight"][0], 1e-12)
    expected = bert(within(own, "encoder.layer.0"), hidden, mask)
    with torch.no_grad():
        found = glip.model.encode_text(tokens, mask).hidden
    torch.testing.assert_close(found[0, :4], expected[0, :4], rtol=1e-4, atol=1e-4)


def test_weights_without_fusion(method: Glip, tmp_path: Path) -> None:
    """GLIP-T (A): the blocks of the dynamic head are numbered one by one."""
    state = released(method.tokenizer.vocab_size, fused=False)
    found = loaded(state, tmp_path, replace(CONFIG, fusion=False))
    expected = state["module.rpn.head.dyhead_tower.1.DyConv.2.conv.weight"]
    assert torch.equal(found.model.tower.images[1].below.convolution.weight, expected)
    assert found.ground([torch.zeros(3, 64, 64, dtype=torch.uint8)], ["a star"], [[(2, 6)]])


def test_weights_of_another_network_are_refused(method: Glip, tmp_path: Path) -> None:
    state = released(method.tokenizer.vocab_size)
    with pytest.raises(SettingError, match=r"start_from.*2 missing|unknown"):
        loaded(state, tmp_path, replace(CONFIG, fusion=False))
    state["module.rpn.head.mystery"] = torch.zeros(1)
    with pytest.raises(SettingError, match="head.mystery"):
        loaded(state, tmp_path)
    (tmp_path / "note.pth").write_text("no weights")
    for place in (str(tmp_path / "note.pth"), str(tmp_path / "none.pth"), str(tmp_path / "nowhere")):
        with pytest.raises(SettingError, match="start_from"):
            Glip(replace(CONFIG, start_from=place))


def test_the_reading_of_offsets_is_mentioned(method: Glip, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaded(released(method.tokenizer.vocab_size), tmp_path, replace(CONFIG, compat_offsets=False))
    assert "compat_offsets" in caplog.text


def test_nothing_in_a_file_is_run(method: Glip, tmp_path: Path) -> None:
    """An object of the training code in the file, as released files have, becomes one without behaviour."""
    state: dict[str, Any] = released(method.tokenizer.vocab_size)
    torch.save({"model": state, "optimizer": {"path": Path("x")}, "hook": _Hook()}, tmp_path / "glip.pth")
    Glip(replace(CONFIG, start_from=str(tmp_path / "glip.pth")))
    assert not _Hook.ran


class _Hook:
    """Sets a flag when it is unpickled."""

    ran = False

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _run, ()


def _run() -> None:
    _Hook.ran = True


def test_names_that_are_not_known_stay() -> None:
    assert converted({"backbone.body.patch_embed.norm.bias": torch.zeros(2), "other": torch.ones(1)}).keys() == {
        "image.body.patch_embed.norm.bias",
        "other",
    }
    assert is_released({"backbone.body.x": torch.zeros(1)}) and not is_released({"image.body.x": torch.zeros(1)})
