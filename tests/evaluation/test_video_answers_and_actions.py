"""VideoQA by multiple choice and action segmentation: a perfect model, brute force, and broken samples.

The videos are stored features of frames: a second in red is the row (1, 0, 0).
"""

import io
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import DataError, SettingError
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.evaluation.tasks.action_segmentation import (
    frame_labels,
    largest_similarity,
    segmentation_metrics,
    tuned_threshold,
)
from pipeline.loaders.frames import FrameFeatureReader, FrameSampling
from pipeline.loaders.timed_captions import TimedText
from pipeline.models.videoclip import VideoClip
from pipeline.models.videoclip.pairs import EveryFrameReader
from pipeline.shards.snapshot import Snapshot
from tests.evaluation.conftest import COLOURS, ColourModel

MakeSnapshot = Callable[..., Snapshot]
NAMES = list(COLOURS)


class ColourVideoModel(ColourModel):
    """Knows the colours of frames. A perfect model, with the readers of stored features."""

    encodes = ("video", "text")

    def video_reader(self) -> FrameFeatureReader:
        return FrameFeatureReader(sampling=FrameSampling(frames=8, rate=0), name="")

    def frames_reader(self) -> EveryFrameReader:
        return EveryFrameReader(features=self.video_reader())

    def encode_video(self, video: Tensor, mask: Tensor) -> Tensor:
        return functional.normalize((video * mask[..., None]).sum(dim=1), dim=-1)

    def encode_moments(self, frames: Tensor, mask: Tensor) -> Tensor:
        return functional.normalize(frames, dim=-1)


def video(colours: Sequence[str], **described: Any) -> dict[str, bytes]:
    """A second in each colour; black for another word."""
    rows = [[float(colour == name) for name in NAMES] for colour in colours]
    content = io.BytesIO()
    np.save(content, np.array(rows, np.float32))
    return {"frames.npy": content.getvalue(), "json": json.dumps(described).encode(), "txt": colours[0].encode()}


def run(model: object, **sets: Any) -> dict[str, float]:
    return evaluate(model, Evaluations(**sets, evaluation_batch=2, evaluation_threads=2).prepare())


def test_the_right_answer_is_chosen(make_snapshot: MakeSnapshot) -> None:
    rows = [
        video(["red", "red"], choices=["it is blue", "it is red", "green"], answer=1),
        video(["blue"], choices=["blue", "red"], answer=0),
        video(["green"] * 9, choices=["it is red", "it is blue", "it is blue too", "it is green"], answer=3),
        video(["green"], choices=["green", "red"], answer=1),  # its annotator is wrong
    ]
    found = run(ColourVideoModel(), video_qa=(f"it={make_snapshot(rows).folder}",))
    assert found["videoqa/it/accuracy"] == 0.75 and found["videoqa/it/samples"] == 4
    assert found["videoqa/it/chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 4 + 1 / 2) / 4)


def test_a_model_that_cannot_tell_candidates_apart_has_no_answer_right(make_snapshot: MakeSnapshot) -> None:
    """Sets often list the right answer first: the first of equal scores must not count."""

    class Constant(ColourVideoModel):
        def encode_text(self, text: Tensor) -> Tensor:
            return torch.ones(len(text), 3)

    class Broken(ColourVideoModel):
        def encode_video(self, video: Tensor, mask: Tensor) -> Tensor:
            return torch.full((len(video), 3), torch.nan)

    rows = [video(["red"], choices=["red", "blue"], answer=0)] * 2
    folder = make_snapshot(rows).folder
    assert run(Constant(), video_qa=(f"it={folder}",))["videoqa/it/accuracy"] == 0
    assert run(Broken(), video_qa=(f"it={folder}",))["videoqa/it/accuracy"] == 0
    twice = make_snapshot([video(["red"], choices=["blue", "red", "red"], answer=2)], name="twice").folder
    assert run(ColourVideoModel(), video_qa=(f"it={twice}",))["videoqa/it/accuracy"] == 1


def test_keys_are_options_of_a_set(make_snapshot: MakeSnapshot) -> None:
    rows = [video(["red"], options=["blue", "red"], right=1)]
    folder = make_snapshot(rows).folder
    found = run(ColourVideoModel(), video_qa=(f"it={folder},choices=options,answer=right",))
    assert found["videoqa/it/accuracy"] == 1.0
    with pytest.raises(DataError, match="no list of two texts"):
        run(ColourVideoModel(), video_qa=(folder,))


@pytest.mark.parametrize(
    "bad",
    [
        {"choices": ["red"], "answer": 0},
        {"choices": ["red", " "], "answer": 0},
        {"choices": ["red", 7], "answer": 0},
        {"choices": "red blue", "answer": 0},
        {"choices": ["red", "blue"], "answer": 2},
        {"choices": ["red", "blue"], "answer": -1},
        {"choices": ["red", "blue"], "answer": True},
        {"choices": ["red", "blue"], "answer": "0"},
        {},
    ],
)
def test_questions_without_a_right_answer_are_left_out(make_snapshot: MakeSnapshot, bad: dict[str, Any]) -> None:
    rows = [video(["red"], **bad), video(["red"], choices=["red", "blue"], answer=0)]
    assert run(ColourVideoModel(), video_qa=(f"it={make_snapshot(rows).folder}",))["videoqa/it/samples"] == 1


def test_models_that_cannot_are_refused(make_snapshot: MakeSnapshot) -> None:
    folder = make_snapshot([video(["red"], choices=["red", "blue"], answer=0, timed_captions=[])]).folder
    with pytest.raises(SettingError, match="medium"):
        run(ColourModel(), video_qa=(f"{folder},medium=video",))
    with pytest.raises(SettingError, match="frames in context"):
        run(ColourModel(), action_segmentation=(folder,))


def timed(*parts: tuple[float, float, str]) -> list[dict[str, Any]]:
    return [{"start": start, "end": end, "text": text} for start, end, text in parts]


def test_frames_are_named_by_the_caption_that_began_last() -> None:
    times = torch.arange(8).float()
    captions = [TimedText(1, 4, "red"), TimedText(3, 6, "blue"), TimedText(6, 7, "unknown")]
    assert frame_labels(times, captions, ["blue", "red"]).tolist() == [-1, 1, 1, 0, 0, 0, -1, -1]
    assert frame_labels(times, [TimedText(2.5, 2.9, "red")], ["red"]).tolist() == [-1] * 8


def test_actions_of_a_perfect_model(make_snapshot: MakeSnapshot) -> None:
    """Two videos of different lengths; black frames are background, below any threshold of more than 0.6."""
    rows = [
        video(
            ["red", "red", "none", "blue", "blue", "blue"],
            timed_captions=timed((0, 2, "it is red"), (3, 6, "it is blue")),
        ),
        video(["none", "green"], timed_captions=timed((1, 2, "it is green"))),
        video(["red"]),  # no timed captions: left out
    ]
    folder = make_snapshot(rows).folder
    found = run(ColourVideoModel(), action_segmentation=(f"it={folder},threshold=0.9",))
    assert found["actionseg/it/accuracy"] == 1.0 and found["actionseg/it/action_accuracy"] == 1.0
    assert found["actionseg/it/tuned_accuracy"] == 1.0 and 0 < found["actionseg/it/tuned_threshold"] <= 1
    assert found["actionseg/it/frames"] == 8 and found["actionseg/it/samples"] == 2
    assert found["actionseg/it/constant"] == pytest.approx(3 / 8)
    free = run(ColourVideoModel(), action_segmentation=(f"it={folder},threshold=-1",))
    assert free["actionseg/it/accuracy"] == pytest.approx(6 / 8)  # without a threshold there is no background
    paper = run(ColourVideoModel(), action_segmentation=(f"it={folder}",))
    assert paper["actionseg/it/accuracy"] == 1.0  # black is as near to any name as the names are to one another
    assert paper["actionseg/it/threshold"] == pytest.approx(0, abs=1e-3)


def test_names_in_a_file_and_a_prompt(make_snapshot: MakeSnapshot, tmp_path: Any) -> None:
    (tmp_path / "names.txt").write_text("red\ngreen\n")
    rows = [video(["red", "blue"], timed_captions=timed((0, 1, "red"), (1, 2, "blue")))]
    words = f"it={make_snapshot(rows).folder},classes={tmp_path / 'names.txt'},template=it is {{}},threshold=0.9"
    found = run(ColourVideoModel(), action_segmentation=(words,))
    assert found["actionseg/it/accuracy"] == 1.0 and found["actionseg/it/constant"] == 0.5
    with pytest.raises(SettingError, match="action_template"):
        run(ColourVideoModel(), action_segmentation=(f"{rows},template=none",), action_template="none")


def test_the_tuned_threshold_is_that_of_a_search_over_all() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        count = int(random.integers(1, 12))
        background = random.random(count) < 0.5
        right = ~background & (random.random(count) < 0.6)
        scores = random.integers(0, 5, count) / 4  # with ties

        def accuracy(threshold: float, of: Any = (right, background, scores)) -> float:
            right, background, scores = of
            return float(np.where(scores >= threshold, right, background).mean())

        candidates = [*scores, scores.max() + 1]
        best, at = tuned_threshold(right, background, scores)
        assert best == pytest.approx(max(map(accuracy, candidates)))
        assert accuracy(at) == pytest.approx(best)


@pytest.mark.parametrize("normalise", [False, True])
def test_the_threshold_is_videoclips_rule(normalise: bool) -> None:
    """A frame has an action where its best product is above the largest product of two different names' texts."""
    torch.manual_seed(1)
    method = VideoClip(replace(VideoClip.smallest(), features="", feature_width=3, normalise=normalise)).eval()
    with torch.no_grad():
        for tower in (method.model.text, method.model.video):  # lengths that differ from tower to tower
            norm = tower.bert.encoder.layer[-1].output.LayerNorm
            norm.weight.mul_(torch.rand_like(norm.weight) + 0.5)
            norm.bias.add_(torch.randn_like(norm.bias) * 0.3)
        raw, states = torch.randn(3, 32), torch.randn(50, 32)
        texts, moments = method._unit(raw, of_video=False), method._unit(states, of_video=True)
        least = largest_similarity(method, texts)
        if normalise:
            raw, states = functional.normalize(raw, dim=-1), functional.normalize(states, dim=-1)
        limit = max(float(raw[i] @ raw[j]) for i, j in itertools.permutations(range(3), 2))
        best = (states @ raw.T).amax(dim=1)
        found = (moments @ texts.T).amax(dim=1) >= least
    assert torch.equal(found, best > limit) and 0 < found.sum() < found.numel()
    assert largest_similarity(method, texts[:1]) == -1


def test_metrics_of_a_hand_made_case() -> None:
    labels, found = np.array([0, 0, 1, -1, -1]), np.array([0, 1, 1, 1, 0])
    scores = np.array([0.9, 0.8, 0.3, 0.5, 0.1])
    metrics = segmentation_metrics(labels, found, scores, 0.4)
    assert metrics["accuracy"] == pytest.approx(2 / 5)  # the first, and the last below the threshold
    assert metrics["action_accuracy"] == pytest.approx(2 / 3)
    assert metrics["tuned_accuracy"] == pytest.approx(3 / 5) and metrics["constant"] == pytest.approx(2 / 5)


def test_videoclip_is_evaluated_on_all_of_them(make_snapshot: MakeSnapshot) -> None:
    """Retrieval from features without any video, questions and actions; ranks are those of the plain products."""
    torch.manual_seed(0)
    method = VideoClip(replace(VideoClip.smallest(), features="", feature_width=3)).eval()
    colours = list(itertools.permutations(NAMES))
    rows = [
        video(
            some * (1 + 6 * (number % 3)),
            choices=["red", "blue star"],
            answer=number % 2,
            timed_captions=timed((0, 1, some[0]), (1, 2, some[1])),
            captions=[" ".join(some)],
        )
        for number, some in enumerate(colours)
    ]
    folder = make_snapshot(rows).folder
    found = run(method, retrieval=(folder,), video_qa=(folder,), action_segmentation=(folder,))
    assert {"retrieval/shards/v2t_r1", "retrieval/shards/t2v_r1", "videoqa/shards/accuracy"} <= set(found)
    assert found["actionseg/shards/frames"] == sum(len(some) * (1 + 6 * (n % 3)) for n, some in enumerate(colours))
    reader = method.video_reader()
    from pipeline.loaders.samples import Samples
    from pipeline.shards.snapshot import read_snapshot

    stored = Samples(read_snapshot(folder))
    batch = reader.collate([reader.read(stored[number]) for number in range(6)])
    texts = method.tokenizer([" ".join(some) for some in colours])
    with torch.no_grad():
        products = method._pooled_text(texts) @ method._pooled_video(batch["video"], batch["video_mask"]).T
    own = products.diagonal()[:, None]
    assert found["retrieval/shards/t2v_r1"] == pytest.approx(float(((products > own).sum(dim=1) == 0).float().mean()))
    own = products.diagonal()[None]
    assert found["retrieval/shards/v2t_r1"] == pytest.approx(float(((products > own).sum(dim=0) == 0).float().mean()))
