"""Zero-shot against computations written out by hand, scikit-learn's metrics, and open_clip's own class vectors."""

import numpy as np
import open_clip
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.evaluation.accuracy import label_ranks
from pipeline.evaluation.zero_shot import classifier, zero_shot
from pipeline.models.clip import Clip

CLASSES = ["dog", "cat", "tench", "red kite", "crane", "desk", "lamp"]
TEMPLATES = ["a photo of a {}.", "a bad sketch of the {}", "{}"]


def test_prompts_are_ensembled_as_in_the_paper(clip: Clip) -> None:
    made = classifier(clip, CLASSES, TEMPLATES)
    for place, name in enumerate(CLASSES):
        with torch.no_grad():
            each = [clip.encode_text(clip.tokenizer([template.format(name)]))[0] for template in TEMPLATES]
        mean = sum(vector / vector.norm() for vector in each) / len(each)
        torch.testing.assert_close(made[place], mean / mean.norm(), atol=1e-5, rtol=1e-4)


def test_class_vectors_are_open_clips(clip: Clip) -> None:
    theirs = open_clip.build_zero_shot_classifier(
        clip.eval().model,
        clip.tokenizer,
        open_clip.IMAGENET_CLASSNAMES[:20],
        open_clip.SIMPLE_IMAGENET_TEMPLATES,
        num_classes_per_batch=6,
    )
    templates = [template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES]
    ours = classifier(clip, open_clip.IMAGENET_CLASSNAMES[:20], templates)
    torch.testing.assert_close(ours, theirs.T, atol=1e-5, rtol=1e-4)


def test_metrics_are_those_of_a_brute_force_computation(clip: Clip) -> None:
    images = torch.randint(0, 256, (45, 3, 64, 64), dtype=torch.uint8)
    labels = torch.arange(45) % 6  # the last class never occurs
    vectors = classifier(clip, CLASSES, TEMPLATES)
    batches = [{"image": images[start : start + 7], "label": labels[start : start + 7]} for start in range(0, 45, 7)]
    found = zero_shot(clip, batches, vectors)
    with torch.no_grad():
        scores = (clip.eval().encode_image(images) @ vectors.T).numpy()
    everything = np.arange(len(CLASSES))
    assert found["top1"] == pytest.approx(top_k_accuracy_score(labels, scores, k=1, labels=everything))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=everything))
    assert found["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, scores.argmax(1)))
    assert found["chance"] == 1 / 7 and found["samples"] == 45


def test_ranks_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.2, 0.2], [0.2, 0.2, 0.2], [float("nan"), 0.1, 0.2]])
    assert label_ranks(scores, torch.tensor([2, 0, 2, 0])).tolist() == [1, 0, 2, 3]
    assert label_ranks(scores[3:], torch.tensor([2])).tolist() == [1]  # another class's NaN is not beaten
    assert label_ranks(torch.full((1, 3), float("nan")), torch.tensor([0])).item() >= 1


def test_ranks_are_those_of_a_stable_sort() -> None:
    scores = torch.randint(0, 4, (200, 9)).float()  # full of ties
    labels = torch.randint(0, 9, (200,))
    order = scores.argsort(dim=1, descending=True, stable=True)
    assert torch.equal(label_ranks(scores, labels), (order == labels[:, None]).int().argmax(dim=1))


def test_a_collapsed_model_is_at_chance(clip: Clip) -> None:
    class Collapsed:
        tokenizer = clip.tokenizer

        def encode_image(self, image: torch.Tensor) -> torch.Tensor:
            return functional.normalize(torch.ones(len(image), 8), dim=-1)

        def encode_text(self, text: torch.Tensor) -> torch.Tensor:
            return functional.normalize(torch.ones(len(text), 8), dim=-1)

    model = Collapsed()
    batch = {"image": torch.zeros(14, 3, 4, 4, dtype=torch.uint8), "label": torch.arange(14) % 7}
    found = zero_shot(model, [batch], classifier(model, CLASSES))
    assert found["top1"] == found["mean_per_class"] == pytest.approx(found["chance"])


def test_the_models_mode_is_kept_and_no_gradient_made(clip: Clip) -> None:
    clip.train()
    vectors = classifier(clip, CLASSES)
    assert clip.training and not vectors.requires_grad
    batch = {"image": torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "label": torch.tensor([0, 1])}
    zero_shot(clip, [batch], vectors, precision="bf16")
    assert clip.training
    clip.eval()


def test_settings_that_cannot_work_are_refused(clip: Clip) -> None:
    with pytest.raises(SettingError, match="classes"):
        classifier(clip, ["one"])
    with pytest.raises(SettingError, match="templates"):
        classifier(clip, CLASSES, [])
    with pytest.raises(SettingError, match="one sample or more"):
        zero_shot(clip, [], classifier(clip, CLASSES))


def test_braces_in_a_class_name_are_only_text(clip: Clip) -> None:
    assert classifier(clip, ["{}", "{0}", "a{b}"], ["a {}."]).shape == (3, 32)
