"""CLIPasso: attention by hand and by torch's kernel, edges, probabilities, the loss by hand, a sketch of a shape."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.generation.attention import LayerFeatures, attention_maps
from pipeline.generation.guides import Guide
from pipeline.generation.loop import LoopConfig, Optimization
from pipeline.generation.method import Subject
from pipeline.generation.methods.clipasso import (
    ClipAsso,
    Config,
    SketchObjective,
    edges,
    salient_strokes,
    start_probabilities,
)
from pipeline.generation.streams import Draw, generators
from pipeline.generation.views import PerspectiveCrops
from pipeline.loaders.images import ImageTransform
from pipeline.models.class_vectors import untrained
from pipeline.models.clip import Clip
from pipeline.models.clip import Config as ClipConfig
from tests.generation.toy_clip import colour_guide


@pytest.fixture(scope="module")
def vision_transformer() -> Guide:
    return Guide(untrained("clipmill-tiny"), "tiny")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def resnet() -> Iterator[Guide]:
    """OpenAI's ResNet with eight channels, on 64 pixels."""
    from open_clip.modified_resnet import ModifiedResNet

    torch.manual_seed(0)
    method = Clip(ClipConfig(architecture="clipmill-tiny"))
    size = method.model.visual.preprocess_cfg
    method.model.visual = ModifiedResNet(layers=[1, 1, 1, 1], output_dim=32, heads=4, image_size=64, width=8)
    method.model.visual.preprocess_cfg = size
    yield Guide(method, "resnet")


def photo(side: int = 64) -> Tensor:
    """A dark ring on white: float [3, side, side]."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    distance = ((x - side / 2) ** 2 + (y - side / 2) ** 2).sqrt()
    return torch.where(((distance - side / 3).abs() < 3), 0.1, 1.0).expand(3, -1, -1)


def test_attention_of_a_vision_transformer_is_the_softmax_of_its_products(vision_transformer: Guide) -> None:
    """By hand from the projections of each block, of the class token, mean over heads and layers."""
    images = torch.rand(2, 3, 64, 64)
    visual = vision_transformer.model.model.visual  # type: ignore[attr-defined]
    kept: list[Tensor] = []

    def weights(module: nn.MultiheadAttention, given: Any, named: Any, _: Any) -> None:
        tokens = given[0] if given else named["query"]
        both = functional.linear(tokens, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)[:2]
        query, key = (one.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for one in both)
        kept.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 0, 1:])

    handles = [block.attn.register_forward_hook(weights, with_kwargs=True) for block in visual.transformer.resblocks]
    with torch.no_grad():
        vision_transformer.images(images)
    for handle in handles:
        handle.remove()
    assert len(kept) == 2
    found = attention_maps(vision_transformer, images)
    assert tuple(found.shape) == (2, 4, 4)
    assert torch.allclose(found.flatten(1), torch.stack(kept).mean(0), atol=1e-5)
    assert torch.allclose(attention_maps(vision_transformer, images, last=1).flatten(1), kept[1], atol=1e-5)


def test_attention_of_a_resnet_is_that_of_its_pooling(resnet: Guide) -> None:
    """The pooled token's weights: those with which the values give the tower's own result."""
    pool = resnet.model.model.visual.attnpool  # type: ignore[attr-defined]
    kept: list[tuple[Tensor, Tensor]] = []
    handle = pool.register_forward_hook(lambda _, given, out: kept.append((given[0], out)))
    images = torch.rand(1, 3, 64, 64)
    found = attention_maps(resnet, images)
    handle.remove()
    assert tuple(found.shape) == (1, 2, 2)
    (given, out) = kept[0]
    tokens = given.flatten(2).permute(2, 0, 1)
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + pool.positional_embedding[:, None]
    bias = torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias])
    result, weights = functional.multi_head_attention_forward(
        tokens, tokens, tokens, tokens.shape[-1], pool.num_heads, None, bias, None, None, False, 0.0,
        pool.c_proj.weight, pool.c_proj.bias, use_separate_proj_weight=True, q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight, training=False,
    )  # fmt: skip
    assert torch.allclose(result[0], out, atol=1e-5)
    assert torch.allclose(found.flatten(1), weights[:, 0, 1:], atol=1e-5)


class Tower(nn.Module):
    """A CLIP whose image tower is any module for 64 pixels."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.model, self.tokenizer = nn.Module(), None
        self.model.visual = visual

    def transforms(self, train: bool) -> ImageTransform:
        return ImageTransform(size=(64, 64))

    def encode_image(self, image: Tensor) -> Tensor:
        return functional.normalize(self.model.visual(image / 255).flatten(1), dim=1)


SMALL: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
TIMM = {
    "plain": lambda: timm.models.VisionTransformer(**SMALL, num_classes=8),
    "normed": lambda: timm.models.VisionTransformer(**SMALL, num_classes=8, qk_norm=True, reg_tokens=4),
    "no class": lambda: timm.models.VisionTransformer(**SMALL, num_classes=8, class_token=False, global_pool="map"),
    "rotated": lambda: timm.models.Eva(**SMALL, num_classes=8, use_rot_pos_emb=True, qkv_fused=False),
    "biased": lambda: timm.models.Eva(**SMALL, num_classes=8, use_rot_pos_emb=True),
    "relative": lambda: timm.models.Beit(**SMALL, num_classes=8, use_rel_pos_bias=True),
}


@pytest.mark.parametrize("kind", TIMM)
def test_attention_of_timms_towers_is_that_of_their_fused_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the queries and keys that torch's kernel gets, with norms, biases and rotations; registers are no patches."""
    torch.manual_seed(1)
    visual = TIMM[kind]().eval()
    for parameter in visual.parameters():  # biases and relative places begin at 0
        parameter.data += 0.2 * torch.randn_like(parameter)
    guide, images, kept = Guide(Tower(visual), kind), torch.rand(2, 3, 64, 64), []  # type: ignore[arg-type]
    kernel = functional.scaled_dot_product_attention

    def spied(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        weights = (query @ key.mT / query.shape[-1] ** 0.5 + (0 if attn_mask is None else attn_mask)).softmax(-1)
        kept.append(weights.mean(1)) if query.shape == key.shape else None
        out = kernel(query, key, value, attn_mask=attn_mask, **more)
        assert torch.allclose(weights @ value, out, atol=1e-5)
        return out

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spied)
    before = guide.images(images)
    assert len(kept) == 2
    rows = [weights.mean(1) if kind == "no class" else weights[:, 0] for weights in kept]
    wanted = [row[:, -16:].unflatten(1, (4, 4)) for row in rows]
    assert torch.allclose(attention_maps(guide, images), (wanted[0] + wanted[1]) / 2, atol=1e-5)
    assert torch.allclose(attention_maps(guide, images, last=1), wanted[1], atol=1e-5)
    assert not torch.allclose(wanted[0], wanted[1], atol=1e-4) and wanted[1].flatten(1).std(1).min() > 1e-4
    assert len(kept) == 2 and torch.equal(guide.images(images), before) and len(kept) == 4  # fused again


def coca(**changed: Any) -> VisionTransformer:
    """A small image tower of open_clip, with CoCa's pooling if asked."""
    sizes = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 2.0}
    return VisionTransformer(**{**sizes, "output_dim": 32, **changed}).eval()


def test_queries_of_a_pooling_are_no_layer_of_attention() -> None:
    """CoCa's pooling has its own queries, also as many as there are tokens."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 64, 64)
    for queries in (17, 5):
        pooled = coca(attentional_pool=True, attn_pooler_queries=queries, attn_pooler_heads=2)
        plain = coca()
        plain.load_state_dict(pooled.state_dict(), strict=False)
        maps = [attention_maps(Guide(Tower(one), "tower"), images) for one in (Pooled(pooled), plain)]  # type: ignore[arg-type]
        assert torch.allclose(*maps, atol=1e-6)


class Pooled(nn.Module):
    """The first of several results."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        out = self.inner(images)
        pooled: Tensor = out[0] if isinstance(out, tuple) else out
        return pooled


def test_towers_whose_attention_is_no_map_are_refused() -> None:
    """Windows, and blocks of open_clip whose weights are not at hand."""
    swin = timm.models.SwinTransformer(
        img_size=64, window_size=4, embed_dim=16, depths=(1,), num_heads=(2,), num_classes=8
    )
    for visual, reason in ((swin, "without windows"), (coca(qk_norm=True), "without changed blocks")):
        with pytest.raises(SettingError, match=f"^saliency: got 'odd', expected .*{reason}"):
            attention_maps(Guide(Tower(visual), "odd"), torch.rand(1, 3, 64, 64))  # type: ignore[arg-type]


def test_layers_come_in_the_order_of_their_names(resnet: Guide) -> None:
    """Also where they run in another one; each has its own weight."""
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        forward, _ = LayerFeatures(resnet, ["layer2", "layer3"])(images)
        backward, _ = LayerFeatures(resnet, ["layer3", "layer2"])(images)
    assert forward[0].shape == backward[1].shape == (2, 64, 8, 8)
    assert all(torch.equal(*pair) for pair in zip(forward, reversed(backward), strict=True))
    views = PerspectiveCrops(count=1)
    losses = {}
    for names, weights in ((("layer2", "layer3"), (1.0, 5.0)), (("layer3", "layer2"), (5.0, 1.0))):
        objective = SketchObjective(images.flip(0), LayerFeatures(resnet, names), weights, 0.0, views)
        found = objective.compared(images, images.flip(0), 2)
        losses[names] = {name: found[name].tolist() for name in ("layer2", "layer3")}
    assert losses["layer2", "layer3"] == losses["layer3", "layer2"]
    apart = (forward[1] - forward[1].flip(0)).square().flatten(1).mean(1)
    assert losses["layer3", "layer2"]["layer3"] == pytest.approx((5 * apart).tolist())


def test_a_layer_without_an_output_is_refused(vision_transformer: Guide) -> None:
    """It is in the tower, but never called: a projection inside torch's attention."""
    name = "transformer.resblocks.0.attn.out_proj"
    features = LayerFeatures(vision_transformer, [name])
    with pytest.raises(SettingError, match=f"^layers: got '{name}', expected layers that run"):
        features(torch.rand(1, 3, 64, 64))


def test_towers_without_attention_or_layers_are_refused(vision_transformer: Guide) -> None:
    with pytest.raises(SettingError, match="image tower of open_clip"):
        attention_maps(colour_guide(), torch.rand(1, 3, 8, 8))
    with pytest.raises(SettingError, match="layers: got 'layer2', expected modules of the image tower, such as "):
        LayerFeatures(vision_transformer, ["layer2"])


def test_edges_are_where_the_image_changes() -> None:
    drawn = edges(photo())
    assert set(drawn.unique().tolist()) == {0, 1}
    ring = photo()[0] < 0.5
    assert float(drawn[ring].mean()) > 0.9 and float(drawn[~ring].mean()) < 0.3
    assert not edges(torch.ones(3, 20, 20)).any()


def test_probabilities_are_a_softmax_over_positive_pixels() -> None:
    saliency = torch.tensor([[[0.0, 0.3, 0.6], [0.9, 0, 0]]])
    found = start_probabilities(saliency, 0.3)
    weights = torch.tensor([1.0, 2.0, 3.0]).exp()
    assert torch.allclose(found.flatten()[[1, 2, 3]], weights / weights.sum())
    assert float(found.sum()) == pytest.approx(1) and not found[saliency == 0].any()
    with pytest.raises(SettingError, match="an image without edges"):
        start_probabilities(torch.zeros(1, 3, 3), 0.3)


def test_strokes_start_at_places_drawn_without_replacement() -> None:
    chances = torch.zeros(2, 40, 40)
    chances[:, 5:9, 7:9] = 1 / 8
    start = salient_strokes(chances, [1, 2], 8, 1.5)
    cells = {tuple(place) for place in start.points[0, :, 0].tolist()}
    assert cells == {(x + 0.5, y + 0.5) for x in range(7, 9) for y in range(5, 9)}
    assert start.points.diff(dim=2).abs().max() <= 0.025 * 40 and not torch.equal(start.points[0], start.points[1])
    assert start.colours.sum() == 16 and bool((start.colours[..., 3] == 1).all())
    with pytest.raises(SettingError, match="at most 8, the pixels at which strokes may start"):
        salient_strokes(chances, [1, 2], 9, 1.5)


def test_the_loss_is_that_of_two_layers_and_the_embedding_in_shared_views(resnet: Guide) -> None:
    sketches, photos = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    features = LayerFeatures(resnet, ["layer2", "layer3"])
    views = PerspectiveCrops(count=2, scale=(0.8, 0.8), ratio=(1, 1))
    objective = SketchObjective(photos, features, (1.0, 2.0), 0.1, views)
    found = objective.losses(sketches, generators([1, 2], 0, Draw.VIEWS))
    drawn = views.draw(generators([1, 2], 0, Draw.VIEWS))
    for image in range(2):
        pairs = [(sketches[image, None], photos[image, None])]
        made = [views.apply(one[image, None], drawn[image, None], (64, 64)) for one in (sketches, photos)]
        pairs += [(made[0][n, None], made[1][n, None]) for n in range(2)]
        wanted = {"layer2": 0.0, "layer3": 0.0, "embedding": 0.0}
        for one, other in pairs:
            (ours, mine), (theirs, their) = features(one), features(other)
            wanted["layer2"] += float((ours[0] - theirs[0]).square().mean()) / 3
            wanted["layer3"] += 2 * float((ours[1] - theirs[1]).square().mean()) / 3
            wanted["embedding"] += 0.1 * float(1 - (mine * their).sum()) / 3
        assert {name: float(loss[image]) for name, loss in found.items()} == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    same = objective.losses(photos, generators([1, 2], 0, Draw.VIEWS))
    assert all(loss.abs().max() < 1e-6 for loss in same.values())


def small(**changed: object) -> Config:
    loop = LoopConfig(steps=30, evaluate_every=10)
    more = {"clip": "resnet", "saliency": "vit", "side": 64, "strokes": 6, "views": 2, "loop": loop}
    return Config(**{**more, **changed})  # type: ignore[arg-type]


def test_a_sketch_gets_nearer_to_its_photo(resnet: Guide, vision_transformer: Guide) -> None:
    guides, seeds = {"resnet": resnet, "vit": vision_transformer}, [1, 2]
    method = ClipAsso(small())
    assert method.models == ("resnet", "vit")
    picture, objective = method.start([Subject(image=photo(96))] * 2, seeds, guides)
    before = objective.evaluation(picture.render())
    run = Optimization(picture, objective, method.loop, seeds, resnet)
    after = run.run().history[-1]
    assert all(end < start for end, start in zip(after["loss"], before.tolist(), strict=True))
    assert [name for name, one in picture.named_parameters() if one.requires_grad] == ["points"]
    assert after["judge"][0] > 0


@pytest.mark.parametrize("start", ["attention", "edges", "random"])
def test_other_starts_need_what_they_need(start: str, resnet: Guide, vision_transformer: Guide) -> None:
    method = ClipAsso(small(start=start, strokes=400))
    guides = {"resnet": resnet, "vit": vision_transformer}
    picture, _ = method.start([Subject(image=photo())], [3], {name: guides[name] for name in method.models})
    assert ("vit" in method.models) == (start == "attention")
    begin = picture.points[0, :, 0].detach().long()  # type: ignore[index]
    image = photo()
    on_edges = edges(image)[begin[:, 1], begin[:, 0]].mean()
    (seen,) = functional.interpolate(attention_maps(vision_transformer, image[None])[None], (64, 64), mode="bicubic")[0]
    part = float((seen[begin[:, 1], begin[:, 0]] > seen.median()).float().mean())  # half of all pixels are above
    quadrants = torch.bincount(begin[:, 0] // 32 * 2 + begin[:, 1] // 32, minlength=4)
    assert len(begin.unique(dim=0)) == 400
    assert (on_edges == 1) == (start == "edges") and on_edges > float(edges(image).mean()) / 2
    assert (part > 0.65) == (start == "attention")
    assert (start != "random") or (quadrants.min() > 70 and abs(part - 0.5) < 0.1)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"strokes": 0}, "strokes"),
        ({"temperature": 0}, "temperature"),
        ({"layer_weights": (1.0,)}, "layer_weights"),
        ({"layer_weights": (1.0, math.nan)}, "layer_weights"),
        ({"layer_weights": (math.inf, 1.0)}, "layer_weights"),
        ({"embedding_weight": math.inf}, "embedding_weight"),
        ({"width": math.inf}, "width"),
        ({"rate": math.inf}, "rate"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"layers": (), "embedding_weight": 0}, "layers"),
        ({"attention_layers": -1}, "attention_layers"),
    ],
)
def test_wrong_settings_are_refused(changed: dict[str, object], field: str) -> None:
    with pytest.raises(SettingError, match=f"^{field}: "):
        small(**changed)
    with pytest.raises(SettingError, match="an image for each"):
        ClipAsso(small()).start([Subject()], [1], {"resnet": colour_guide()})
