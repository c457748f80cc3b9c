"""Action segmentation: which action each frame of a video shows, or none, by the similarity of frames and names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.config import require
from pipeline.evaluation.classes import lines_of
from pipeline.evaluation.data import Data, evaluation_batches
from pipeline.evaluation.encoder import encode_tokens, inference
from pipeline.evaluation.task import SAMPLES, Cache, Column, PreparedSet, Reading, Report, Task, option
from pipeline.loaders.batches import Row, SamplePosition
from pipeline.loaders.samples import UnreadableSample
from pipeline.loaders.timed_captions import TimedText, read_timed_captions
from pipeline.shards.sample import Sample

CLASSES = "auto, or a file with a name on each line"
BACKGROUND = -1
"""Label of frames without an action."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a set."""

    classes: str = option(
        "auto",
        "action_classes",
        "Names of the actions: auto (the card's classes, else the texts of the timed captions), or a file of lines.",
    )
    threshold: float | None = option(
        None,
        "action_threshold",
        "Least cosine of a frame and its nearest name, -1 to 1; frames below it have no action. None for VideoCLIP's "
        "rule: more than the largest similarity of two different names.",
    )
    template: str = option("{}", "action_template", "Prompt with one {} for the name of an action.")

    def __post_init__(self) -> None:
        least = self.threshold
        require(least is None or -1 <= least <= 1, "action_threshold", least, "-1 to 1, or none for VideoCLIP's rule")
        require(self.template.count("{}") == 1, "action_template", self.template, "exactly one {} for the name")


@dataclass(frozen=True)
class Actions:
    """What a set needs: the names, or none where they are those of its timed captions; and the options."""

    names: tuple[str, ...]
    threshold: float | None
    template: str


@dataclass(frozen=True, kw_only=True)
class TimedReader:
    """``timed``: the timed captions of each sample, a list of lists."""

    fields = ("json",)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """Those of one sample; raises ``UnreadableSample`` without any."""
        found = read_timed_captions(sample)
        if found is None:
            raise UnreadableSample(f"{sample.key} has no timed captions")
        return {"timed": found}

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """The lists."""
        return {"timed": [row["timed"] for row in rows]}


class ActionSegmentation(Task):
    """The accuracy of frames, as VideoCLIP's on COIN (Xu et al., 2021, arXiv 2109.14084, section 5.2), zero-shot.

    A frame's action is that of the last timed caption that began before it and has not ended. Its prediction is the
    name nearest to the frame in its context, or none where that cosine is below the threshold: by the authors' rule, at
    most the largest similarity of two different names. The rule looks at no label of a video.
    """

    report = Report(
        "actionseg",
        "action segmentation",
        (
            Column("accuracy", "frames"),
            Column("threshold", format=".3f"),
            Column("action_accuracy", "frames of actions"),
            Column("tuned_accuracy", "threshold tuned on these labels"),
            Column("tuned_threshold", format=".3f"),
            Column("constant", "one answer"),
            Column("frames", format=",.0f"),
            SAMPLES,
        ),
    )
    help = "Sets of videos with timed captions that name actions, for a model that encodes frames in context."
    rank = 5
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require a model that encodes texts and moments of a video."""
        able = all(callable(getattr(model, name, None)) for name in ("encode_moments", "frames_reader", "encode_text"))
        require(able, "checkpoint", type(model).__name__, "a model that encodes frames in context, such as VideoCLIP")

    def prepare(self, config: Config, data: Data, name: str) -> Actions:
        """The names of the actions, if they are known without the samples."""
        card = data.card
        own = card.classes if card and config.classes == "auto" else ()
        names = own if config.classes == "auto" else tuple(lines_of("action_classes", config.classes, CLASSES))
        return Actions(names, config.threshold, config.template)

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """Accuracies over all frames of all videos; ``constant`` is that of the most frequent label."""
        actions: Actions = one.ready
        names = actions.names or named_actions(one)
        readers = (model.frames_reader(), TimedReader())
        size, threads = reading.evaluation_batch, reading.evaluation_threads
        labels: list[np.ndarray[Any, Any]] = []
        found: list[np.ndarray[Any, Any]] = []
        scores: list[np.ndarray[Any, Any]] = []
        videos = 0
        with inference(model, reading.evaluation_precision) as device:
            texts = encode_tokens(model, model.tokenizer([actions.template.format(name) for name in names]), device)
            least = largest_similarity(model, texts) if actions.threshold is None else actions.threshold
            for batch in evaluation_batches(one.samples(readers=readers), readers, size, threads):
                mask = batch["frames_mask"]
                cosines = (model.encode_moments(batch["frames"].to(device), mask.to(device)).float() @ texts.T).cpu()
                best = cosines.max(dim=2)
                found.append(best.indices[mask].numpy())
                scores.append(best.values[mask].numpy())
                labels += [
                    frame_labels(times[shown], timed, names)
                    for times, shown, timed in zip(batch["frames_times"], mask, batch["timed"], strict=True)
                ]
                videos += len(mask)
        frames = np.concatenate(labels), np.concatenate(found), np.concatenate(scores)
        return {**segmentation_metrics(*frames, least), "threshold": least, "samples": float(videos)}


def largest_similarity(model: Any, texts: Tensor) -> float:
    """The threshold above the similarity of any two different names, unit features float [C, D]; -1 for one name.

    A model whose cosines do not compare texts with texts as texts with frames has ``moment_threshold``.
    """
    if len(texts) < 2:
        return -1.0
    if callable(own := getattr(model, "moment_threshold", None)):
        limit = float(own(texts))
    else:
        limit = float((texts @ texts.T).fill_diagonal_(-1.0).max())
    return float(np.nextafter(np.float32(limit), np.float32(np.inf)))


def named_actions(one: PreparedSet) -> tuple[str, ...]:
    """The different texts of all timed captions of a set, sorted."""
    reader, texts = TimedReader(), set[str]()
    for sample in one.samples():
        try:
            texts |= {caption.text for caption in reader.read(sample)["timed"]}
        except UnreadableSample:  # counted when the frames are read
            continue
    return tuple(sorted(texts))


def frame_labels(times: Tensor, timed: Sequence[TimedText], names: Sequence[str]) -> np.ndarray[Any, Any]:
    """int64 [T]: the number of the action that each of the ``times``, float [T], shows; ``BACKGROUND`` for none.

    Ends are exclusive. Where captions overlap, the one that began last counts. Captions with other texts than ``names``
    are background.
    """
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.full(len(times), BACKGROUND, np.int64)
    for caption in timed:
        inside = (times.numpy() >= caption.start) & (times.numpy() < caption.end)
        labels[inside] = numbers.get(caption.text, BACKGROUND)
    return labels


def segmentation_metrics(
    labels: np.ndarray[Any, Any], found: np.ndarray[Any, Any], scores: np.ndarray[Any, Any], threshold: float
) -> dict[str, float]:
    """The metrics of frames: labels int64 [N], the nearest names int64 [N], and their cosines float [N].

    ``action_accuracy`` counts frames of actions and needs no threshold. ``tuned_accuracy`` is that of the best
    threshold for these very labels: an upper limit.
    """
    is_action, right = labels != BACKGROUND, labels == found
    predicted = np.where(scores >= threshold, found, BACKGROUND)
    best, at = tuned_threshold(right, ~is_action, scores)
    _, counts = np.unique(labels, return_counts=True)
    return {
        "accuracy": float((predicted == labels).mean()),
        "action_accuracy": float(right[is_action].mean()) if is_action.any() else 0.0,
        "tuned_accuracy": best,
        "tuned_threshold": at,
        "constant": float(counts.max() / len(labels)),
        "frames": float(len(labels)),
    }


def tuned_threshold(
    right: np.ndarray[Any, Any], background: np.ndarray[Any, Any], scores: np.ndarray[Any, Any]
) -> tuple[float, float]:
    """The best accuracy that a threshold on ``scores`` [N] gives, and the least such threshold.

    A frame at the threshold or above it counts if it is ``right``, one below it if it is ``background``.
    """
    order = np.argsort(scores, kind="stable")
    sorted_scores = scores[order]
    below = np.concatenate([[0], np.cumsum(background[order])])
    above = right.sum() - np.concatenate([[0], np.cumsum(right[order])])
    # A threshold is between two different scores: as many frames are below it as are less than it.
    cuts = np.concatenate([[True], sorted_scores[1:] > sorted_scores[:-1], [True]])
    totals = np.where(cuts, below + above, -1)
    place = int(totals.argmax())
    at = sorted_scores[place] if place < len(scores) else np.nextafter(sorted_scores[-1], np.inf)
    return float(totals[place] / len(scores)), float(at)
