"""ViLD's losses and scores by hand-made numbers and by torch's own, its boxes, its words, and what it refuses."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou

from pipeline.errors import SettingError, SidecarError
from pipeline.loaders.batches import LoaderConfig, training_batches
from pipeline.loaders.order import Order
from pipeline.models import class_vectors, proposals
from pipeline.models.detections import Detections, check_words
from pipeline.models.vild import (
    MOVES,
    Config,
    Vild,
    box_loss,
    class_loss,
    distillation_loss,
    ensemble,
    mask_targets,
)
from pipeline.shards.snapshot import Snapshot
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.optimizer import AdamW, make_optimizer

TEACHER = "clipmill-tiny:untrained"
PROMPTS = ("a {} thing.", "{article} photo of {article} {}.")


@pytest.fixture(scope="module", autouse=True)
def one_teacher() -> Iterator[None]:
    """Loaded once for all of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_vectors, "open_teacher", cache(class_vectors.open_teacher))
        yield


def test_the_ensemble_is_the_geometric_mean_of_the_paper() -> None:
    """Two thirds of the text head's exponent for base words, one third for novel ones."""
    text, image = torch.tensor([[0.70, 0.20]]), torch.tensor([[0.10, 0.60]])
    found = ensemble(text, image, torch.tensor([True, False]))[0].tolist()
    assert found == pytest.approx([0.36593, 0.41602], abs=1e-5)
    logs = [(2 * math.log(0.7) + math.log(0.1)) / 3, (math.log(0.2) + 2 * math.log(0.6)) / 3]
    assert found == pytest.approx([math.exp(value) for value in logs])


def test_removed_classes_are_not_in_the_softmax() -> None:
    """Logits near 3: classes with a logit of 0 (the authors' code) would take most of the probability."""
    torch.manual_seed(0)
    logits = torch.full((1, 40), -2.0)
    logits[0, 7] = 3.5
    label = torch.tensor([7])
    removed, zeroed = float(class_loss(logits, label)), float(class_loss(logits, label, 337))
    assert removed == pytest.approx(math.log(1 + 39 * math.exp(-5.5)))
    assert zeroed == pytest.approx(math.log((math.exp(3.5) + 39 * math.exp(-2) + 337) / math.exp(3.5)))
    assert zeroed > removed + 2
    certain = logits * 10
    assert float(class_loss(certain, label, 337)) == pytest.approx(float(class_loss(certain, label)), abs=1e-6)


def test_distillation_is_the_l1_distance_of_unit_vectors() -> None:
    """Half of it is what DetPro writes as 256 times the mean over 512 numbers; equal vectors cost nothing."""
    torch.manual_seed(0)
    student, teacher = (functional.normalize(torch.randn(5, 512), dim=1) for _ in range(2))
    distance = distillation_loss(student, teacher)
    assert float(distance) == pytest.approx(float((student - teacher).abs().sum()))
    assert 0.5 * float(distance) / 5 == pytest.approx(256 * float((student - teacher).abs().mean()), rel=1e-5)
    assert float(distillation_loss(teacher, teacher)) == pytest.approx(0, abs=1e-4)
    assert float(distillation_loss(teacher, teacher.half().float())) < 0.01 * 5


def test_boxes_cost_the_huber_loss_of_those_that_cover_an_object() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 15.0, 25.0]])
    truth = torch.tensor([[1.0, 0.0, 11.0, 10.0], [0.0, 0.0, 3.0, 3.0]])
    covering = torch.tensor([True, False])
    # One tenth to the right, times 10: a move of 1; a prediction of 3 is off by 2, which costs 2 - 1/2.
    moves = torch.tensor([[3.0, 0.0, 0.5, 0.0], [100.0, 100.0, 100.0, 100.0]])
    loss = float(box_loss(moves, boxes, truth, covering, BoxCoder(MOVES)))
    assert loss == pytest.approx((1.5 + 0.5 * 0.5**2) / 4)
    assert float(box_loss(moves, boxes, truth, torch.tensor([False, False]), BoxCoder(MOVES))) == 0


def test_moves_have_the_papers_weights() -> None:
    """x and y by tenths of the box, width and height by fifths of their logarithm."""
    decoded = BoxCoder(MOVES).decode(
        torch.tensor([[1.0, -2.0, 5 * math.log(2), 0.0]]), [torch.tensor([[0.0, 0, 20, 10]])]
    )
    assert decoded[0, 0].tolist() == pytest.approx([10 + 2 - 20, 5 - 2 - 5, 10 + 2 + 20, 5 - 2 + 5], abs=1e-4)


def test_mask_targets_are_the_part_that_the_box_shows() -> None:
    masks = torch.zeros(2, 20, 20, dtype=torch.uint8)
    masks[1, :10] = 1  # the upper half of the second object
    objects = torch.tensor([[0.0, 0.0, 5.0, 5.0], [10.0, 10.0, 30.0, 50.0]])
    same, lower, above = torch.tensor([[10.0, 10, 30, 50], [10.0, 30, 30, 50], [10.0, -30, 30, 10]])
    found = mask_targets(masks, objects, torch.stack([same, lower, above]), torch.tensor([1, 1, 1]), 8)
    assert found[0, :4].all() and not found[0, 4:].any()
    assert not found[1].any() and not found[2].any()
    wider = torch.tensor([[0.0, 10, 40, 30]])  # twice as wide: the middle half shows the object's upper half
    assert mask_targets(masks, objects, wider, torch.tensor([1]), 8)[0].sum(dim=0).tolist() == [0, 0, 8, 8, 8, 8, 0, 0]


@pytest.fixture(scope="module")
def snapshot(make_snapshot: Callable[..., Snapshot]) -> Snapshot:
    teacher = class_vectors.open_teacher(TEACHER)
    return make_snapshot((12, 12), regions=(class_vectors.clip_digest(teacher), 32))


def first_batch(method: proposals.Proposals, snapshot: Snapshot) -> dict[str, Tensor]:
    order = Order([12, 12], seed=0, batch_size=4, lanes=2)
    config = LoaderConfig(loader_workers=0)
    return next(training_batches(snapshot, method.readers(train=True), order, steps=range(1), config=config))


def built(**settings: Any) -> Vild:
    torch.manual_seed(0)
    return Vild(replace(Vild.smallest(), **settings))


PARTS = {
    "text": {"class"},
    "image": {"distillation"},
    "vild": {"class", "distillation"},
    "supervised": {"class"},
}


@pytest.mark.parametrize("mode", PARTS)
def test_each_mode_learns_its_parts(mode: str, snapshot: Snapshot) -> None:
    """All parameters get gradients; only modes with regions read them; no teacher is needed where none is used."""
    method = built(mode=mode, masks=mode == "vild", teacher="" if mode == "supervised" else TEACHER)
    batch = first_batch(method, snapshot)
    assert ("region_boxes" in batch) == (mode in ("image", "vild"))
    losses = method.training_step(batch)
    always = {"objectness", "proposal_box", "box"} | ({"mask"} if mode == "vild" else set())
    assert set(losses) == always | PARTS[mode]
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in method.parameters())


def test_padding_changes_nothing(snapshot: Snapshot) -> None:
    """More empty rows of objects and of regions, as a batch with a fuller image has them."""
    method = built()
    batch = first_batch(method, snapshot)
    plain = method.training_step(batch)
    shapes = {"boxes": 0.0, "labels": -1, "masks": 1, "region_boxes": 0.0, "region_features": 0.5}
    more = {
        key: torch.cat([batch[key], torch.full_like(batch[key][:, :2], fill)], dim=1) for key, fill in shapes.items()
    }
    padded = method.training_step({**batch, **more})
    assert {name: loss.item() for name, loss in padded.items()} == pytest.approx(
        {name: loss.item() for name, loss in plain.items()}, rel=1e-5
    )


def test_a_batch_without_objects_or_regions_is_legal(snapshot: Snapshot) -> None:
    method = built()
    batch = first_batch(method, snapshot)
    empty: Mapping[str, Tensor] = {key: torch.zeros_like(batch[key]) for key in ("boxes", "region_boxes", "masks")}
    losses = method.training_step({**batch, **empty})
    torch.stack(list(losses.values())).sum().backward()
    assert losses["distillation"].item() == losses["box"].item() == losses["mask"].item() == 0
    assert all(loss.isfinite() for loss in losses.values())
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in method.parameters())


def test_regions_are_drawn_as_the_paper_says(snapshot: Snapshot) -> None:
    """At most a quarter covers an object, by more than a half; labels are those of the object covered; the image's
    own random numbers decide."""
    method = built(regions_drawn=8)
    boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0], [30.0, 30.0, 60.0, 60.0]])
    proposed = torch.cat(
        [boxes.repeat(10, 1) + torch.rand(20, 1), torch.tensor([[0.0, 0, 20, 10.0]]), torch.rand(9, 4)]
    )
    proposed[21:, 2:] += proposed[21:, :2]
    seen = set()
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        drawn = method._draw(proposed, boxes, torch.tensor([2, 0]), draw)
        again = method._draw(proposed, boxes, torch.tensor([2, 0]), torch.Generator().manual_seed(seed))
        assert torch.equal(drawn.boxes, again.boxes)
        assert len(drawn.labels) == 8 and int((drawn.labels > 0).sum()) == 2
        overlap, nearest = box_iou(drawn.boxes, boxes).max(dim=1)
        covering = drawn.labels > 0
        assert (overlap[covering] > 0.5).all() and (overlap[~covering] <= 0.5).all()
        assert torch.equal(drawn.labels[covering], torch.tensor([3, 1])[nearest[covering]])
        assert torch.equal(drawn.truth[covering], boxes[nearest[covering]])
        seen.add(tuple(drawn.boxes.flatten().tolist()))
    assert len(seen) > 10
    half = method._draw(torch.tensor([[0.0, 0, 20, 10.0]]), boxes[:1], torch.tensor([2]), torch.Generator())
    assert sorted(half.labels.tolist()) == [0, 3]  # exactly a half is background; the object's own box is none


def test_logits_are_cosines_over_the_temperature() -> None:
    """The background is column 0; none is larger than 100, and the vectors do not learn."""
    method = built(mode="text").eval()
    assert method.background is not None
    embedding = torch.cat([method.vectors, functional.normalize(method.background, dim=0)[None]]).detach()
    logits = method._logits(embedding, embedding).detach()
    assert logits.shape == (5, 5)
    assert logits.diagonal(1).tolist() == pytest.approx([100] * 4, abs=1e-2)
    assert float(logits[4, 0]) == pytest.approx(100, abs=1e-2) and float(logits.abs().max()) <= 100.01
    assert "vectors" not in dict(method.named_parameters())


def test_text_vectors_are_the_teachers() -> None:
    """The mean of unit features of cleaned names in the prompts, made unit length."""
    teacher = class_vectors.open_teacher(TEACHER)
    method = built(mode="text", class_names=("red", "Owl_(bird)"), prompts=PROMPTS)
    written = [
        ["a red thing.", "This is a photo of a red."],
        ["a owl (bird) thing.", "This is an photo of an owl (bird)."],
    ]
    expected = []
    with torch.no_grad():
        for texts in written:
            features = teacher.encode_text(teacher.tokenizer(texts))
            expected.append(functional.normalize(features.mean(dim=0), dim=0))
    assert torch.allclose(method.vectors, torch.stack(expected), atol=1e-5)


def test_synonyms_count_alike() -> None:
    """The mean of the names' unit vectors, made unit length; the class is still the one of the first name."""
    teacher = class_vectors.open_teacher(TEACHER)
    names = ("couch", "sofa", "love seat")
    alone = class_vectors.class_vectors(teacher, names, PROMPTS)
    method = built(mode="text", class_names=("red", "couch; sofa; love_seat"), prompts=PROMPTS)
    assert torch.allclose(method.vectors[1], functional.normalize(alone.mean(dim=0), dim=0), atol=1e-5)
    assert torch.equal(method.word_vectors(["Couch"])[0], method.vectors[1])
    assert torch.allclose(method.word_vectors(["sofa"])[0], alone[1], atol=1e-5)
    # Whatever was asked before: the names that were asked for count, but the class is the same.
    for word, mean in (("couch; sofa", alone[:2].mean(dim=0)), ("sofa; couch", alone[:2].mean(dim=0))):
        assert torch.allclose(method.word_vectors([word])[0], functional.normalize(mean, dim=0), atol=1e-5)


@pytest.mark.parametrize(
    ("template", "word", "written"),
    [
        ("a photo of a {}.", "Hot_Dog", "a photo of a hot dog."),
        ("{article} {}.", "airplane", "This is an airplane."),
        ("a photo of {article} {} in the scene.", "cup/mug", "This is a photo of a cup or mug in the scene."),
        ("there is {article} {}.", "Egg.", "there is an egg."),
        ("itap of {article} {}.", "dog", "itap of a dog."),
        ("{}", "banana split. ", "banana split"),
    ],
)
def test_prompts_are_written_by_the_papers_rules(template: str, word: str, written: str) -> None:
    assert class_vectors.prompt(template, word) == written


def images() -> list[Tensor]:
    torch.manual_seed(1)
    return [
        torch.randint(0, 255, (3, 48, 80), dtype=torch.uint8),
        torch.randint(0, 255, (3, 90, 61), dtype=torch.uint8),
    ]


@pytest.mark.parametrize("mode", [*PARTS, "ensemble"])
def test_what_is_found_is_inside_the_image_and_in_order(mode: str) -> None:
    method = built(mode=mode, detections=7).eval()
    for image, found in zip(images(), method.predict(images(), ["red", "blue", "a new one"]), strict=True):
        height, width = image.shape[1:]
        assert len(found) and found.boxes.shape == (len(found), 4) and len(found) <= 7
        assert (found.boxes >= 0).all() and (found.boxes <= torch.tensor([width, height, width, height])).all()
        assert (found.scores[:-1] >= found.scores[1:]).all() and (found.scores > 0).all() and (found.scores <= 1).all()
        assert found.masks is not None and found.masks.shape == (len(found), 28, 28)
        for label in range(3):
            same = found.boxes[found.labels == label]
            assert not (box_iou(same, same).triu(1) > 0.5).any()
        if mode == "supervised":
            assert not (found.labels == 2).any()  # it cannot know a new word
        whole = found.whole_masks(height, width, last=2)
        assert whole.dtype == torch.bool and whole.shape == (min(2, len(found)), height, width)


def test_scores_of_an_ensemble_are_those_of_its_heads() -> None:
    """Text with the background in the softmax, image without it; which words are base can be said."""
    method = built().eval()
    words, known = ["red", "green", "new"], torch.tensor([True, True, False])
    torch.manual_seed(0)
    text, image = (functional.normalize(torch.randn(6, 32), dim=1) for _ in range(2))
    assert method.background is not None
    vectors = method.word_vectors(words)
    with torch.no_grad():
        columns = torch.cat([functional.normalize(method.background, dim=0)[None], vectors])
        p = (text @ columns.T * 100).softmax(dim=1)[:, 1:]
        q = (image @ vectors.T * 100).softmax(dim=1)
        expected = torch.where(known, p ** (2 / 3) * q ** (1 / 3), p ** (1 / 3) * q ** (2 / 3))
        found = method._scores(text, text, image, torch.ones(6), words, known)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mode", [*PARTS, "ensemble"])
def test_scores_and_boxes_are_float32_under_bfloat16(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same embeddings and proposals those of a prediction in float32, a new word's vector included: at a
    temperature of 0.01 a cosine in bfloat16 would be wrong by a third of a logit."""
    method = built(mode=mode, masks=False).eval()
    words = ["red", "blue", "something new"]
    for owner, name in (
        (method.model, "features"),
        (method.model.proposer, "propose"),
        (method.branch, "forward"),
        (method.image_branch, "forward"),
    ):
        if owner is not None:
            monkeypatch.setattr(owner, name, cache_first(getattr(owner, name)))
    plain = method.predict(images(), words)
    method._learnt.clear()
    with torch.autocast("cpu", torch.bfloat16):
        half = method.predict(images(), words)
    for one, two in zip(plain, half, strict=True):
        assert one.scores.dtype == two.scores.dtype == torch.float32 and len(one)
        assert torch.equal(one.scores, two.scores) and torch.equal(one.labels, two.labels)
        assert torch.equal(one.boxes, two.boxes)


def cache_first(call: Callable[..., Any]) -> Callable[..., Any]:
    """Gives for ever what ``call`` gave at first."""
    known: list[Any] = []

    def again(*given: Any) -> Any:
        if not known:
            known.append(call(*given))
        return known[0]

    return again


def test_text_vectors_come_back_to_where_the_teacher_is() -> None:
    teacher = class_vectors.open_teacher(TEACHER)
    fastest = class_vectors.fastest_device()
    vectors = class_vectors.class_vectors(teacher, ["red", "blue"], ("a {} thing.",), fastest)
    assert vectors.device == teacher.mean.device == torch.device("cpu")
    expected = class_vectors.class_vectors(teacher, ["red", "blue"], ("a {} thing.",))
    assert torch.allclose(vectors, expected, atol=1e-5)


def test_base_words_are_the_training_classes_unless_told() -> None:
    method = built().eval()
    by_default = method.predict(images(), ["red", "other"])
    explicit = method.predict(images(), ["red", "other"], base=["red"])
    turned = method.predict(images(), ["red", "other"], base=["other"])
    assert all(torch.equal(one.scores, two.scores) for one, two in zip(by_default, explicit, strict=True))
    assert not all(torch.equal(one.scores, two.scores) for one, two in zip(by_default, turned, strict=True))


@pytest.mark.parametrize(
    ("words", "base", "field"),
    [
        ([], None, "words"),
        (["red", "red"], None, "words"),
        (["red", "Red "], None, "words"),
        (["hot dog", "hot_dog"], None, "words"),
        (["red", " "], None, "words"),
        (["red"], ["green"], "base"),
    ],
)
def test_words_that_cannot_be_told_apart_are_refused(words: list[str], base: list[str] | None, field: str) -> None:
    """A novel word that equals a base word is one of them: it would be scored by both rules."""
    with pytest.raises(SettingError) as caught:
        check_words(words, base)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"class_names": ()}, "class_names"),
        ({"class_names": ("red", "Red")}, "words"),
        ({"class_names": ("red", "red")}, "class_names"),
        ({"teacher": ""}, "teacher"),
        ({"prompts": ("a thing",)}, "templates"),
        ({"temperature": 0.0}, "temperature"),
        ({"anchor_sizes": (16, 32)}, "anchor_sizes"),
        ({"start_from": "/nowhere/at/all"}, "start_from"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError) as caught:
        built(**settings)
    assert caught.value.field == field


@pytest.mark.parametrize("teacher", ["clipmill-tiny", "ViT-B-32:no_such_tag", "no-such-thing:untrained"])
def test_a_teacher_that_is_none(teacher: str) -> None:
    with pytest.raises(SettingError):
        Vild.check(replace(Vild.smallest(), teacher=teacher))


def saved(method: proposals.Proposals, folder: Path) -> str:
    meta = Meta(step=1, samples_seen=4, batch_size=4, lanes=2, seed=0, snapshot="x")
    return Checkpoints(str(folder)).save(method, make_optimizer(AdamW(), method), meta).folder.uri


def test_a_checkpoint_knows_its_classes_without_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = built().eval()
    address = saved(method, tmp_path)
    monkeypatch.setattr(class_vectors, "open_teacher", lambda address: pytest.fail("the teacher was loaded"))
    loaded: Any = load_method(address)
    assert torch.equal(loaded.vectors, method.vectors) and loaded.teacher_digest == method.teacher_digest
    found: list[Detections] = loaded.predict(images(), ["Red", "yellow"])
    assert all(
        torch.equal(a.boxes, b.boxes) for a, b in zip(found, method.predict(images(), ["red", "yellow"]), strict=True)
    )
    with pytest.raises(pytest.fail.Exception):
        loaded.predict(images(), ["another"])


def test_another_teacher_is_refused_for_new_words() -> None:
    method = built().eval()
    method.teacher_digest = "of other weights"
    with pytest.raises(SettingError, match="that this detector was trained with"):
        method.predict(images(), ["red", "something new"])


def test_regions_of_another_teacher_are_refused(make_snapshot: Callable[..., Snapshot]) -> None:
    with pytest.raises(SidecarError, match=r"made with the teacher other, .*extract_region_features"):
        first_batch(built(mode="vild"), make_snapshot((12, 12), regions=("other", 32)))
    with pytest.raises(SidecarError, match="has no regions"):
        plain = make_snapshot((12, 12))
        first_batch(built(mode="vild"), replace(plain, fields=("boxes.json", "jpg")))


def test_training_can_begin_with_a_proposer(tmp_path: Path) -> None:
    torch.manual_seed(5)
    proposer = proposals.Proposals(proposals.Proposals.smallest())
    address = saved(proposer, tmp_path)
    method = built(start_from=address)
    state = method.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in proposer.model.state_dict().items())
    assert not torch.equal(
        built().model.state_dict()["proposer.head.cls_logits.weight"], state["proposer.head.cls_logits.weight"]
    )
    with pytest.raises(SettingError, match="same network"):
        built(start_from=address, pyramid_width=24)
    averaged = Path(address) / "model_ema.safetensors"
    averaged.write_bytes((Path(address) / "model.safetensors").read_bytes())
    by_file = built(start_from=str(averaged)).model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in by_file.items())


def test_an_image_in_which_nothing_is_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the weights are no numbers: nothing is found, and the evaluation goes on."""
    method = built().eval()
    method.model.proposer.head.cls_logits.bias.data.fill_(math.nan)
    (found,) = method.predict([torch.zeros(3, 40, 60, dtype=torch.uint8)], ("red", "key"))
    assert len(found) == 0 and found.boxes.shape == (0, 4) and found.masks is not None


def test_the_defaults_are_the_papers() -> None:
    """Section 3 and the authors' published configuration."""
    config = Config()
    assert (config.temperature, config.distillation_weight, config.base_share) == (0.01, 0.5, 2 / 3)
    assert (config.regions_drawn, config.foreground, config.most_regions, config.detections) == (512, 0.25, 300, 300)
    assert (config.image_size, config.jitter_scale, config.flip) == (1024, (0.1, 2.0), 0.5)
    assert config.anchor_sizes == (32, 64, 128, 256, 512) and config.proposals_kept == 1000
    assert config.head_convolutions == (256,) * 4 and config.head_layers == (1024, 1024)
    assert len(config.templates()) == 80
