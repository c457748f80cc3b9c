"""LSeg's network by the specification's counts and shapes, its blocks by hand-made numbers, its loss by torch's own,
and what it segments."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.loaders.batches import LoaderConfig, training_batches
from pipeline.loaders.images import resize
from pipeline.loaders.order import Order
from pipeline.loaders.segmentation import VOID
from pipeline.models import class_vectors
from pipeline.models.lseg import SMALL, Config, Lseg, PixelNetwork
from pipeline.models.pixel_text import SCALE, SpatialBlock, listed_positions, pixel_text_loss, scores_of
from pipeline.models.segments import ImageViews, stretched_rows, window_starts
from pipeline.models.towers.dpt import Decoder, Reassembly, ResidualUnit, TransformerMaps
from pipeline.shards.snapshot import Snapshot
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.optimizer import AdamW, make_optimizer

WIDTHS = (256, 512, 1024, 1024)
X = torch.tensor([[[[1.0, 2], [3, 4]], [[4, 0], [1, -6]]]])  # [1, 2, 2, 2] of the specification


@pytest.fixture(scope="module", autouse=True)
def one_text_tower() -> Iterator[None]:
    """Loaded once for all of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_vectors, "open_teacher", cache(class_vectors.open_teacher))
        yield


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def built(**settings: Any) -> Lseg:
    torch.manual_seed(0)
    return Lseg(replace(Lseg.smallest(), **settings))


def test_the_decoder_has_the_parameters_of_the_authors_code() -> None:
    """Without the residual unit that the authors' coarsest level has and never uses."""
    with torch.device("meta"):
        decoder, unit = Decoder(WIDTHS, 256, "batch", 512), ResidualUnit(256, "batch")
        reassembly = Reassembly(1024, WIDTHS, 16)
    assert count(decoder.levels) == 2816 * 256 * 9  # 6.49 M
    assert count(decoder.fusions) + count(unit) == 9_708_544
    assert count(decoder.head) == 256 * 512 + 512
    assert count(reassembly) == 22_815_232
    assert round((count(decoder) + count(unit) + count(reassembly)) / 1e6, 1) == 39.1


def test_taps_of_a_large_transformer_at_480_pixels() -> None:
    """Shapes only: on the meta device, where nothing is computed."""
    with torch.device("meta"):
        tokens = [(torch.empty(1, 900, 1024), torch.empty(1, 1024)) for _ in range(4)]
        maps = Reassembly(1024, WIDTHS, 16)(tokens, (30, 30))
        vectors = Decoder(WIDTHS, 256, "group", 512)(maps)
    assert [tuple(one.shape[1:]) for one in maps] == [(256, 120, 120), (512, 60, 60), (1024, 30, 30), (1024, 15, 15)]
    assert vectors.shape == (1, 512, 240, 240)


@pytest.mark.parametrize(
    ("backbone", "norm"),
    [("vit_large_patch16_384", "batch"), ("resnet101", "batch"), ("deit3_small_patch16_224", "group")],
)
def test_the_papers_networks_give_a_vector_for_every_second_pixel(backbone: str, norm: Any) -> None:
    """Without weights: on the meta device."""
    with torch.device("meta"):
        network = PixelNetwork(Config(backbone=backbone, norm=norm), 512).eval()
        vectors = network(torch.empty(1, 3, 480, 480))
    assert vectors.shape == (1, 512, 240, 240)
    if backbone.startswith("vit"):
        maps: Any = network.backbone
        assert maps.taps == (5, 11, 17, 23) and round(count(maps.body) / 1e6, 1) == 303.7
        decoder = count(network) - count(maps.body) + 1_180_672  # the unused residual unit
        assert round(decoder / 1e6, 1) == 39.1


@pytest.mark.parametrize("patch", [8, 16, 32])
def test_maps_have_the_same_strides_for_all_patches(patch: int) -> None:
    with torch.device("meta"):
        grid = 96 // patch
        tokens = [(torch.empty(1, grid**2, 16), torch.empty(1, 16)) for _ in range(4)]
        maps = Reassembly(16, (4, 8, 16, 16), patch)(tokens, (grid, grid))
    assert [one.shape[-1] for one in maps] == [24, 12, 6, 3]


def test_taps_are_those_of_timm_at_the_size_of_its_positions() -> None:
    """Also at another size, where timm's resized positions are close to ours but not equal."""
    maps: Any = built().model.backbone
    assert isinstance(maps, TransformerMaps) and maps.taps == (0, 1, 2, 3)
    images = torch.randn(2, 3, 64, 64)
    found, grid = maps.tokens(images)
    expected = maps.body.forward_intermediates(images, indices=[0, 1, 2, 3], intermediates_only=True, output_fmt="NLC")
    assert grid == (8, 8)
    assert all(torch.allclose(one, other, atol=1e-6) for (one, _), other in zip(found, expected, strict=True))
    larger = torch.randn(1, 3, 96, 64)
    found, grid = maps.tokens(larger)
    expected = maps.body.forward_intermediates(larger, indices=[0, 3], intermediates_only=True, output_fmt="NLC")
    assert grid == (12, 8) and torch.allclose(found[0][0], expected[0], atol=0.1)


def test_positions_are_resized_bilinearly() -> None:
    maps: Any = built().model.backbone
    with torch.no_grad():
        maps.body.pos_embed.copy_(torch.arange(65.0)[None, :, None].expand(1, 65, 48))
        table = maps._positions((16, 8))
    column = 1 + torch.arange(8.0)[:, None] * 8
    wanted = functional.interpolate(column.T[None], size=16, mode="linear", align_corners=False)[0, 0]
    assert torch.allclose(table[0, 1:, 0].view(16, 8)[:, 0], wanted) and table[0, 0, 0] == 0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("depthwise", [1.5, 2.5, 3.5, 4.5, 4.5, 0.5, 1.5, -0.055]),
        ("bottleneck", [5.5, 4.5, 6.5, 8.5, 8.5, 2.5, 4.5, -0.015]),
    ],
)
def test_blocks_give_the_numbers_of_the_specification(kind: Any, expected: list[float]) -> None:
    block = SpatialBlock(kind, 1)
    with torch.no_grad():
        block.convolution.weight.zero_()[0, 0, 1, 1] = 1
        block.convolution.bias.fill_(0.5)  # type: ignore[union-attr]
        once = block.once(X, block.convolution.weight, block.convolution.bias)
    assert functional.leaky_relu(once, 0.01).flatten().tolist() == pytest.approx(expected)
    assert torch.equal(block(X), once)  # the last time has no activation
    assert count(block) == 10


@pytest.mark.parametrize(("kind", "depth"), [("none", 0), ("bottleneck", 3), ("depthwise", 2)])
def test_permuting_labels_permutes_scores(kind: Any, depth: int) -> None:
    pixels, vectors = unit(2, 8, 6, 7), unit(5, 8)
    order = torch.tensor([3, 0, 4, 1, 2])
    block = SpatialBlock(kind, depth) if depth else nn.Identity()
    assert torch.allclose(
        block(scores_of(pixels, vectors[order])), block(scores_of(pixels, vectors))[:, order], atol=1e-5
    )


def test_scores_are_bounded_and_ignore_lengths() -> None:
    method = built(block="none", block_depth=0)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    scores = scores_of(method.model(method.normalised(images)), method.vectors)
    assert scores.shape == (2, 4, 32, 32) and float(scores.detach().abs().max()) <= SCALE + 1e-4
    with torch.no_grad():
        method.model.decoder.head.weight *= 3
        method.model.decoder.head.bias *= 3  # type: ignore[operator]
    assert torch.allclose(scores_of(method.model(method.normalised(images)), method.vectors), scores, atol=1e-4)


def unit(*shape: int) -> Tensor:
    return functional.normalize(torch.randn(*shape), dim=1)


@pytest.mark.parametrize(("kind", "depth"), [("none", 0), ("bottleneck", 1), ("bottleneck", 4), ("depthwise", 3)])
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_the_loss_in_strips_is_the_plain_one(kind: Any, depth: int, rows: int) -> None:
    """Value and gradients; sizes that are no multiples of each other; void pixels."""
    pixels, vectors = unit(2, 8, 9, 12).requires_grad_(), unit(5, 8)
    labels = torch.randint(VOID, 5, (2, 19, 23))
    block = SpatialBlock(kind, depth) if depth else None
    trained = [pixels, *(block.parameters() if block else ())]
    found = pixel_text_loss(pixels, vectors, labels, block, strip=2 * 5 * 23 * rows)
    gradients = torch.autograd.grad(found * 0.5, trained)
    scores = scores_of(pixels, vectors)
    whole = functional.interpolate(block(scores) if block else scores, (19, 23), mode="bilinear", align_corners=True)
    plain = functional.cross_entropy(whole, labels, ignore_index=VOID, reduction="sum")
    assert found.item() == pytest.approx(plain.item(), rel=1e-5)
    for one, other in zip(gradients, torch.autograd.grad(plain * 0.5, trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("kind", "depth"), [("none", 0), ("bottleneck", 1), ("bottleneck", 3), ("depthwise", 2)])
@pytest.mark.parametrize("rows", [1, 50])
def test_the_loss_with_lists_is_that_of_each_image_by_itself(kind: Any, depth: int, rows: int) -> None:
    """Each image against its listed texts alone, with torch's own loss; lists of several lengths, in any order."""
    pixels, vectors = unit(3, 8, 6, 9).requires_grad_(), unit(7, 8)
    lists = [[6, 0, 3, 1], [2, 5], [4]]
    listed = torch.tensor([one + [VOID] * (4 - len(one)) for one in lists])
    places = [torch.randint(VOID, len(one), (13, 17)) for one in lists]
    labels = torch.stack([torch.tensor([*one, VOID])[place] for one, place in zip(lists, places, strict=True)])
    block = SpatialBlock(kind, depth) if depth else None
    trained = [pixels, *(block.parameters() if block else ())]
    found = pixel_text_loss(pixels, vectors, labels, block, strip=3 * 4 * 17 * rows, listed=listed)
    plain = torch.zeros(())
    for number, (one, place) in enumerate(zip(lists, places, strict=True)):
        scores = scores_of(pixels[number : number + 1], vectors[one])
        whole = functional.interpolate(
            block(scores) if block else scores, (13, 17), mode="bilinear", align_corners=True
        )
        plain = plain + functional.cross_entropy(whole, place[None], ignore_index=VOID, reduction="sum")
    assert found.item() == pytest.approx(plain.item(), rel=1e-5)
    gradients = torch.autograd.grad(found * 0.5, trained)
    for one, other in zip(gradients, torch.autograd.grad(plain * 0.5, trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_a_list_of_all_labels_is_no_list() -> None:
    pixels, vectors, labels = unit(2, 8, 6, 9), unit(5, 8), torch.randint(VOID, 5, (2, 12, 18))
    block, everything = SpatialBlock("bottleneck", 2), torch.arange(5).expand(2, 5)
    found = pixel_text_loss(pixels, vectors, labels, block, listed=everything)
    assert found.item() == pytest.approx(pixel_text_loss(pixels, vectors, labels, block).item(), rel=1e-6)


def test_labels_that_are_not_listed_are_left_out() -> None:
    labels = torch.tensor([[[0, 3, VOID]], [[3, 1, 0]]])
    found = listed_positions(labels, torch.tensor([[3, 0, 2], [1, VOID, VOID]]), 4)
    assert found.tolist() == [[[1, 0, VOID]], [[VOID, 0, VOID]]]


@pytest.mark.parametrize(
    "settings",
    [{"labels_per_image": 2}, {"two_words": True, "unlabelled": "yellow", "other_classes": "unlabelled"}],
)
def test_a_step_with_lists_reads_what_its_readers_make(settings: dict[str, Any], snapshot: Snapshot) -> None:
    """Fewer labels to choose from make a lower loss."""
    method = built(block="none", block_depth=0, **settings)
    order = Order([12, 12], seed=0, batch_size=8, lanes=2)
    config = LoaderConfig(loader_workers=0)
    (batch,) = training_batches(snapshot, method.readers(train=True), order, steps=range(1), config=config)
    assert batch["label_list"].shape[1] >= 2
    lists, labels = batch["label_list"].tolist(), batch["labels"]
    for image, listed in zip(labels, lists, strict=True):
        assert set(image.unique().tolist()) <= {VOID, *listed}
    loss = method.training_step(batch)["cross_entropy"]
    loss.backward()
    whole = built(block="none", block_depth=0, unlabelled=settings.get("unlabelled", ""))
    assert loss.item() < whole.training_step({key: batch[key] for key in ("image", "labels")})["cross_entropy"].item()


def test_a_batch_of_void_pixels_costs_nothing() -> None:
    method = built()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    loss = method.training_step({"image": images, "labels": torch.full((2, 64, 64), VOID, dtype=torch.int16)})
    loss["cross_entropy"].backward()
    assert loss["cross_entropy"].item() == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in method.parameters())


def test_rows_are_resized_as_torch_does() -> None:
    maps = torch.randn(3, 7, 5)
    for height, width in ((14, 10), (20, 3), (1, 1), (7, 5)):
        whole = functional.interpolate(maps[None], (height, width), mode="bilinear", align_corners=True)[0]
        rows = [stretched_rows(maps, first, first + 1, height, width) for first in range(height)]
        assert torch.allclose(torch.cat(rows, dim=1), whole, atol=1e-5)


def test_windows_cover_a_side() -> None:
    assert window_starts(480, 480, 2 / 3) == [0] == window_starts(20, 480, 2 / 3)
    assert window_starts(520, 480, 2 / 3) == [0, 40]
    assert window_starts(1000, 480, 2 / 3) == [0, 320, 520]


@pytest.mark.parametrize("size", [(50, 80), (1, 1), (4, 300)])
@pytest.mark.parametrize("block", ["none", "bottleneck"])
def test_images_of_any_size_and_any_words(size: tuple[int, int], block: Any) -> None:
    """The order of the words changes numbers, not regions; probabilities are those of a softmax."""
    method = built(block=block, block_depth=0 if block == "none" else 2).eval()
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    words = ("red", "a dog", "green thing")
    views = ImageViews(side=96, scales=(1.0, 0.5), flip=True)
    (found,) = method.segment([image], words, views)
    (turned,) = method.segment([image], words[::-1], views)
    assert found.labels.shape == size and found.labels.dtype == torch.int16
    assert torch.equal(2 - turned.labels, found.labels) and torch.allclose(turned.scores, found.scores, atol=1e-5)
    assert 1 / 3 <= float(found.scores.min()) and float(found.scores.max()) <= 1


def test_one_view_is_the_model_itself() -> None:
    method = built().eval()
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    (found,) = method.segment([image], method.config.class_names)
    assert method.model.block is not None
    with torch.no_grad():
        scores = method.model.block(scores_of(method.model(method.normalised(image[None])), method.vectors))
        logits = functional.interpolate(scores, (64, 64), mode="bilinear", align_corners=True)
    best, labels = logits.softmax(dim=1)[0].max(dim=0)
    assert torch.equal(labels, found.labels.long()) and torch.allclose(best, found.scores, atol=1e-5)


@pytest.mark.parametrize("block", ["none", "bottleneck"])
def test_windows_and_scales_are_plain_means(block: Any) -> None:
    """Against a loop over windows, mirrors and sizes that holds the logits of all words for all pixels."""
    method = built(block=block, block_depth=0 if block == "none" else 2).eval()
    random = torch.Generator().manual_seed(5)
    image = torch.randint(0, 256, (3, 70, 100), dtype=torch.uint8, generator=random)
    words = ("red", "a dog", "green")
    views = ImageViews(side=100, stride=0.5, scales=(1.0, 1.3), flip=True)
    vectors, expected = method.word_vectors(words), torch.zeros(3, 70, 100)
    with torch.no_grad():
        for height, width in ((70, 100), (91, 130)):
            canvas = resize(image.permute(1, 2, 0).numpy(), (height, width), "bilinear").clone()
            total, counts = torch.zeros(3, height, width), torch.zeros(height, width)
            for top in (*range(0, height - 64, 32), height - 64):
                for left in (*range(0, width - 64, 32), width - 64):
                    part = canvas[None, :, top : top + 64, left : left + 64]
                    for mirrored in (False, True):
                        pixels = method.model(method.normalised(part.flip(3) if mirrored else part))
                        scores = scores_of(pixels, vectors)
                        scores = scores if method.model.block is None else method.model.block(scores)
                        logits = functional.interpolate(scores, (64, 64), mode="bilinear", align_corners=True)[0]
                        total[:, top : top + 64, left : left + 64] += (logits.flip(2) if mirrored else logits) / 2
                    counts[top : top + 64, left : left + 64] += 1
            mean = (total / counts)[None]
            expected += functional.interpolate(mean, (70, 100), mode="bilinear", align_corners=True)[0] / 2
    (found,) = method.segment([image], words, views)
    torch.testing.assert_close(found.scores, expected.softmax(dim=0).amax(dim=0), rtol=1e-4, atol=1e-4)
    assert (found.labels == expected.argmax(dim=0)).float().mean() > 0.999


def test_words_are_as_many_as_labels_can_number() -> None:
    method = built(block="none", block_depth=0).eval()
    with pytest.raises(SettingError, match="words: got 32768.*at most 32767"):
        method.segment([torch.zeros(3, 8, 8, dtype=torch.uint8)], [f"word {number}" for number in range(32768)])


def test_windows_and_mirrors_of_one_colour_agree() -> None:
    """Averages of equal windows are the window."""
    method = built(block="none", block_depth=0).eval()
    image = torch.full((3, 96, 96), 90, dtype=torch.uint8)
    (found,) = method.segment([image], ("red", "blue"), ImageViews(side=96))
    assert found.labels.shape == (96, 96) and found.scores.isfinite().all()
    for wrong in ((), ("red", "Red")):
        with pytest.raises(SettingError, match="words"):
            method.segment([image], wrong)
    with pytest.raises(SettingError, match="window"):
        method.segment([image], ("red",), ImageViews(window=40))


@pytest.fixture(scope="module")
def snapshot(make_snapshot: Callable[..., Snapshot]) -> Snapshot:
    return make_snapshot((12, 12), regions=("x", 4))


@pytest.mark.parametrize("backbone", ["clipmill_small_vit", "clipmill_small_resnet"])
def test_a_short_training_learns_the_pixels(backbone: str, snapshot: Snapshot, tmp_path: Any) -> None:
    """And a checkpoint segments as before, with new words of the same text tower alone."""
    method = built(backbone=backbone, block="none", block_depth=0, unlabelled="ground", class_names=NAMES)
    order = Order([12, 12], seed=0, batch_size=8, lanes=2)
    batches = training_batches(
        snapshot, method.readers(train=True), order, steps=range(16), config=LoaderConfig(loader_workers=0)
    )
    optimizer = make_optimizer(AdamW(learning_rate=3e-3, weight_decay=0.01), method)
    losses = []
    for batch in batches:
        loss = method.training_step(batch)["cross_entropy"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-4:]) / 4 < 0.85 * losses[0], losses
    meta = Meta(step=3, samples_seen=24, batch_size=8, lanes=2, seed=0, snapshot="x")
    loaded: Any = load_method(Checkpoints(str(tmp_path)).save(method, optimizer, meta).folder.uri)
    image, words = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8), ("red", "zebra")
    (found,), (again,) = method.eval().segment([image], words), loaded.segment([image], words)
    assert torch.equal(found.labels, again.labels)
    loaded.tower_digest = "another"
    with pytest.raises(SettingError, match="the CLIP that this model was trained with"):
        loaded.segment([image], ("panda",))


NAMES = ("red", "green", "blue", "yellow", "ground")


def test_the_decoder_may_have_a_rate_of_its_own() -> None:
    method = built()
    groups = make_optimizer(AdamW(tower_rates={"decoder": 10.0}), method).param_groups
    names = {id(value): name for name, value in method.named_parameters()}
    for group in groups:
        inside = {names[id(value)].startswith("model.backbone") for value in group["params"]}
        assert inside == {group["rate_scale"] == 1.0}


def test_the_samples_figure_has_a_legend(snapshot: Snapshot) -> None:
    from pipeline.loaders.samples import Samples

    samples = Samples(snapshot)
    figure = Lseg.samples_figure(Lseg.smallest(), None, [samples[number] for number in range(3)], "three")
    assert isinstance(figure, Figure)
    assert {text.get_text() for text in figure.legends[0].get_texts()} <= {"red", "green", "blue", "yellow"}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"block": "depthwise", "block_depth": 0}, "block_depth: got 0.*1 to 4"),
        ({"block_depth": 5, "block": "bottleneck"}, "block_depth"),
        ({"image_size": 100}, "image_size: got 100.*multiple of 32"),
        ({"taps": (3, 2, 1, 0)}, "taps"),
        ({"unlabelled": "sky"}, "unlabelled"),
        ({"two_words": True}, "unlabelled: nothing given, expected a class name"),
        (
            {"two_words": True, "unlabelled": "red", "dataset_classes": (("owl", "red"),)},
            "dataset_classes.*a trained class",
        ),
        ({"other_classes": "unlabelled"}, "unlabelled"),
        ({"labels_per_image": 1}, "labels_per_image: got 1"),
        ({"labels_per_image": 4, "two_words": True, "unlabelled": "red"}, "labels_per_image"),
        ({"class_names": ("a", "A")}, "words"),
        ({"class_names": ()}, "class_names"),
        ({"text_tower": ""}, "text_tower"),
        ({"backbone": "resnet5"}, "backbone"),
        ({"backbone": "levit_128"}, "backbone.*a vision transformer or a ResNet"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        Lseg.check(replace(Lseg.smallest(), **settings))


def test_taps_beyond_the_last_block() -> None:
    with pytest.raises(SettingError, match="taps"):
        built(taps=(0, 1, 2, 4))
    assert SMALL["image_size"] % 32 == 0 and Config().image_size == 480
