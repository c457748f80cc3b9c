"""Images with a prompt and with boxes that are matched with the prompt's tokens.

Li, Zhang, Zhang et al., 2021, "Grounded Language-Image Pre-training", arXiv 2112.03857. One reader reads data of a
detector and data with phrases, also mixed in one run:

- Objects with classes: the prompt is made of names of the data set's classes. For federated data (LVIS) only classes
  that were verified are sampled as negatives.
- A caption with phrases: the prompt is the caption, alone or among captions of other images. Objects that no phrase
  names are left out. An image is not mirrored if its caption says left or right. Of several captions one is drawn.
- Samples with both are read as captions with the probability ``caption_share``.
- Pseudo boxes: the same, from a sidecar of jobs/annotate_pseudo_boxes.py, where the data set has it.
- A caption without any annotated object says nothing about its words: they may be in the image or not. The authors draw
  another sample in its place; here it stays, with ``annotated`` False, and losses leave it out.

Everything random is a function of (seed, epoch, sample number).
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.loaders.batches import Batch, Row, SamplePosition
from pipeline.loaders.classes import classes_of
from pipeline.loaders.detection import Placement, RandomResize, StoredBoxes, large_enough, objects_in, padded
from pipeline.loaders.grounding_prompts import (
    ClassVocabulary,
    PromptOptions,
    Span,
    SpanTokenizer,
    TokenizedText,
    join_names,
    mix_captions,
)
from pipeline.loaders.images import decode, encoded_image
from pipeline.loaders.mixture import parts_of, read_data
from pipeline.loaders.order import RandomStream, permutation, random_bits, uniform
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.objects import FIELD, Objects
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import Wanted
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.filters.view import ShardView

MULTIPLE = 8
"""The number of tokens of a batch is a multiple of this."""
CAPTION_POOL = 4096
SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class GroundingOptions(PromptOptions):
    """How grounding data is read."""

    caption_share: float = 0.5
    """Probability that a sample with classes and phrases is read as a caption with phrases, 0 to 1."""
    pseudo_boxes: str = ""
    """Sidecar of pseudo boxes (jobs/annotate_pseudo_boxes.py), read where a data set has it; none if empty."""
    least_box_score: float = 0.5
    """Minimum score of a pseudo box, 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.caption_share <= 1, "caption_share", self.caption_share, "0 to 1")
        self.stored_boxes()

    def stored_boxes(self) -> StoredBoxes | None:
        """The sidecar of pseudo boxes, as a reader uses it."""
        return StoredBoxes.named(self.pseudo_boxes, self.least_box_score)


@dataclass(frozen=True, kw_only=True)
class GroundingData:
    """What the prompts of a run need to know of its data: see :func:`grounding_data`.

    ``classes`` are those of each snapshot, ``samples`` its number of samples; ``captions`` are negatives.
    """

    classes: tuple[tuple[str, ...], ...] = ((),)
    samples: tuple[int, ...] = (0,)
    captions: tuple[str, ...] = ()


def grounding_data(data: str, options: GroundingOptions, classes: Sequence[str] = (), seed: int = 0) -> GroundingData:
    """Classes and captions of the snapshots that a ``data`` setting names.

    ``classes`` replace those of every snapshot, to leave out novel ones.
    """
    parts = parts_of(read_data(data))
    found = tuple(tuple(classes) or tuple(classes_of(part)) for part in parts)
    each = -(-CAPTION_POOL // len(parts))
    pool = [text for part in parts for text in _captions(part, each, seed)] if options.mixed_captions else []
    return GroundingData(classes=found, samples=tuple(part.samples for part in parts), captions=tuple(pool))


def _captions(snapshot: Snapshot, most: int, seed: int) -> list[str]:
    """At most ``most`` captions of randomly chosen shards; none where samples have no text."""
    if "txt" not in snapshot.fields:
        return []
    found: list[str] = []
    for number in permutation(seed, RandomStream.CAPTION_POOL, 0, 0, len(snapshot.shards)).tolist():
        view = ShardView(Folder(snapshot.folder), snapshot.shards[number])
        found += [text for text in view.captions(cleaned=False) if text.strip()]
        if len(found) >= most:
            break
    return found[:most]


@dataclass(frozen=True)
class Grounding:
    """The prompt of one sample, the numbers of its objects that the prompt names, and their spans in the prompt.

    - ``left_out``: objects of the prompt's kind that it does not name for lack of tokens.
    - ``classes``: the names in a prompt of classes, also of those that are not in the image; none in a caption.
    - ``about``: the parts of the prompt that are true of the image: the names of its classes, or its caption.
    """

    text: str
    objects: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]
    left_out: int = 0
    classes: tuple[tuple[str, Span], ...] = ()
    about: tuple[Span, ...] = ()

    @property
    def annotated(self) -> bool:
        """Whether it is known which words of the prompt are in the image."""
        return bool(self.classes or self.objects)


@dataclass(frozen=True)
class GroundedTargets:
    """The prompt of a sample with its ``tokens``, and the visible objects with a token: their ``numbers`` in
    ``objects``, ``boxes`` float64 [N, 4] in the square and ``positive`` tokens bool [N, M]. ``left_out`` counts those
    without a token."""

    objects: Objects
    placement: Placement
    prompt: Grounding
    tokens: TokenizedText
    numbers: tuple[int, ...]
    boxes: NDArray[np.float64]
    positive: NDArray[np.bool_]
    left_out: int


@dataclass(frozen=True, kw_only=True)
class GroundingReader:
    """Images in a square, a prompt for each, and boxes with their tokens.

    image         uint8 [B, 3, size, size]
    sizes         int64 [B, 2], height and width of the part without padding
    tokens        int64 [B, M], start and end included, padded to the batch's longest, a multiple of 8
    token_mask    bool [B, M], False for padding
    boxes         float32 [B, G, 4], x1, y1, x2, y2 in pixels of the square, padded with zeros; G is at least 1
    counts        int64 [B], the number of boxes of each image, 0 or more
    positive_map  bool [B, G, M], the tokens of each box's phrases; at least one for every real box
    annotated     bool [B], False for a caption without any annotated object
    left_out      int64 [B], boxes whose phrase has no token within the limit

    Crowds, objects cut off by the augmentation and objects whose label or phrase is not in the prompt are left out. At
    most ``most`` objects per image are read, the first ones.
    """

    tokenizer: SpanTokenizer
    resize: RandomResize
    options: GroundingOptions = field(default_factory=GroundingOptions)
    data: GroundingData = field(default_factory=GroundingData)
    most: int = 300
    seed: int = 0

    @property
    def fields(self) -> Sequence[str]:
        """The image, and the objects unless a sidecar may have them."""
        return ("image",) if self.options.pseudo_boxes else ("image", FIELD)

    @property
    def sidecars(self) -> tuple[Wanted, ...]:
        """The pseudo boxes, if there are any."""
        return () if self._stored is None else (self._stored.wanted,)

    def read(self, sample: Sample, at: SamplePosition | None) -> Row:
        """The values of one sample; :meth:`collate` pads them.

        Raises:
            UnreadableSample: objects or image cannot be read.
            DataError: the boxes belong to an image of another size, or the sample has no boxes.
        """
        return self.values(sample, at, self.find(sample, at))

    def find(self, sample: Sample, at: SamplePosition | None) -> GroundedTargets:
        """The prompt and the objects of ``sample``; raises as :meth:`read`, except for the image."""
        objects = objects_in(sample, self._stored, self.seed, at)
        prompt = self.prompt(objects, at)
        placement = self._place(objects, prompt.text, at)
        tokens = self.tokenizer(prompt.text, self.options.text_tokens)
        moved = placement.boxes(objects.boxes)
        seen = large_enough(moved)
        shown = [(n, spans) for n, spans in zip(prompt.objects, prompt.spans, strict=True) if seen[n]]
        maps = [(number, tokens.positive(spans)) for number, spans in shown]
        kept = [(number, positive) for number, positive in maps if positive.any()]
        numbers = tuple(number for number, _ in kept[: self.most])
        positive = np.array([one for _, one in kept[: self.most]], np.bool_).reshape(-1, len(tokens))
        left_out = prompt.left_out + len(maps) - len(kept)
        return GroundedTargets(
            objects, placement, prompt, tokens, numbers, moved[list(numbers)].reshape(-1, 4), positive, left_out
        )

    def values(self, sample: Sample, at: SamplePosition | None, targets: GroundedTargets) -> Row:
        """The values of ``sample``; raises as :meth:`read`."""
        pixels = decode(encoded_image(sample))
        targets.objects.check_size(pixels.shape[0], pixels.shape[1], sample.key)
        return {
            "image": targets.placement.image(pixels),
            "sizes": targets.placement.extent,
            "tokens": targets.tokens.ids,
            "boxes": torch.from_numpy(targets.boxes).float(),
            "positive_map": targets.positive,
            "annotated": targets.prompt.annotated,
            "left_out": targets.left_out,
        }

    def collate(self, rows: list[Row]) -> Batch:
        """The tensors named above."""
        tokens, mask = padded_tokens([row["tokens"] for row in rows], self.tokenizer.pad)
        maps = []
        for row in rows:
            positive = torch.zeros((len(row["boxes"]), tokens.shape[1]), dtype=torch.bool)
            positive[:, : len(row["tokens"])] = torch.from_numpy(row["positive_map"])
            maps.append(positive)
        return {
            "image": default_collate([row["image"] for row in rows]),
            "sizes": torch.tensor([row["sizes"] for row in rows], dtype=torch.int64),
            "tokens": tokens,
            "token_mask": mask,
            "boxes": padded([row["boxes"] for row in rows], 0.0),
            "counts": torch.tensor([len(row["boxes"]) for row in rows], dtype=torch.int64),
            "positive_map": padded(maps, False),
            "annotated": torch.tensor([row["annotated"] for row in rows]),
            "left_out": torch.tensor([row["left_out"] for row in rows], dtype=torch.int64),
        }

    def prompt(self, objects: Objects, at: SamplePosition | None) -> Grounding:
        """The prompt of an image with ``objects``; without ``at`` nothing in it is random.

        Objects without classes are read by their caption, and so are samples with both at random. In evaluation, a
        sample with classes is read by its classes.

        Raises:
            UnreadableSample: labels are phrases, and there is no caption.
            DataError: labels are classes, and neither the data set nor the settings name them.
        """
        vocabulary = self._vocabularies[self._part(at)]
        at = None if self.options.fixed_prompts else at
        if objects.open_labels and not objects.caption:
            raise UnreadableSample(f"{objects.key} has no caption")
        if not len(vocabulary) and not objects.caption:
            raise DataError(f"sample {objects.key} has no caption, and its data set names no classes; name them")
        if not len(vocabulary) or objects.open_labels or (objects.phrases and self._prefers_caption(at)):
            return self._caption_prompt(objects, at)
        return self._class_prompt(objects, vocabulary, at)

    def _class_prompt(self, objects: Objects, vocabulary: ClassVocabulary, at: SamplePosition | None) -> Grounding:
        """Names of classes; objects of classes that are not in the vocabulary are left out without being counted."""
        numbers = [None if crowd else vocabulary.number(label) for label, crowd in _labelled(objects)]
        present = sorted({number for number in numbers if number is not None})
        verified = [vocabulary.number(label) for label in objects.negative] if objects.federated else None
        allowed = None if verified is None else [number for number in verified if number is not None]
        bits = None if at is None else random_bits(self.seed, RandomStream.PROMPTS, *at, 3 + 2 * len(vocabulary))[1:]
        chosen = vocabulary.choose(present, allowed, self.options, bits)
        prompt = join_names([vocabulary.names[number] for number in chosen])
        spans = dict(zip(chosen, prompt.spans, strict=True))
        named = [(n, spans[number]) for n, number in enumerate(numbers) if number is not None and number in spans]
        left_out = sum(number is not None for number in numbers) - len(named)
        names = tuple((vocabulary.names[number], span) for number, span in spans.items())
        about = tuple(dict.fromkeys(span for _, span in named))
        objects_named, their_spans = tuple(n for n, _ in named), tuple((span,) for _, span in named)
        return Grounding(prompt.text, objects_named, their_spans, left_out, names, about)

    def _caption_prompt(self, objects: Objects, at: SamplePosition | None) -> Grounding:
        bits = None
        if at is not None:
            bits = random_bits(self.seed, RandomStream.PROMPTS, *at, 4 + 2 * self.options.mixed_captions)[1:]
        text, start = mix_captions(objects.caption, self.data.captions, self.tokenizer, self.options, bits)
        spans: dict[int, list[Span]] = {}
        for phrase in objects.phrases:
            for number in phrase.objects:
                if not objects.crowd[number]:
                    spans.setdefault(number, []).append((start + phrase.start, start + phrase.end))
        named = sorted(spans.items())
        about = ((start, start + len(objects.caption)),) if objects.caption else ()
        return Grounding(
            text, tuple(number for number, _ in named), tuple(tuple(some) for _, some in named), about=about
        )

    def _prefers_caption(self, at: SamplePosition | None) -> bool:
        if at is None:
            return False
        (first,) = uniform(random_bits(self.seed, RandomStream.PROMPTS, *at, 1))
        return bool(first < self.options.caption_share)

    def _place(self, objects: Objects, text: str, at: SamplePosition | None) -> Placement:
        """A mirrored image would contradict a caption with left or right."""
        placement = self.resize.place(objects.height, objects.width, self.seed, at)
        return replace(placement, mirrored=False) if placement.mirrored and SIDES.search(text) else placement

    def _part(self, at: SamplePosition | None) -> int:
        """The snapshot of a mixture that a sample belongs to."""
        return 0 if at is None else min(bisect_right(self._ends, at.number), len(self._ends) - 1)

    @cached_property
    def _stored(self) -> StoredBoxes | None:
        return self.options.stored_boxes()

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.data.samples))

    @cached_property
    def _vocabularies(self) -> list[ClassVocabulary]:
        return [ClassVocabulary(classes, self.tokenizer) for classes in self.data.classes]


def padded_tokens(texts: Sequence[NDArray[np.int64]], pad: int) -> tuple[Tensor, Tensor]:
    """Token numbers int64 [B, M] and bool [B, M], False for padding; M is a multiple of 8."""
    longest = -(-max(map(len, texts)) // MULTIPLE) * MULTIPLE
    tokens = torch.full((len(texts), longest), pad, dtype=torch.int64)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for number, one in enumerate(texts):
        tokens[number, : len(one)] = torch.from_numpy(one)
        mask[number, : len(one)] = True
    return tokens, mask


def phrase_tokens(tokenized: TokenizedText, spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Bool [P, M]: the tokens of each span."""
    rows = [tokenized.positive([span]) for span in spans]
    return np.array(rows, np.bool_).reshape(len(rows), len(tokenized))


def averaging_matrix(positive: Sequence[NDArray[np.bool_]], tokens: int) -> Tensor:
    """float32 [B, P, M] from the tokens of the phrases of each image, bool [P_b, M_b]; P is at least 1."""
    most = max(1, *(len(one) for one in positive))
    found = torch.zeros(len(positive), most, tokens)
    for row, one in zip(found, positive, strict=True):
        row[: one.shape[0], : one.shape[1]] = torch.from_numpy(one).float()
    return found / found.sum(dim=2, keepdim=True).clamp(min=1)


def _labelled(objects: Objects) -> list[tuple[str, bool]]:
    return list(zip(objects.labels, objects.crowd, strict=True))
