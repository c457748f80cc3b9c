"""Segmentation: counts by brute force, sets with their options, plain CLIP's patches, and a model of colours."""

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score, recall_score
from torch import Tensor

from pipeline.errors import DataError, SettingError
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.pixel_counts import PixelCounts
from pipeline.evaluation.segmentation import PatchSegmenter, _PatchLogits, as_segmenter
from pipeline.evaluation.showcase import model_figures
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.models.clip import Clip
from pipeline.models.segments import ImageViews, Segmentation
from pipeline.shards.segmentation import run_lengths
from pipeline.shards.snapshot import Snapshot

MakeSnapshot = Callable[..., Snapshot]
COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}


def by_hand(truth: np.ndarray, predicted: np.ndarray, number: int) -> float:
    """Intersection over union of a class, pixel by pixel."""
    known = truth >= 0
    both = ((truth == number) & (predicted == number) & known).sum()
    either = (((truth == number) | (predicted == number)) & known).sum()
    return float(both / either) if either else float("nan")


@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_those_of_a_brute_force_count(seed: int) -> None:
    """Class 2 is neither in truth nor in prediction; the last of five is the background."""
    numbers = np.random.default_rng(seed)
    kinds = np.array([-1, 0, 1, 3, 4])
    truth = [kinds[numbers.integers(0, 5, (9, 7))].astype(np.int16) for _ in range(3)]
    predicted = [kinds[numbers.integers(1, 5, (9, 7))].astype(np.int16) for _ in range(3)]
    counts = PixelCounts(5)
    for one, other in zip(truth, predicted, strict=True):
        counts.add(one, other)
    known = np.stack(truth) >= 0
    each = [by_hand(np.stack(truth), np.stack(predicted), number) for number in range(5)]
    found = counts.metrics(("a", "b", "c", "d"), has_ground=True)
    assert counts.right.dtype == np.int64 and counts.pixels == known.sum()
    assert found["miou"] == pytest.approx(np.nanmean(each))
    assert found["miou_foreground"] == pytest.approx(np.nanmean(each[:-1]))
    assert found["iou_background"] == pytest.approx(each[-1])
    assert found["pixel_accuracy"] == pytest.approx((np.stack(truth) == np.stack(predicted))[known].mean())
    assert [found[f"iou/{name}"] for name in "abd"] == pytest.approx([*each[:2], each[3]])
    assert "iou/c" not in found
    plain = counts.metrics(("a", "b", "c", "d"), has_ground=False)
    assert plain["miou"] == plain["miou_foreground"] == found["miou_foreground"] and "iou_background" not in plain


def test_metrics_are_those_of_scikit_learn() -> None:
    """Class c is only predicted and class d is neither; the last class is the background."""
    random = np.random.default_rng(0)
    truth, predicted = random.choice([-1, 0, 1, 4], (3, 20, 30)), random.choice([0, 1, 2, 4], (3, 20, 30))
    counts = PixelCounts(5)
    for labels, found in zip(truth, predicted, strict=True):
        counts.add(labels, found)
    known = truth >= 0
    pairs = truth[known], predicted[known]
    overlap = jaccard_score(*pairs, labels=[0, 1, 2, 4], average=None)
    measured = counts.metrics(tuple("abcd"), has_ground=True)
    assert [*(measured[f"iou/{name}"] for name in "abc"), measured["iou_background"]] == pytest.approx(overlap.tolist())
    assert measured["miou"] == pytest.approx(overlap.mean())
    assert measured["miou_foreground"] == pytest.approx(overlap[:3].mean()) and "iou/d" not in measured
    assert measured["pixel_accuracy"] == pytest.approx(accuracy_score(*pairs))
    assert measured["mean_accuracy"] == pytest.approx(recall_score(*pairs, labels=[0, 1, 4], average="macro"))


def test_metrics_are_those_of_torchmetrics() -> None:
    """Where it is installed: it is in no lock file, and the test above runs everywhere."""
    torchmetrics = pytest.importorskip("torchmetrics")
    truth, predicted = (torch.randint(0, 4, (2, 8, 8)) for _ in range(2))
    truth[0, 0] = -1
    counts = PixelCounts(5)
    counts.add(truth.numpy(), predicted.numpy())
    index = torchmetrics.functional.jaccard_index
    settings: dict[str, Any] = {"task": "multiclass", "num_classes": 4, "ignore_index": -1}
    expected = index(predicted, truth, average=None, **settings)
    found = counts.metrics(tuple("abcd"), has_ground=False)
    assert found["miou"] == pytest.approx(float(index(predicted, truth, **settings)))
    assert [found[f"iou/{name}"] for name in "abcd"] == pytest.approx(expected.tolist())
    accuracy = torchmetrics.functional.accuracy(predicted, truth, average="micro", **settings)
    assert found["pixel_accuracy"] == pytest.approx(float(accuracy))


def test_no_pixels_have_no_metrics() -> None:
    assert PixelCounts(3).metrics(("a", "b"), has_ground=True) == {}


def test_counts_of_parts_add_up_and_of_many_classes_fit() -> None:
    """30,000 classes: a matrix of pairs would have 7 GB."""
    numbers = np.random.default_rng(0)
    images = [numbers.integers(-1, 30_000, (2, 1, 4000)).astype(np.int16).clip(-1) for _ in range(4)]
    whole, parts = PixelCounts(30_000), [PixelCounts(30_000), PixelCounts(30_000)]
    for place, (truth, predicted) in enumerate(images):
        whole.add(truth, predicted.clip(0))
        parts[place % 2].add(truth, predicted.clip(0))
    parts[0] += parts[1]
    names = [str(number) for number in range(29_999)]
    assert parts[0].metrics(names, True) == whole.metrics(names, True)


class ColourSegmenter:
    """Segments by the colour of each pixel; sure where it is pure, and not where it is dark."""

    def __init__(self) -> None:
        self.views: list[ImageViews | None] = []

    def segment(
        self, images: Sequence[Tensor], words: Sequence[str], views: ImageViews | None = None
    ) -> list[Segmentation]:
        """The word whose colour is nearest; probability 1, on black 0.4."""
        self.views.append(views)
        table = torch.tensor([COLOURS.get(word, (0, 0, 0)) for word in words]).float()
        found = []
        for image in images:
            distance = (image.float()[None] - table[:, :, None, None]).abs().sum(dim=1)
            scores = torch.where(image.sum(dim=0) > 100, 1.0, 0.4)
            found.append(Segmentation(distance.argmin(dim=0).to(torch.int16), scores))
        return found


def row(kind: str = "boxes.json") -> dict[str, bytes]:
    """Four columns of two pixels: red, green, black, and blue that is labelled as green."""
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :2], pixels[:, 2:4], pixels[:, 6:] = COLOURS["red"], COLOURS["green"], COLOURS["blue"]
    values = np.zeros((4, 8), np.uint8)
    values[:, :2], values[:, 2:4], values[:, 6:] = 1, 2, 2
    objects = []
    for label, left, right in (("red", 0, 2), ("green", 2, 4), ("green", 6, 8)):
        mask = np.zeros((4, 8), bool)
        mask[:, left:right] = True
        runs = {"size": [4, 8], "counts": run_lengths(mask)}
        objects.append({"label": label, "bbox": [left, 0, 2, 4], "segmentation": runs})
    fields = {"boxes.json": json.dumps({"width": 8, "height": 4, "objects": objects}).encode(), "mask.png": png(values)}
    return {"png": png(pixels), kind: fields[kind]}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def words(tmp_path: Any) -> str:
    """A file of words, in the order of the values of the masks."""
    (tmp_path / "words.txt").write_text("red\ngreen\nblue\n")
    return str(tmp_path / "words.txt")


@pytest.mark.parametrize("kind", ["boxes.json", "mask.png"])
def test_a_set_with_its_options(kind: str, make_snapshot: MakeSnapshot, words: str) -> None:
    """Red is right, green half, blue is only predicted; black is void, or background by the threshold or by a word."""
    folder = make_snapshot([row(kind), row(kind)]).folder
    sets = (
        f"void={folder},words={words}",
        f"ground={folder},words={words},unlabelled=background,threshold=0.5,scales=1+0.5,flip=true",
        f"other={folder},words={words},unlabelled=background,background_word=black",
    )
    prepared, model = Evaluations(segmentation=sets, evaluation_samples=2).prepare(), ColourSegmenter()
    metrics = evaluate(model, prepared)
    assert metrics["seg/void/miou"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert metrics["seg/void/pixel_accuracy"] == pytest.approx(2 / 3) and metrics["seg/void/samples"] == 2
    assert metrics["seg/void/iou/green"] == 0.5 and metrics["seg/void/mean_accuracy"] == 0.75
    for name in ("ground", "other"):
        assert metrics[f"seg/{name}/miou"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
        assert metrics[f"seg/{name}/miou_foreground"] == pytest.approx(0.5)
        assert metrics[f"seg/{name}/iou_background"] == 1
    assert ImageViews(scales=(1.0, 0.5), flip=True) in model.views
    figures = model_figures(model, prepared)
    legend = figures["segmentation/ground"].legends[0].get_texts()
    assert [text.get_text() for text in legend] == ["red", "green", "blue", "background"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("words=nowhere.txt", "segmentation_words"),
        ("threshold=2", "segmentation_threshold"),
        ("threshold=nowhere.json", "segmentation_threshold|nowhere.json"),
        ("threshold=learn:drawn_val", "segmentation_unlabelled"),
        ("threshold=learn:{folder},unlabelled=background", "data other than those of it"),
        ("held_out=novel", "novel classes"),
        ("held_out=drawn_base", "novel classes"),
        ("held_out=drawn_shape", "drawn_shapes"),
        ("held_out=coco_ovd_all", "classes among the set's words; not "),
        ("held_out=all,threshold=learn:drawn_val", "a number or a file"),
        ("held_out=all,part=1/2,counts=x", "1/1 with held_out"),
        ("episodes=5", "0 without held_out"),
        ("part=3/2,counts=x", "a part such as 2/4"),
        ("part=0/2,counts=x", "a part such as 2/4"),
        ("part=a", "a part such as 2/4"),
        ("part=1/2", "a folder for the counts"),
        ("scales=a", "segmentation_scales"),
        ("labels=mask.png", "segmentation: .*this has boxes.json"),
        ("background_word=Red", "words"),
        ("unlabelled=other", "unlabelled"),
    ],
)
def test_wrong_options_are_one_sentence(options: str, sentence: str, make_snapshot: MakeSnapshot, words: str) -> None:
    folder = make_snapshot([row()]).folder
    given = options if options.startswith("words") else f"words={words},{options.format(folder=folder)}"
    with pytest.raises(SettingError, match=sentence):
        Evaluations(segmentation=(f"it={folder},{given}",)).prepare()


def test_a_set_in_parts_has_the_exact_metrics_of_the_whole(
    make_snapshot: MakeSnapshot, words: str, tmp_path: Any
) -> None:
    """Parts are run one by one; the last one reports all images. Counts of other words or models are refused."""
    rows = [row("mask.png") for _ in range(5)]
    rows[3]["mask.png"] = png(np.full((4, 8), 3, np.uint8))
    folder = make_snapshot(rows).folder

    def evaluated(options: str) -> dict[str, float]:
        return evaluate(ColourSegmenter(), Evaluations(segmentation=(f"it={folder},{options}",)).prepare())

    whole = evaluated(f"words={words}")
    found = [evaluated(f"words={words},part={number}/3,counts={tmp_path}/counts") for number in (1, 3, 2)]
    assert [one["seg/it/samples"] for one in found] == [2, 3, 5]
    assert found[-1] == whole and found[0] != whole
    (tmp_path / "two.txt").write_text("red\ngreen\n")
    with pytest.raises(DataError, match="another model or of other words"):
        evaluated(f"words={tmp_path}/two.txt,part=1/3,counts={tmp_path}/counts")
    (tmp_path / "counts/part-2-of-3.json").write_text('{"right": [1]')
    with pytest.raises(DataError, match=r"part-2-of-3\.json is no file of counts"):
        evaluated(f"words={words},part=1/3,counts={tmp_path}/counts")


def test_thin_images_and_no_labels(make_snapshot: MakeSnapshot, words: str) -> None:
    """One pixel, 3,000 by 1, and an image whose mask is all void; a mask of another size is left out."""
    fields = []
    for shape in ((1, 1), (1, 3000), (2, 2), (2, 2)):
        pixels = np.zeros((*shape, 3), np.uint8)
        pixels[:, :] = COLOURS["red"]
        fields.append({"png": png(pixels), "mask.png": png(np.full(shape, 1, np.uint8))})
    fields[2]["mask.png"] = png(np.full((2, 2), 255, np.uint8))
    fields[3]["mask.png"] = png(np.full((2, 3), 1, np.uint8))
    folder = make_snapshot(fields).folder
    found = evaluate(ColourSegmenter(), Evaluations(segmentation=(f"it={folder},words={words}",)).prepare())
    assert found["seg/it/miou"] == 1 and found["seg/it/samples"] == 3


def test_words_that_no_pixel_has(make_snapshot: MakeSnapshot, tmp_path: Any) -> None:
    (tmp_path / "others.txt").write_text("zebra\n")
    folder = make_snapshot([row()]).folder
    prepared = Evaluations(segmentation=(f"it={folder},words={tmp_path}/others.txt",)).prepare()
    with pytest.raises(DataError, match="no pixel of 1 images has one of the 1 words"):
        evaluate(ColourSegmenter(), prepared)


def test_patches_of_a_clip(clip: Clip) -> None:
    """The tower's own token is projected as its features are; an image is as large as it was."""
    segmenter = as_segmenter(clip, "x")
    assert isinstance(segmenter, PatchSegmenter)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    patches = segmenter.patches(images)
    assert patches.shape == (2, 32, 4, 4) and torch.allclose(patches.norm(dim=1), torch.ones(2, 4, 4), atol=1e-5)
    visual: Any = clip.model.visual
    visual.output_tokens = True
    pooled, tokens = visual((images.float() - clip.mean) / clip.std)
    visual.output_tokens = False
    expected = torch.nn.functional.normalize(tokens @ visual.proj, dim=-1)
    assert torch.allclose(patches.flatten(2).transpose(1, 2), expected, atol=1e-5)
    (found,) = segmenter.segment([torch.randint(0, 256, (3, 30, 50), dtype=torch.uint8)], ("red", "a dog"))
    assert found.labels.shape == (30, 50) and float(found.scores.min()) >= 0.5
    with pytest.raises(SettingError, match="views"):
        segmenter.segment([images[0]], ("red",), ImageViews(flip=True))


def test_logits_of_patches_stay_float32(clip: Clip) -> None:
    """Whatever the precision of the tower: the same rows have the same logits."""
    segmenter = as_segmenter(clip, "x")
    logits = _PatchLogits(40 * torch.nn.functional.normalize(torch.randn(3, 32), dim=-1))
    rows = torch.nn.functional.normalize(torch.randn(32, 4, 5), dim=0)
    with inference(segmenter, "bf16"):
        found = logits(rows)
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.tensordot(logits.vectors, rows, dims=1), atol=1e-5)


def test_other_models_are_refused() -> None:
    with pytest.raises(SettingError, match="a method with `segment`"):
        as_segmenter(object(), "runs/x")
