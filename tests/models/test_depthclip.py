"""DepthCLIP: words and bins by hand, both maps by an independent computation, and what training changes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import DataError, SettingError
from pipeline.loaders.batches import LoaderConfig, training_batches
from pipeline.loaders.order import Order
from pipeline.models.clip import Clip
from pipeline.models.clip import Config as ClipConfig
from pipeline.models.depth_words import (
    BINS,
    WORDS,
    DepthHead,
    DepthWords,
    WordDepth,
    released_map,
    word_vectors,
    zero_shot_depth,
)
from pipeline.models.depthclip import Config, DepthClip, log_loss
from pipeline.models.towers.grid import grid_features
from pipeline.models.towers.spatial import map_size, projected_map
from pipeline.shards.snapshot import Snapshot
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.optimizer import AdamW, make_optimizer

UNIFORM = 2.142857  # of the specification: the mean bin


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of an architecture with open_clip's ResNet: 256 channels, texts of 128 numbers, as 2048 and 1024."""
    place = tmp_path_factory.mktemp("configs") / "depth-test-resnet.json"
    tower = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    place.write_text(json.dumps({"embed_dim": 128, "vision_cfg": tower, "text_cfg": text}))
    open_clip.add_model_config(place)
    return place.stem


@pytest.fixture(scope="module")
def clip(resnet: str) -> Clip:
    torch.manual_seed(0)
    made = Clip(ClipConfig(architecture=resnet)).eval()
    for _ in range(2):  # statistics of batch normalisation that are no identity
        made.train()
        made.encode_image(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
    return made.eval()


def images(height: int = 64, width: int = 96, count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


# Words and bins


def head_of(response: Tensor, **settings: Any) -> tuple[DepthHead, Tensor]:
    """A head whose vectors are axes, and a map [1, 7, 1, 1] with this response to each."""
    words = DepthWords(**settings)
    return DepthHead(torch.eye(len(words.words)), words), response[None, :, None, None]


@pytest.mark.parametrize("number", range(7))
def test_a_one_hot_response_gives_the_exact_bin(number: int) -> None:
    head, found = head_of(torch.eye(7)[number])
    assert head(found, torch.tensor([0])).item() == BINS[number]


def test_a_uniform_response_gives_the_mean_bin() -> None:
    head, found = head_of(torch.ones(7))
    assert head(found, torch.tensor([0])).item() == pytest.approx(UNIFORM, abs=1e-6)
    assert sum(BINS) / 7 == pytest.approx(UNIFORM, abs=1e-6)


def test_logits_are_a_thousand_times_the_product() -> None:
    """The authors multiply by 100 and divide by 0.1."""
    response = torch.tensor([0.1, 0.101, 0.0985, 0.0, 0.0, 0.0, 0.1])
    head, found = head_of(response)
    weights = np.exp(100 * response.double().numpy() / 0.1 - 101)
    expected = (weights * BINS).sum() / weights.sum()
    assert head(found, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-4)


def test_bins_of_a_scene_are_its_row() -> None:
    near, far = tuple(0.5 * one for one in BINS), tuple(2 * one for one in BINS)
    head, found = head_of(torch.eye(7)[6], scenes=("bath", "hall"), scene_bins=(near, far))
    depths = head(found.expand(3, -1, -1, -1), torch.tensor([-1, 0, 1]))
    assert depths.flatten().tolist() == [3.75, 1.5, 6.0]


def test_an_unknown_scene_has_the_mean_of_the_scenes_and_trains_all() -> None:
    """Three classes of two words, against the formula in numpy; without classes there is one row."""
    table = ((1.0, 2.0), (3.0, 5.0), (0.5, 8.0))
    words = DepthWords(words=("near", "far"), bins=(9.0, 9.0), scenes=("a", "b", "c"), scene_bins=table)
    head = DepthHead(torch.eye(2), replace(words, word_temperature=1.0), ("bins",))
    assert head.bins.tolist() == [list(row) for row in table]
    response = np.array([0.3, 0.9])
    weights = np.exp(response) / np.exp(response).sum()
    found = torch.tensor(response, dtype=torch.float32)[None, :, None, None]
    depth = head(found, torch.tensor([-1]))
    assert depth.item() == pytest.approx(weights @ np.mean(table, axis=0))
    depth.sum().backward()
    assert head.bins.grad is not None and np.allclose(head.bins.grad, np.tile(weights / 3, (3, 1)), atol=1e-6)
    assert DepthWords().table().tolist() == [pytest.approx(BINS)] and DepthWords(scenes=("a", "b")).table().shape == (
        2,
        7,
    )


def test_training_without_known_scenes_is_what_evaluation_uses() -> None:
    """One image whose class no scene has: its depth falls to the truth in every class alike."""
    method = built(trained=("bins",))
    optimizer = make_optimizer(AdamW(learning_rate=0.1, weight_decay=0.0), method)
    image, truth = images(64, 64, 1), torch.full((1, 64, 64), 0.5)
    batch = {"image": image, "depth": truth, "valid": truth > 0, "scene": torch.tensor([-1])}
    before = method.estimate_depth([image[0]], [-1])[0].mean().item()
    for _ in range(30):
        method.training_step(batch)["log_depth"].backward()
        optimizer.step()
        optimizer.zero_grad()
    unknown = method.estimate_depth([image[0]], [-1])[0].mean().item()
    assert before > 1.2 and unknown < 0.8
    rows = [method.estimate_depth([image[0]], [number])[0].mean().item() for number in range(4)]
    assert rows == pytest.approx([unknown] * 4, rel=1e-5)


@pytest.mark.parametrize(("channels", "width"), [(2048, 1024), (256, 128)])
def test_the_channel_pick_is_every_second_one_after_the_normalisation(channels: int, width: int) -> None:
    found = torch.randn(2, channels, 3, 4)
    picked = released_map(found, width)
    unit = found / found.norm(dim=1, keepdim=True)
    assert torch.allclose(picked, unit[:, ::2], atol=1e-6)
    assert not torch.allclose(picked.norm(dim=1), torch.ones(2, 3, 4), atol=0.05)
    resized = functional.interpolate(unit.permute(0, 2, 3, 1).flatten(0, 1), size=width, mode="nearest")
    assert torch.allclose(picked.permute(0, 2, 3, 1).flatten(0, 1), resized, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"words": ("near",), "bins": (1.0,)}, "words"),
        ({"words": ("near", "near"), "bins": (1.0, 2.0)}, "words"),
        ({"words": ("near", "far")}, "bins"),
        ({"bins": (*BINS[:6], float("nan"))}, "bins"),
        ({"bins": (0.0, *BINS[1:])}, "bins"),
        ({"template": "far"}, "template"),
        ({"word_temperature": 0.0}, "word_temperature"),
        ({"scenes": ("a", "a")}, "scenes"),
        ({"scenes": ("a", "b"), "scene_bins": (BINS,)}, "scene_bins"),
        ({"scenes": ("a",), "scene_bins": (BINS[:3],)}, "scene_bins"),
    ],
)
def test_bad_words_name_the_field(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=field):
        DepthWords(**settings)


# Maps


def by_hand(clip: Clip, image: np.ndarray, mode: str, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Map [h, w, D] and depth [h, w] of one image, float64, from open_clip's modules and numpy alone."""
    visual: Any = clip.model.visual
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = torch.from_numpy((image / 255 - mean) / std).permute(2, 0, 1)[None].double()
    tower = visual.double()
    hidden = tower.layer4(tower.layer3(tower.layer2(tower.layer1(tower.stem(pixels)))))
    cells = hidden[0].detach().permute(1, 2, 0).numpy()
    if mode == "projected":
        pool = tower.attnpool
        for layer in (pool.v_proj, pool.c_proj):
            cells = cells @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    cells = cells / np.linalg.norm(cells, axis=-1, keepdims=True)
    cells = cells[..., ::2] if mode == "released" else cells
    visual.float()
    tokens = open_clip.get_tokenizer("RN50")([f"This object is {word}" for word in WORDS])
    texts = clip.model.encode_text(tokens).detach().double().numpy()
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    logits = scale * cells @ texts.T
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return cells, (weights / weights.sum(axis=-1, keepdims=True)) @ np.array(BINS)


@pytest.mark.parametrize("mode", ["released", "projected"])
@torch.no_grad()
def test_depth_is_that_of_an_independent_computation(clip: Clip, mode: Any) -> None:
    """With the authors' temperature, and with one at which random weights give several words."""
    image = images(2, 3)[0].repeat_interleave(32, dim=1).repeat_interleave(32, dim=2)
    for scale in (1000.0, 20.0):
        model = zero_shot_depth(clip, DepthWords(mode=mode, word_temperature=1 / scale), "a ResNet")
        cells, expected = by_hand(clip, image.permute(1, 2, 0).numpy(), mode, scale)
        found = model.map(image[None])
        assert np.abs(found[0].permute(1, 2, 0).numpy() - cells).max() < 1e-5 < 1e-3 < cells.std(axis=(0, 1)).max()
        depth = model.head(found, torch.tensor([0]))[0]
        assert depth.shape == (2, 3) and np.abs(depth.numpy() - expected).max() < (1e-3 if scale > 100 else 2e-5)


@torch.no_grad()
def test_flip_average_and_upsampling(clip: Clip) -> None:
    """The mean with the mirrored image's mirrored depth, resized with aligned corners: corners keep their value."""
    image = images()[0]
    model = zero_shot_depth(clip, DepthWords(mode="projected"), "a ResNet")
    scene = torch.tensor([0])
    plain = model.head(model.map(image[None]), scene)
    mirrored = model.head(model.map(image[None].flip(-1)), scene).flip(-1)
    (single,), (both,) = model.estimate_depth([image], flip=False), model.estimate_depth([image])
    assert single.shape == both.shape == (64, 96)
    assert torch.allclose(single[[0, 0, -1, -1], [0, -1, 0, -1]], plain[0][[0, 0, -1, -1], [0, -1, 0, -1]])
    mean = ((plain + mirrored) / 2)[0]
    assert torch.allclose(both[[0, 0, -1, -1], [0, -1, 0, -1]], mean[[0, 0, -1, -1], [0, -1, 0, -1]])
    (turned,) = model.estimate_depth([image.flip(-1)])
    assert torch.allclose(turned.flip(-1), both, atol=1e-5)


@torch.no_grad()
def test_the_projected_map_is_the_attention_pools_value_path(clip: Clip) -> None:
    """Where all positions have one value, attention gives it whatever it looks at: the pool is the projection."""
    pool: Any = clip.model.visual.attnpool
    kept = pool.positional_embedding.clone()
    pool.positional_embedding.zero_()
    try:
        found = torch.randn(3, 256, 1, 1).expand(3, 256, 2, 2)
        pooled = pool(found)
        projected = projected_map(clip.model.visual, found)
    finally:
        pool.positional_embedding.copy_(kept)
    assert projected.shape == (3, 128, 2, 2)
    assert torch.allclose(projected, pooled[:, :, None, None].expand_as(projected), atol=1e-5)


@torch.no_grad()
def test_a_transformers_map_is_what_its_pooling_would_see() -> None:
    """Its patches are in the class token's space: with patches for the class token they are the tower's own result."""
    torch.manual_seed(0)
    made = Clip(ClipConfig(architecture="clipmill-tiny")).eval()
    visual: Any = made.model.visual
    pixels = torch.randn(2, 3, 64, 64)
    found = projected_map(visual, grid_features(visual, pixels))
    visual.output_tokens, visual.pool_type = True, "tok"
    _, tokens = visual(pixels)
    expected = tokens @ visual.proj
    assert torch.allclose(found.flatten(2).transpose(1, 2), expected, atol=1e-5)
    assert map_size(visual, 480, 640) == (64, 64)


def test_sizes_that_a_resnet_takes(clip: Clip) -> None:
    visual = clip.model.visual
    assert map_size(visual, 416, 544) == (416, 544) and map_size(visual, 480, 641) == (480, 640)
    assert map_size(visual, 3, 5) == (32, 32)


def test_a_tower_without_a_map_is_refused() -> None:
    made = Clip(ClipConfig(architecture="clipmill-small")).eval()
    with pytest.raises(SettingError, match="ResNet or vision transformer"):
        zero_shot_depth(made, DepthWords(), "clipmill-small")


def test_scenes_are_named_by_the_clip(clip: Clip) -> None:
    """As zero-shot classification does; given classes are used as they are."""
    words = DepthWords(scenes=("kitchen", "hall"), scene_bins=(BINS, tuple(2 * one for one in BINS)))
    model = WordDepth(clip, words, DepthHead(word_vectors(clip, words), words).requires_grad_(False))
    some = list(images(count=3))
    prompts = clip.encode_text(clip.tokenizer([f"a photo of a {name}." for name in words.scenes]))
    transform = clip.transforms(train=False)
    pixels = torch.stack([transform(one.permute(1, 2, 0).numpy(), None) for one in some])
    expected = (clip.encode_image(pixels) @ prompts.T).argmax(dim=1).tolist()
    named = model.estimate_depth(some)
    given = model.estimate_depth(some, expected)
    assert all(torch.equal(one, other) for one, other in zip(named, given, strict=True))
    near, far = (model.estimate_depth(some[:1], [number])[0] for number in (0, 1))
    assert torch.allclose(far, 2 * near) and torch.allclose(model.estimate_depth(some[:1], [-1])[0], 1.5 * near)


# Training


def test_the_loss_by_hand() -> None:
    """One image of two valid pixels with ratios 2 and 1, one without valid pixels."""
    depth = torch.tensor([[[2.0, 3.0, 9.0]], [[1.0, 1.0, 1.0]]])
    truth = torch.tensor([[[1.0, 3.0, 0.0]], [[0.0, 0.0, 0.0]]])
    gap = np.log(2)
    losses = log_loss(depth, truth, truth > 0, 0.5)
    assert losses.tolist() == pytest.approx([gap**2 / 2 - 0.5 * (gap / 2) ** 2, 0.0])
    assert log_loss(depth, truth, truth > 0, 0.0)[0].item() == pytest.approx(gap**2 / 2)
    leaf = depth.clone().requires_grad_()
    log_loss(leaf, truth, truth > 0, 0.5).sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and (leaf.grad[truth == 0] == 0).all()


def built(**settings: Any) -> DepthClip:
    torch.manual_seed(0)
    return DepthClip(replace(DepthClip.smallest(), **settings))


@pytest.mark.parametrize(
    ("trained", "numbers"),
    [(("bins",), 28), (("bins", "temperature"), 29), (("words",), 7 * 32), (("temperature",), 1)],
)
def test_a_few_hundred_numbers_are_trained(trained: Any, numbers: int) -> None:
    """7 words in 4 classes of scenes; the CLIP and its statistics stay as they are."""
    method = built(trained=trained)
    free = [one for one in method.parameters() if one.requires_grad]
    assert sum(one.numel() for one in free) == numbers
    method.train()
    assert not method.model.training and not method.model.visual.training


def test_training_moves_bins_towards_the_truth(make_snapshot: Callable[..., Snapshot], tmp_path: Path) -> None:
    """Images of one colour have one slope; a checkpoint gives the same depth back."""
    snapshot = make_snapshot((8,), regions=("digest", 32))
    method = built(trained=("bins", "temperature"))
    before = {name: value.clone() for name, value in method.model.state_dict().items()}
    order = Order([8], seed=0, batch_size=8, lanes=1)
    config = LoaderConfig(loader_workers=0)
    batch = next(
        training_batches(snapshot, method.readers(train=True), order, steps=range(1), rank=0, world=1, config=config)
    )
    assert batch["depth"].shape == (8, 64, 64) and not batch["valid"].all()
    assert set(batch["scene"].tolist()) == {0, 1, 2, 3}
    optimizer = make_optimizer(AdamW(learning_rate=0.05, weight_decay=0.5), method)
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
    losses = []
    for _ in range(40):
        loss = method.training_step(batch)["log_depth"]
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step()
    assert losses[-1] < 0.75 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in method.model.state_dict().items())
    method.eval()
    (depth,) = method.estimate_depth([images()[0]], [0])
    meta = Meta(step=3, samples_seen=24, batch_size=8, lanes=2, seed=0, snapshot="x")
    loaded: Any = load_method(Checkpoints(str(tmp_path)).save(method, optimizer, meta).folder.uri)
    torch.manual_seed(0)
    some = list(images())
    pairs = zip(loaded.estimate_depth(some), method.estimate_depth(some), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert method.measures()["nearest_bin"] == method.head.bins.min().item() and depth.isfinite().all()


def test_a_checkpoint_with_a_row_for_unknown_scenes_is_refused(tmp_path: Path) -> None:
    """An older layout: one row more than classes."""
    method = built()
    head = method.head
    head.bins = torch.nn.Parameter(torch.cat([head.bins.detach()[:1], head.bins.detach()]))
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=2, seed=0, snapshot="x")
    saved = Checkpoints(str(tmp_path)).save(method, make_optimizer(AdamW(), method), meta)
    with pytest.raises(DataError, match=r"does not fit the checkpoint's own config: .*head\.bins"):
        load_method(saved.folder.uri)


def test_bins_stay_positive() -> None:
    method = built()
    with torch.no_grad():
        method.head.bins.fill_(-3)
    method.after_step()
    assert (method.head.bins == 1e-3).all()


def test_training_images_have_whole_cells(resnet: str) -> None:
    """32 pixels of a ResNet, 16 of the smallest transformer, before a model is built."""
    tiny = DepthClip.smallest()
    for config, good, bad in (
        (Config(architecture=resnet, pretrained=None), (416, 544), (416, 528)),
        (tiny, (48, 64), (48, 72)),
    ):
        DepthClip.check(config)
        DepthClip.check(replace(config, input_size=good))
        with pytest.raises(SettingError, match="input_size.*two multiples of"):
            DepthClip.check(replace(config, input_size=bad))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"trained": ()}, "trained"),
        ({"trained": ("bins", "bins")}, "trained"),
        ({"variance": 1.0}, "variance"),
        ({"input_size": (0, 4)}, "input_size"),
        ({"input_crop": (5, 4, 0, 9)}, "input_crop"),
        ({"teacher": "RN50:openai"}, "teacher"),
    ],
)
def test_bad_settings_name_the_field(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=field):
        Config(**settings)
