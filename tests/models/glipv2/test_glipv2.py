"""The method: its losses, the two errors of the public code, masks of what is found, stages, and initial weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import from_json, to_json
from pipeline.errors import SettingError
from pipeline.loaders.batches import SamplePosition
from pipeline.models.glip import Glip
from pipeline.models.glipv2 import Config, Glipv2
from pipeline.models.glipv2.config import BASE, DRAWN, HUGE, LEAST
from pipeline.models.glipv2.segment import PhraseMaskHead, mask_loss
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.flops import Work
from pipeline.training.optimizer import AdamW, make_optimizer
from tests.grounded import SIDE, grounded, obj

CONFIG = replace(Glipv2.smallest(), class_names=("star", "disc", "moon"), least_score=0.0)
TRIANGLE = {"segmentation": [[10, 10, 50, 10, 10, 50]]}


def built(seed: int = 0, **changes: Any) -> Glipv2:
    torch.manual_seed(seed)
    return Glipv2(replace(CONFIG, **changes)).eval()


def batch(method: Glipv2, *objects: list[dict[str, Any]], epoch: int = 0) -> dict[str, Tensor]:
    (reader,) = method.readers(train=True)
    rows = [reader.read(grounded(some), SamplePosition(epoch, number)) for number, some in enumerate(objects)]
    return reader.collate(rows)


def image(height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=random, dtype=torch.uint8)


def gradients(method: Glipv2, some: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    method.zero_grad()
    method.training_step(some)[part].backward()
    return {name: value.grad for name, value in method.named_parameters() if value.grad is not None}


def save(method: Any, place: Path) -> str:
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=1, seed=0, snapshot="0" * 64)
    return Checkpoints(str(place)).save(method, make_optimizer(AdamW(), method), meta).folder.uri


def test_the_only_box_of_an_image_is_compared_with_other_images() -> None:
    """The public code loses every anchor that is matched with the first box: its loss would be 0 here."""
    method = built(flip=0.0, jitter_scale=(1.0, 1.0))
    some = batch(method, [obj("disc", (8, 8, 32, 32))], [obj("star", (8, 8, 32, 32))])
    assert bool((some["labels"][:, 0] > 0).all()) and some["labels"].shape[1] == 1
    assert float(method.training_step(some)["inter_image"].detach()) > 0.5


def test_words_and_regions_are_compared_before_they_are_fused() -> None:
    """The public code takes tokens after fusion, which have seen the image: here no weight of the tower takes part."""
    method = built()
    some = batch(method, [obj("disc", (8, 8, 32, 32))], [obj("star", (8, 8, 32, 32))])
    found = gradients(method, some, "inter_image")
    parts = {".".join(name.split(".")[:2]) for name, value in found.items() if value.any()}
    assert parts == {"model.image", "model.text", "contrast.image", "contrast.text", "contrast.log_scale"}
    before = method.training_step(some)["inter_image"].detach()
    with torch.no_grad():
        for parameter in method.model.tower.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert float(method.training_step(some)["inter_image"].detach()) == pytest.approx(float(before), rel=1e-5)


def test_a_shared_class_joins_images() -> None:
    """A second image with the same class has a lower loss than one with another class, for equal features."""
    method = built(flip=0.0, jitter_scale=(1.0, 1.0), language_weight=0.0)
    with torch.no_grad():
        for layer in (method.contrast.image, method.contrast.text):  # type: ignore[union-attr]
            layer.weight.zero_()  # all features are equal, and so are all logits
    same = batch(method, [obj("disc", (8, 8, 32, 32))], [obj("disc", (8, 8, 32, 32))])
    # Uniform: each anchor costs log(tokens), each token of "disc" log(anchors); all others nothing.
    tokens, anchors = int(same["token_mask"].sum()), 0
    positive = method._assign(same, method._anchors(method.model.image(method.normalised(same["image"])))).positive
    anchors = int(positive.sum())
    named = 2  # the token "disc" in each prompt
    expected = (anchors * torch.tensor(float(tokens)).log() + named * torch.tensor(float(anchors)).log()) / 2 / anchors
    assert float(method.training_step(same)["inter_image"].detach()) == pytest.approx(float(expected), rel=1e-4)


def test_masked_words_are_predicted_from_the_image() -> None:
    """The loss is transformers' cross-entropy of the masked places alone, and reaches the backbone through fusion."""
    method = built(masked_tokens=1.0)
    some = batch(method, [obj("disc", (8, 8, 32, 32))], [obj("star", (8, 8, 32, 32)), obj("moon", (30, 30, 20, 20))])
    found = gradients(method, some, "language")
    assert found["model.image.body.patch_embed.proj.weight"].any()
    with torch.no_grad():
        levels = method.model.image(method.normalised(some["image"]))
        ((_, hidden),) = method.model.fuse(levels, [method.model.encode_text(some["tokens"], some["token_mask"])])
        logits = method.language(hidden, method.model.text.bert.embeddings.word_embeddings.weight)  # type: ignore[misc]
    labels = torch.full(some["tokens"].shape, -100)
    rows, columns = torch.where(some["masked_tokens"] >= 0)
    labels[rows, some["masked_at"][rows, columns]] = some["masked_tokens"][rows, columns]
    assert int((labels >= 0).sum()) == 3
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert float(method.training_step(some)["language"].detach()) == pytest.approx(float(expected), rel=1e-4)


def test_images_without_boxes_words_or_masks_give_finite_gradients() -> None:
    method = built()
    for some in (batch(method, [], []), batch(method, [obj("disc")], [])):
        losses = method.training_step(some)
        assert {"alignment", "box", "centerness", "inter_image", "language", "mask"} == set(losses)
        torch.stack(list(losses.values())).sum().backward()
        assert float(losses["mask"].detach()) == 0, "no segmentation"
    assert all(value.grad is not None and value.grad.isfinite().all() for value in method.parameters())


def test_masks_are_trained_where_they_are_known() -> None:
    method = built()
    known = batch(method, [obj("disc", (10, 10, 40, 40), **TRIANGLE)])
    both = batch(method, [obj("disc", (10, 10, 40, 40), **TRIANGLE), obj("disc", (2, 2, 50, 50))])
    losses = [float(method.training_step(one)["mask"].detach()) for one in (known, both)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3), "the second box has no mask"
    assert losses[0] == pytest.approx(0.693, abs=0.15), "undecided at the beginning"


def test_the_logit_of_a_mask_is_the_mean_over_the_phrases_tokens() -> None:
    """The head multiplies with the mean of the tokens once; written out, it is the mean of the products."""
    torch.manual_seed(0)
    head = PhraseMaskHead(8, 6, (8,), 4)
    levels = [torch.randn(1, 8, side, side) for side in (8, 4, 2, 1, 1)]
    boxes = [torch.tensor([[4.0, 4, 40, 60], [0.0, 0, 64, 64]])]
    tokens = functional.normalize(torch.randn(3, 6), dim=-1)
    with torch.no_grad():
        head.token_bias.normal_()
        each = torch.stack([head(levels, boxes, [one.expand(2, -1)], (64, 64)) for one in tokens])
        found = head(levels, boxes, [tokens.mean(dim=0).expand(2, -1)], (64, 64))
    torch.testing.assert_close(found, each.mean(dim=0), rtol=1e-4, atol=1e-5)
    unknown = torch.full((2, 28, 28), 255, dtype=torch.uint8)
    unknown[0] = 1
    expected = functional.binary_cross_entropy_with_logits(found[0], torch.ones(28, 28))
    torch.testing.assert_close(mask_loss(found, unknown), expected)


def test_the_mask_head_alone() -> None:
    """Nothing else is trained, and batches that pass through change no statistic of the frozen network."""
    method = built(masks="head").train()
    assert method.training and not method.model.training and method.contrast is None and method.language is None
    some = batch(method, [obj("disc", (10, 10, 40, 40), **TRIANGLE)])
    losses = method.training_step(some)
    assert set(losses) == {"mask"}
    losses["mask"].backward()
    trained = {name for name, value in method.named_parameters() if value.grad is not None}
    assert trained and all(name.startswith("segment.") for name in trained)
    assert {name for name, value in method.named_parameters() if value.requires_grad} == trained


@pytest.mark.parametrize("tuning", ["prompt", "linear"])
def test_tuning_trains_what_glips_tuning_does(tuning: Any, tmp_path: Path) -> None:
    """A step from a trained GLIPv2 changes GLIP's parts alone; the mask head stays, and masks are found with it."""
    place = save(built(seed=3), tmp_path / "v2")
    fixed = replace(CONFIG.grounding, fixed_prompts=True)
    method = built(tuning=tuning, grounding=fixed, start_from=place)
    expected = Glip(replace(Glip.smallest(), tuning=tuning, grounding=fixed))
    trained = {name for name, value in method.named_parameters() if value.requires_grad}
    assert trained == {name for name, value in expected.named_parameters() if value.requires_grad} != set()
    some = batch(method, [obj("disc", (10, 10, 40, 40), **TRIANGLE)], [obj("star", (8, 8, 32, 32))])
    losses = method.train().training_step(some)
    wanted = {"alignment", "box", "centerness", *(["mask"] if tuning == "prompt" else [])}
    assert set(losses) == wanted and not method.segment.training  # type: ignore[union-attr]
    torch.stack(list(losses.values())).sum().backward()
    assert {name for name, value in method.named_parameters() if value.grad is not None} == trained
    assert torch.equal(some["tokens"], batch(method, [obj("disc")], [obj("star")])["tokens"]), "no word is masked"
    assert method.eval().predict([image()], ["star", "disc", "moon"])[0].masks is not None
    loaded: Any = load_method(save(method, tmp_path / "tuned"))
    assert set(loaded.state_dict()) == set(method.state_dict())


def test_found_objects_have_masks_in_images_of_any_size() -> None:
    """By class names in several prompts, and by phrases; masks do not depend on the other images."""
    method = built(chunk_words=2, detections=20)
    images = [image(64, 64, 0), image(40, 80, 1), image(64, 64, 2)]
    found = method.predict(images, ["star", "disc", "moon"])
    alone = method.predict(images[1:2], ["star", "disc", "moon"])[0]
    assert found[1].masks is not None and alone.masks is not None and len(alone) == 20
    torch.testing.assert_close(found[1].masks, alone.masks, rtol=1e-3, atol=1e-4)
    assert float(alone.masks.min()) > 0 and float(alone.masks.max()) < 1
    whole = alone.whole_masks(40, 80)
    assert whole.shape == (20, 40, 80)
    for mask, box in zip(whole, alone.boxes, strict=True):
        rows, columns = torch.where(mask)
        assert not len(rows) or bool((columns >= box[0] - 1).all() and (rows <= box[3] + 1).all())
    one = method.predict(images[:1], ["star", "disc"])[0]
    theirs = found[0].masks[found[0].labels < 2][: len(one)]  # type: ignore[index]
    torch.testing.assert_close(one.masks[: len(theirs)], theirs, rtol=1e-3, atol=1e-4)  # type: ignore[index]
    (grounded_,) = method.ground(images[:1], ["a red star and a disc"], [[(2, 10), (17, 21)]])
    assert grounded_.masks is not None and grounded_.masks.shape == (len(grounded_), 28, 28)
    assert grounded_.whole_masks(64, 64).shape == (len(grounded_), 64, 64)
    assert method.ground(images[:1], ["x"], [[]])[0].masks.shape == (0, 28, 28)  # type: ignore[union-attr]


def test_without_masks_there_are_none() -> None:
    method = built(masks="no")
    assert method.segment is None and method.predict([image()], ["star"])[0].masks is None
    assert "masks" not in batch(method, [obj("disc")])


def test_the_work_of_a_step_is_counted_without_masks() -> None:
    """The number of masks depends on the batch's contents; the losses between images and of words do not."""
    small: dict[str, Any] = {"blocks": 1, "fusion": False}
    some = batch(built(), [obj("disc", (10, 10, 40, 40), **TRIANGLE)], [])
    plain = Work(Glip(replace(Glip.smallest(), class_names=CONFIG.class_names, **small))).of(some)
    counted = Work(built(masks="no", **small)).of(some)
    assert plain is not None and counted is not None and 0 < counted - plain < plain
    assert Work(built(**small)).of(some) is None


@pytest.mark.slow
def test_masks_of_one_image_can_be_trained() -> None:
    """A triangle that is half of its box: the mask found by its name is nearer to it than the box, whose IoU is 0.5."""
    method = built(seed=1, jitter_scale=(1.0, 1.0), flip=0.0, class_names=("disc",)).train()
    some = batch(method, [obj("disc", (10, 10, 40, 40), **TRIANGLE)])
    optimizer = make_optimizer(AdamW(learning_rate=3e-3, weight_decay=0.0), method)
    for _ in range(120):
        optimizer.zero_grad()
        torch.stack(list(method.training_step(some).values())).sum().backward()
        optimizer.step()
    method.eval()
    (found,) = method.predict([some["image"][0]], ["disc"])
    mask = found.whole_masks(SIDE, SIDE, 0, 1)[0]
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    truth = (x > 10) & (y > 10) & (x + y < 60)
    assert float((mask & truth).sum() / (mask | truth).sum()) > 0.7


def test_initial_weights_of_glip_and_of_other_stages(tmp_path: Path) -> None:
    """GLIP's network without its heads; GLIPv2's with those that the next stage has; another shape is refused."""
    torch.manual_seed(3)
    plain = Glip(Glip.smallest())
    first = built(start_from=save(plain, tmp_path / "glip"))
    assert all(torch.equal(value, first.model.state_dict()[name]) for name, value in plain.model.state_dict().items())
    second = save(first, tmp_path / "v2")
    again = built(seed=9, start_from=second)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    masks = built(seed=9, start_from=second, masks="head")
    assert torch.equal(masks.segment.project.weight, first.segment.project.weight)  # type: ignore[union-attr]
    loaded: Any = load_method(second)
    expected, found = (one.predict([image(70, 50)], ["star", "moon"])[0] for one in (first, loaded.eval()))
    assert torch.equal(expected.masks, found.masks)
    with pytest.raises(SettingError, match="start_from.*contrast"):
        built(start_from=second, contrast_width=8)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"contrast_weight": -1.0}, "contrast_weight"),
        ({"contrast_anchors": 0}, "contrast_anchors"),
        ({"contrast_width": 0}, "contrast_width"),
        ({"masked_tokens": 0.0}, "masked_tokens"),
        ({"mask_weight": 0.0}, "mask_weight"),
        ({"mask_jitter": 0.5}, "mask_jitter"),
        ({"mask_convolutions": (30,)}, "mask_convolutions"),
        ({"mask_convolutions": ()}, "mask_convolutions"),
        ({"masks": "head", "tuning": "linear"}, "tuning: got 'linear', expected full with masks head"),
    ],
)
def test_bad_settings(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=field):
        Config(**{**LEAST, **changes})


def test_presets_go_through_json() -> None:
    for config in (Config(), Config(**BASE), Config(**HUGE), Config(**DRAWN), Config(masks="head"), Glipv2.smallest()):
        assert from_json(Config, to_json(config)) == config
