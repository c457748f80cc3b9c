"""Retrieval between images, sounds, videos and texts: each medium of a sample among all of another one."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline.config import require
from pipeline.evaluation.data import Data, evaluation_batches
from pipeline.evaluation.encoder import encode_tokens, inference
from pipeline.evaluation.figures import retrieval_examples, similarity_matrix
from pipeline.evaluation.media import (
    AUTO,
    KNOWN,
    TEXT,
    PartsReader,
    encode_inputs,
    inputs_of,
    medium_reader,
    paired_media,
    stored_media,
    usable_media,
)
from pipeline.evaluation.retrieval import DEPTHS, Ranking, retrieval
from pipeline.evaluation.shown_clips import clip_files
from pipeline.evaluation.shown_media import PictureReader, sound_files
from pipeline.evaluation.task import SAMPLES, Cache, Column, PreparedSet, Reading, Report, Task, option
from pipeline.loaders.readers import CaptionsReader, FirstCaptionReader
from pipeline.loaders.text import caption_field
from pipeline.shards.media import MEDIA

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATRIX, GALLERY, PLAYED = 16, 64, 6


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a set."""

    caption: str = option(
        "auto",
        "retrieval_caption",
        "Field of the captions: auto (the list `captions` of the samples' json, else their txt), txt, or json:KEY.",
    )
    media: str = option(AUTO)
    """Media to compare: auto (those that the model encodes and the data have), or some, as in audio+text. A model of
    images reads videos by the mean of their frames: video+text."""
    by_sample: bool = option(False)
    """Whether queries over texts rank samples by the best of their captions, not captions: CLIP4Clip's protocol."""
    dual_softmax: bool = option(False)
    """Whether scores are also normalised over all queries: looks at all of them, so not for comparisons."""

    def __post_init__(self) -> None:
        if self.caption != "auto":
            caption_field(self.caption)
        if self.media != AUTO:
            named = self.media.split("+")
            plain = len(named) >= 2 and len(set(named)) == len(named) and set(named) <= set(KNOWN)
            require(plain, "media", self.media, f"auto, or two or more of {', '.join(KNOWN)}, joined by +")


def _columns() -> tuple[Column, ...]:
    """Image-text first, then the other pairs; the report leaves out those without a number."""
    pairs = sorted(combinations(KNOWN, 2), key=lambda pair: pair != ("image", TEXT))
    ways = [f"{one[0]}2{other[0]}" for pair in pairs for one, other in permutations(pair)]
    return tuple(
        column
        for way in ways
        for column in (
            *(Column(f"{way}_r{few}", f"{way} R@{few}") for few in DEPTHS),
            Column(f"{way}_median_rank", f"{way} median", ".1f"),
            Column(f"{way}_mean_rank", f"{way} mean", ".1f"),
        )
    )


class Retrieval(Task):
    """All directions between the media of a set; ``ready`` are its options."""

    report = Report("retrieval", "retrieval", (*_columns(), Column("chance"), SAMPLES))
    help = "Retrieval sets; see --zero-shot."
    rank = 1
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require an encoder of two media of the set."""
        media_to_compare(model, one)

    def prepare(self, config: Config, data: Data, name: str) -> Config:
        """The options."""
        return config

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """Recall and median ranks."""
        media = media_to_compare(model, one)
        captions = CaptionsReader(tokenizer=model.tokenizer, caption=one.ready.caption) if TEXT in media else None
        readers = {medium: medium_reader(model, medium) for medium in media if medium != TEXT}
        parts = PartsReader(readers=readers, captions=captions)
        batches = evaluation_batches(
            one.samples(readers=readers.values()), (parts,), reading.evaluation_batch, reading.evaluation_threads
        )
        ranking = Ranking(one.ready.by_sample, one.ready.dual_softmax)
        return retrieval(model, batches, reading.evaluation_precision, media, ranking)

    def figures(self, model: Any, one: PreparedSet, title: str) -> dict[str, "Figure"]:
        """``similarity`` and ``examples`` of a few dozen held-out pairs of images and texts.

        ``similarity_audio`` and ``examples_audio`` show pairs of sounds and texts, with spectrograms.
        """
        media = media_to_compare(model, one)
        figures: dict[str, Figure] = {}
        for medium in media if TEXT in media else ():
            if medium != TEXT:
                ending = "" if medium == "image" else f"_{medium}"
                drawn = self._figures(model, one, medium, title)
                figures |= {f"{name}{ending}": figure for name, figure in drawn.items()}
        return figures

    def _figures(self, model: Any, one: PreparedSet, medium: str, title: str) -> dict[str, "Figure"]:
        pictures, captions, scores = _scores(model, one, medium)
        named = f"{one.name} {title}".strip()
        few = min(MATRIX, len(pictures))
        return {
            "similarity": similarity_matrix(
                pictures[:few], captions[:few], scores[:few, :few], f"{named}: similarity of held-out pairs"
            ),
            "examples": retrieval_examples(
                pictures,
                captions,
                scores,
                title=f"{named}: retrieval among {len(pictures)} held-out pairs",
                noun=MEDIA[medium].noun.split()[-1],
            ),
        }

    def files(self, model: Any, one: PreparedSet) -> dict[str, bytes]:
        """The sounds and clips of the first examples."""
        media, caption = media_to_compare(model, one), FirstCaptionReader(caption=one.ready.caption)
        files: dict[str, bytes] = {}
        for medium, made in (("audio", sound_files), ("video", clip_files)):
            if medium in media:
                files |= made((sample, caption.read(sample)["caption"]) for sample in one.samples(PLAYED))
        return files


def media_to_compare(model: object, one: PreparedSet) -> tuple[str, ...]:
    """The media of a set that its option and the model allow, texts last.

    Raises:
        SettingError: fewer than two, or the model or the data lack one that the option names.
    """
    setting = one.ready.media
    able = usable_media(model, one, setting)
    enough = len(able) >= 2
    require(enough, "checkpoint", type(model).__name__, "a model that encodes images and texts, or two other media")
    wanted = able if setting == AUTO else tuple(name for name in KNOWN if name in setting.split("+"))
    unknown = [name for name in wanted if name not in able]
    require(not unknown, f"{one.name}: media", setting, "media of the model: " + ", ".join(able))
    if wanted == ("image", TEXT):  # spares reading samples of a card
        return wanted
    stored = (*stored_media(one, model), TEXT)
    found = tuple(name for name in wanted if name in stored)
    complete = len(found) >= 2 and (setting == AUTO or found == wanted)
    has = ", ".join(stored[:-1]) or "no image, no sound and no video"
    require(complete, f"{one.name}: media", setting, f"data with {' and '.join(wanted)}; the samples have: {has}")
    return found


def _scores(model: Any, one: PreparedSet, medium: str) -> tuple[Sequence[Tensor], list[str], Tensor]:
    """Pictures of inputs, N times uint8 [3, H, W], their captions, and the cosines ``[N, N]`` with captions second."""
    readers = [medium_reader(model, medium), FirstCaptionReader(caption=one.ready.caption)]
    shown = "image"
    if medium != "image":
        readers.append(PictureReader(medium=medium))
        shown = PictureReader.key
    (batch,) = evaluation_batches(one.samples(GALLERY, readers), readers, GALLERY, threads=2)
    with inference(model) as device:
        tokens = model.tokenizer(batch["caption"])
        if paired_media(model):
            features = model.pair_features(medium, *inputs_of(batch, medium, device))
            scores = model.pair_scores(features, model.pair_features(TEXT, tokens.to(device)))
        else:
            features = encode_inputs(model, medium, batch, device)
            scores = features @ encode_tokens(model, tokens, device).T
        return batch[shown], batch["caption"], scores.cpu()
