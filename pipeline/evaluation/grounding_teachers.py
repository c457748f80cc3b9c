"""Models that find the phrases of captions, for ``stages/annotate/pseudo_box_maker.py``.

Any method of ours with ``ground``; Grounding DINO (Liu et al., 2023, arXiv 2303.05499) and OWLv2 (Minderer, Gritsenko,
Houlsby, 2023, arXiv 2306.09683), as transformers has them. A phrase's score is the mean over its tokens in Grounding
DINO, where transformers' own function gives names in place of spans. OWLv2 gets the phrases as queries.

Images are batched with images of the same padded size, which depends on the image alone, so boxes do not depend on
the batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import require
from pipeline.errors import SettingError
from pipeline.evaluation.embedder import Precision
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.models import load_any, usable_device
from pipeline.loaders.grounding import averaging_matrix, phrase_tokens
from pipeline.loaders.grounding_prompts import SpanTokenizer, TokenizedText
from pipeline.loaders.images import as_stored, decode, resize
from pipeline.loaders.samples import UnreadableSample
from pipeline.models.method import build_method
from pipeline.models.towers.weights import digest_of
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.caption_phrases import Span
from pipeline.stages.annotate.pseudo_box_maker import FoundBoxes, GroundingTeacher
from pipeline.training.checkpoint import checkpoint_folder, resolved
from pipeline.training.run import read_record

GROUNDING_DINO, OWLV2 = "grounding-dino:", "owlv2:"
GRAIN = 32
"""Heights and widths are padded to a multiple of this many pixels."""
LONG_SIDE = 25 * GRAIN
LARGEST = 2048
"""Pixels of the longer side of a decoded image; hundreds of images are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class LoadGroundingTeacher:
    """Loads the teacher when it is called."""

    teacher: str
    """Checkpoint or run folder of a method that grounds phrases (jobs/pretrain_glip.py), or a model of transformers:
    grounding-dino:NAME or owlv2:NAME, where NAME is a folder or a model id."""
    device: str = "auto"
    """Device of the teacher; auto uses GPUs if available."""
    precision: Precision = "fp32"
    """Precision of the teacher: fp32 or bf16."""

    def __post_init__(self) -> None:
        require(bool(self.teacher), "teacher", self.teacher, "a checkpoint, grounding-dino:NAME or owlv2:NAME")

    def __call__(self, threads: int) -> GroundingTeacher:
        """``threads`` is the number of CPU threads for the teacher, if it does not run on a GPU.

        Raises:
            SettingError: no such model, or one that does not ground phrases.
        """
        device = usable_device(self.device)
        if device == "cpu":
            torch.set_num_threads(threads)
        if self.teacher.startswith(GROUNDING_DINO):
            return GroundingDinoTeacher(self.teacher.removeprefix(GROUNDING_DINO), device, self.precision)
        if self.teacher.startswith(OWLV2):
            return Owlv2Teacher(self.teacher.removeprefix(OWLV2), device, self.precision)
        return CheckpointTeacher.load(self.teacher, device, self.precision)


@dataclass(frozen=True)
class DecodedImage:
    """``pixels`` uint8 [3, H, W], with a longer side of at most ``LARGEST``; ``height`` and ``width`` are those of the
    stored image."""

    pixels: Tensor
    height: int
    width: int


class _Teacher:
    """What all teachers share: nothing is known about a model but its digest."""

    model: Any
    precision: Precision

    def __init__(self, name: str, model: nn.Module, precision: Precision, *settings: str) -> None:
        self.model, self.precision = model.eval(), precision
        self.maker = digest_of(model, precision, *settings)
        self.facts: Mapping[str, Any] = {"teacher": self.maker, "teacher_name": name, "precision": precision}

    def prepare(self, image: bytes) -> DecodedImage | None:
        """The image, made smaller where it is larger than any model reads; ``None`` if it cannot be decoded."""
        try:
            pixels = decode(image)
        except UnreadableSample:
            return None
        height, width = pixels.shape[:2]
        scale = min(1.0, LARGEST / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        return DecodedImage(as_stored(pixels) if scale == 1 else resize(pixels, size, "bilinear"), height, width)

    def shape(self, image: DecodedImage) -> tuple[int, int]:
        """Height and width of the stored image."""
        return image.height, image.width


class CheckpointTeacher(_Teacher):
    """A method of ours that grounds phrases."""

    def __init__(self, method: Any, name: str, precision: Precision = "fp32", run: str = "") -> None:
        """``name`` and ``run``, the tracker's id of the run that trained it, are stored with the boxes.

        Raises:
            SettingError: a method without ``ground``.
        """
        require(callable(getattr(method, "ground", None)), "teacher", name, "a method that grounds phrases")
        super().__init__(name, method, precision)
        self.facts = {**self.facts, "teacher_run": run}
        tokenizer = getattr(method, "tokenizer", None)
        self._tokenizer: SpanTokenizer | None = tokenizer if isinstance(tokenizer, SpanTokenizer) else None
        self._most: int = method.config.grounding.text_tokens if self._tokenizer else 0

    @classmethod
    def load(cls, address: str, device: str = "cpu", precision: Precision = "fp32") -> "CheckpointTeacher":
        """The method of a checkpoint or run folder; raises ``SettingError`` where there is none."""
        folder = checkpoint_folder(address)
        run = "" if folder is None else _tracking_run(folder)
        return cls(load_any(address, device), resolved(address), precision, run)

    def size(self, image: DecodedImage) -> tuple[int, int]:
        """The size at which it fits a square; only its proportions matter here."""
        scale = LONG_SIDE / max(self.shape(image))
        height, width = (_padded_side(max(1, round(side * scale))) for side in self.shape(image))
        return height, width

    def length(self, caption: str) -> int:
        """The tokens of a caption, at most those of the method's longest text; for a method with another kind of
        tokenizer its words."""
        return min(self._tokenizer.count(caption) + 2, self._most) if self._tokenizer else len(caption.split())

    def ground(
        self, images: Sequence[DecodedImage], captions: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[FoundBoxes]:
        """See :class:`~pipeline.stages.annotate.pseudo_box_maker.GroundingTeacher`."""
        with inference(self.model, self.precision):
            found = self.model.ground([image.pixels for image in images], captions, spans)
        cut = [(False,) * len(some) for some in spans]
        if self._tokenizer is not None:
            cut = _cut_off(self._tokenizer.batch(captions, self._most), spans)
        return [
            _found(one.boxes * _enlarged(image), one.scores, one.spans, off)
            for one, image, off in zip(found, images, cut, strict=True)
        ]


def untrained_teacher(config: Any) -> CheckpointTeacher:
    """The method that ``config`` describes, with random weights of a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CheckpointTeacher(build_method(config), "untrained")


class GroundingDinoTeacher(_Teacher):
    """Grounding DINO. A caption gets a full stop at its end, as in its training."""

    def __init__(self, name: str, device: str = "cpu", precision: Precision = "fp32") -> None:
        """``name`` is a folder or a model id; raises ``SettingError`` for another model."""
        from transformers import GroundingDinoForObjectDetection

        model, processor = _pretrained(GROUNDING_DINO, name, GroundingDinoForObjectDetection, "grounding-dino")
        self._images, description = processor.image_processor, processor.tokenizer.backend_tokenizer.to_str()
        super().__init__(name, model.to(device), precision, self._images.to_json_string(), description)
        size = self._images.size
        edges = getattr(size, "shortest_edge", None), getattr(size, "longest_edge", None)
        require(all(edges), "teacher", name, "an image processor with a shortest and a longest edge")
        self._edges = (int(edges[0] or 0), int(edges[1] or 0))
        self._tokenizer, self._most = SpanTokenizer(description), int(model.config.max_text_len)
        self._stop = processor.tokenizer.convert_tokens_to_ids(".")

    def size(self, image: DecodedImage) -> tuple[int, int]:
        """The resized image, padded to a multiple of 32 pixels."""
        from transformers.image_transforms import get_size_with_aspect_ratio

        height, width = get_size_with_aspect_ratio(tuple(image.pixels.shape[1:]), *self._edges)
        return _padded_side(height), _padded_side(width)

    def length(self, caption: str) -> int:
        """The tokens of a caption, at most those of the model's longest text."""
        return min(self._tokenizer.count(caption) + 3, self._most)

    def ground(
        self, images: Sequence[DecodedImage], captions: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[FoundBoxes]:
        """See :class:`~pipeline.stages.annotate.pseudo_box_maker.GroundingTeacher`."""
        texts = [self._stopped(one) for one in self._tokenizer.batch(captions, self._most - 1)]
        cut = _cut_off(texts, spans)
        found: dict[int, FoundBoxes] = {}
        for size, numbers in _of_one_size([self.size(image) for image in images]).items():
            inputs = self._inputs([images[n] for n in numbers], [texts[n] for n in numbers], size)
            with inference(self.model, self.precision) as device:
                made = self.model(**{name: tensor.to(device) for name, tensor in inputs.items()})
            positive = [phrase_tokens(texts[n], spans[n]) for n in numbers]
            averaging = averaging_matrix(positive, max(len(texts[n]) for n in numbers))
            scores = made.logits.float().sigmoid().cpu()[:, :, : averaging.shape[2]] @ averaging.transpose(1, 2)
            boxes = made.pred_boxes.double().cpu()
            for row, number in enumerate(numbers):
                height, width = self.shape(images[number])
                corners = _corners(boxes[row]) * torch.tensor([width, height, width, height])
                found[number] = _of_every_span(corners, scores[row, :, : len(spans[number])], cut[number])
        return [found[number] for number in range(len(images))]

    def _stopped(self, text: TokenizedText) -> TokenizedText:
        """The text with a full stop before the end, without which Grounding DINO ignores its last sentence."""
        if len(text) > 2 and text.ids[-2] == self._stop:
            return text
        ids = np.insert(text.ids, len(text) - 1, self._stop)
        return TokenizedText(ids, np.insert(text.offsets, len(text) - 1, 0, axis=0), text.whole)

    def _inputs(
        self, images: Sequence[DecodedImage], texts: Sequence[TokenizedText], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        shape = {"height": size[0], "width": size[1]}
        images_in = self._images(images=[image.pixels for image in images], pad_size=shape, return_tensors="pt")
        tokens = torch.full((len(texts), max(map(len, texts))), self._tokenizer.pad)
        mask = torch.zeros(tokens.shape, dtype=torch.int64)
        for number, one in enumerate(texts):
            tokens[number, : len(one)] = torch.from_numpy(one.ids)
            mask[number, : len(one)] = 1
        names = {"pixel_values": images_in["pixel_values"], "pixel_mask": images_in["pixel_mask"]}
        return {**names, "input_ids": tokens, "attention_mask": mask, "token_type_ids": torch.zeros_like(tokens)}


class Owlv2Teacher(_Teacher):
    """OWLv2, which is asked for each phrase by itself, without the rest of the caption."""

    def __init__(self, name: str, device: str = "cpu", precision: Precision = "fp32") -> None:
        """``name`` is a folder or a model id; raises ``SettingError`` for another model."""
        from transformers import Owlv2ForObjectDetection

        model, processor = _pretrained(OWLV2, name, Owlv2ForObjectDetection, "owlv2")
        self._images, self._tokenizer = processor.image_processor, processor.tokenizer
        settings = self._images.to_json_string(), self._tokenizer.backend_tokenizer.to_str()
        super().__init__(name, model.to(device), precision, *settings)
        self._most = int(model.config.text_config.max_position_embeddings)
        self._side = int(model.config.vision_config.image_size)

    def size(self, image: DecodedImage) -> tuple[int, int]:
        """The square that every image is padded to."""
        return self._side, self._side

    def length(self, caption: str) -> int:
        """Texts are phrases, which are all padded to the same length."""
        return self._most

    def ground(
        self, images: Sequence[DecodedImage], captions: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[FoundBoxes]:
        """See :class:`~pipeline.stages.annotate.pseudo_box_maker.GroundingTeacher`; a phrase longer than the model's
        longest text is cut off."""
        texts = [[caption[start:end] for start, end in some] for caption, some in zip(captions, spans, strict=True)]
        most = max(1, *map(len, texts))
        tokens = torch.zeros((len(texts), most, self._most), dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        cut = []
        for number, some in enumerate(texts):
            known = [self._tokenizer(text)["input_ids"] for text in some]
            cut.append(tuple(len(ids) > self._most for ids in known))
            for place, ids in enumerate(known):
                kept = ids if len(ids) <= self._most else ids[:0]
                tokens[number, place, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
                mask[number, place, : len(kept)] = 1
        pixels = self._images(images=[image.pixels for image in images], return_tensors="pt")["pixel_values"]
        inputs = {"input_ids": tokens.flatten(0, 1), "attention_mask": mask.flatten(0, 1), "pixel_values": pixels}
        with inference(self.model, self.precision) as device:
            made = self.model(**{name: tensor.to(device) for name, tensor in inputs.items()})
        scores = made.logits.float().sigmoid().cpu() * mask.any(dim=2)[:, None]
        boxes = made.pred_boxes.double().cpu()
        return [
            _of_every_span(_corners(boxes[n]) * max(self.shape(image)), scores[n, :, : len(texts[n])], cut[n])
            for n, image in enumerate(images)
        ]


def _pretrained(prefix: str, name: str, kind: Any, model_type: str) -> tuple[Any, Any]:
    """The model and its processor; raises ``SettingError`` where ``name`` holds none of this kind."""
    from transformers import AutoConfig, AutoProcessor

    processor: Any = AutoProcessor
    allowed = f"{prefix}NAME with a folder or a model id of transformers"
    try:
        found = AutoConfig.from_pretrained(name).model_type
        require(found == model_type, "teacher", name, f"{allowed} of the type {model_type}, not {found}")
        return kind.from_pretrained(name), processor.from_pretrained(name)
    except SettingError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise SettingError("teacher", prefix + name, f"{allowed} ({str(error).splitlines()[0]})") from error


def _tracking_run(checkpoint: Folder) -> str:
    """The tracker's id of the run that wrote a checkpoint; empty where the run's folder is not above it."""
    parts = checkpoint.uri.split("/")
    for above in range(3):
        record = read_record(Folder("/".join(parts[: len(parts) - above])))
        if record is not None:
            return record.tracking_run
    return ""


def _enlarged(image: DecodedImage) -> Tensor:
    """The factors from boxes in ``pixels`` to boxes in the stored image, [4]."""
    return torch.tensor([image.width / image.pixels.shape[2], image.height / image.pixels.shape[1]] * 2)


def _padded_side(side: int) -> int:
    return -(-side // GRAIN) * GRAIN


def _of_one_size(sizes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """The numbers of the images of each size."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, size in enumerate(sizes):
        groups.setdefault(size, []).append(number)
    return groups


def _cut_off(texts: Sequence[TokenizedText], spans: Sequence[Sequence[Span]]) -> list[tuple[bool, ...]]:
    """For each span, whether the token limit has cut it off."""
    return [
        tuple(not text.whole and not text.positive([span]).any() for span in some)
        for text, some in zip(texts, spans, strict=True)
    ]


def _corners(boxes: Tensor) -> Tensor:
    """Centre, width and height to x1, y1, x2, y2: [n, 4]."""
    centre, size = boxes[:, :2], boxes[:, 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=1)


def _of_every_span(boxes: Tensor, scores: Tensor, cut: tuple[bool, ...]) -> FoundBoxes:
    """Each box [n, 4] once for each span with a score above 0 in ``scores`` [n, S]."""
    rows, spans = torch.where(scores > 0)
    return _found(boxes[rows], scores[rows, spans], spans, cut)


def _found(boxes: Tensor, scores: Tensor, spans: Tensor, cut: tuple[bool, ...]) -> FoundBoxes:
    return FoundBoxes(boxes.double().cpu().numpy(), scores.double().cpu().numpy(), spans.cpu().numpy(), cut)
