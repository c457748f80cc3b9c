"""Questions about images as VQA v2, SNLI-VE and GQA are published: annotation files and a folder of images.

| layout | ``questions`` | ``annotations`` | image of a question |
| --- | --- | --- | --- |
| vqa | v2_OpenEnded_..._questions.json | v2_mscoco_..._annotations.json | its name ends in the image_id |
| snli-ve | snli_ve_....jsonl, sentences and their relation to the image | | Flickr30K_ID.jpg |
| gqa | ..._balanced_questions.json | | imageId.jpg |

A row is an image with all its questions in ``questions.json`` (:mod:`pipeline.loaders.questions`). Questions without an
answer, such as those of a test set or SNLI's without a majority ("-"), are left out and counted in a warning.
"""

import hashlib
import json
import logging
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import pyarrow as pa

from pipeline.config import parse_json, require
from pipeline.errors import ReadError, SampleError, SettingError, missing, unreadable
from pipeline.shards.media import IMAGE
from pipeline.shards.questions import QUESTIONS
from pipeline.shards.storage import Folder, file_stamp, file_system, read_errors
from pipeline.sources.annotation_table import table_rows, table_slices
from pipeline.sources.source import UNCHANGED, Part, Row, Slice, is_hidden

logger = logging.getLogger(__name__)

QuestionLayout = Literal["vqa", "snli-ve", "gqa"]
RELATIONS = ("entailment", "neutral", "contradiction")
"""The classes of SNLI-VE."""
_TEXTS: list[tuple[str, pa.DataType]] = [(name, pa.string()) for name in ("url", "stamp", "digest")]
SCHEMA = pa.schema([*_TEXTS, ("count", pa.int64()), ("questions", pa.binary())])
Record = dict[str, Any]
ENDINGS = tuple(f".{ending}" for ending in IMAGE.endings)
_BAD = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


@dataclass(frozen=True, kw_only=True)
class Questions:
    """A data set of questions about images."""

    kind: ClassVar[str] = "questions"
    summary: ClassVar[str] = "Questions about images as VQA v2, SNLI-VE or GQA are published, and a folder of images."
    image_options: ClassVar[Mapping[str, Any]] = UNCHANGED
    has_captions: ClassVar[bool] = False

    questions: str
    """File with the questions, as a path or fsspec URI; compressed files (.gz) are unpacked."""
    annotations: str = ""
    """File with the answers of VQA."""
    images: str
    """Folder of the images, as a path or fsspec URI that every worker can read, with any folders below it."""
    layout: QuestionLayout = "vqa"
    """Layout of the files: vqa, snli-ve or gqa."""

    def __post_init__(self) -> None:
        known = get_args(QuestionLayout)
        require(self.layout in known, "layout", self.layout, "one of " + ", ".join(known))
        require(bool(self.questions), "questions", self.questions, "a file with questions")
        require(bool(self.images), "images", self.images, "the folder of the images")
        fits = self.layout == "vqa" or not self.annotations
        require(fits, "annotations", self.annotations, f"empty with {self.layout}")

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers questions and versions of the images."""
        answered = self.layout != "vqa" or bool(self.annotations)
        require(answered, "annotations", self.annotations, "VQA's file with the answers")
        return table_slices(self._table_rows(), SCHEMA, rows_per_shard, scratch, self.images)

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; an unreadable image is a row with a problem."""
        for values in table_rows(piece):
            image, problem = None, None
            try:
                image = self._place.read_bytes(values["url"])
            except OSError as error:
                problem = SampleError("failed_to_download", "unreadable", f"cannot read the file: {error}")
            columns = {"questions": values["count"], "questions_digest": values["digest"]}
            members = {} if problem else {QUESTIONS: values["questions"]}
            parts = (Part("image", image),)
            yield Row(url=values["url"], parts=parts, columns=columns, members=members, problem=problem)

    def schema(self) -> Mapping[str, type]:
        """The number of questions; ``questions_digest`` shows a refresh which have changed."""
        return {"questions": int, "questions_digest": str}

    @cached_property
    def _place(self) -> Folder:
        return Folder(self.images)

    def _table_rows(self) -> Iterator[Record]:
        if self._place.kind() != "directory":
            raise missing("images", self.images)
        by_image = self._by_image()
        listed = self._place.find()
        paths = sorted(path for path in listed if path.lower().endswith(ENDINGS) and not is_hidden(path))
        files = self._files(paths, by_image)
        found = [(files[name], asked) for name, asked in by_image.items() if name in files]
        require(bool(found), "images", self.images, f"a folder with the images of {self.questions}")
        if len(found) < len(by_image):
            logger.warning("%s: %d of %d images have no file", self.images, len(by_image) - len(found), len(by_image))
        for path, asked in found:
            content = json.dumps({"questions": asked}, separators=(",", ":"), ensure_ascii=False)
            text = content.encode("utf-8", "replace")
            digest = hashlib.sha256(text).hexdigest()[:16]
            yield {
                "url": path,
                "stamp": file_stamp(listed[path]),
                "count": len(asked),
                "digest": digest,
                "questions": text,
            }

    def _files(self, paths: Sequence[str], wanted: Container[str]) -> dict[str, str]:
        """The path of each image that is wanted, by the name that questions have for it."""
        files: dict[str, str] = {}
        for name, path in ((image_name(path, self.layout), path) for path in paths):
            first = files.setdefault(name, path) if name in wanted else path
            one = f"a folder with one file for each image, not {first} and {path}"
            require(first == path, "images", self.images, one)
        return files

    def _by_image(self) -> dict[str, list[Record]]:
        """The questions with answers of each image, by its name in :func:`image_name`'s form, in the file's order."""
        read = {"vqa": self._vqa, "snli-ve": self._relations, "gqa": self._gqa}[self.layout]
        by_image: dict[str, list[Record]] = {}
        count = unanswered = 0
        try:
            for name, record in read():
                count += 1
                answers = [text for text in record["answers"] if text.strip()]
                if not answers or not record["question"].strip():
                    unanswered += 1
                    continue
                by_image.setdefault(name, []).append({**record, "answers": answers})
        except SettingError:  # a file that cannot be read, with its own field
            raise
        except _BAD as error:
            require(False, "questions", self.questions, f"questions in the layout {self.layout} ({error!r})")
        answered = f"questions with answers; none of {count} has one"
        require(bool(by_image), "annotations" if self.annotations else "questions", self.questions, answered)
        if unanswered:
            logger.warning("%s: %d of %d questions have no answer", self.questions, unanswered, count)
        return by_image

    def _vqa(self) -> Iterator[tuple[str, Record]]:
        answers = self._answers()
        for one in _parsed(self.questions, "questions")["questions"]:
            given, kind = answers.get(one["question_id"], ([], ""))
            yield str(int(one["image_id"])), {"question": _text(one["question"]), "answers": given, "kind": kind}

    def _answers(self) -> dict[Any, tuple[list[str], str]]:
        """VQA's answers by the question's id, with their kind."""
        try:
            return {
                one["question_id"]: (
                    [_text(given["answer"]) for given in one["answers"]],
                    str(one.get("answer_type", "")),
                )
                for one in _parsed(self.annotations, "annotations")["annotations"]
            }
        except _BAD as error:
            raise SettingError("annotations", self.annotations, f"answers in the layout vqa ({error!r})") from error

    def _gqa(self) -> Iterator[tuple[str, Record]]:
        for one in _parsed(self.questions, "questions").values():
            kinds = one.get("types") or {}
            record = {"question": _text(one["question"]), "answers": [_text(one.get("answer", ""))]}
            yield str(one["imageId"]), {**record, "kind": str(kinds.get("structural", ""))}

    def _relations(self) -> Iterator[tuple[str, Record]]:
        for line in filter(str.strip, _lines(self.questions)):
            one = parse_json(line)
            label = str(one.get("gold_label", "-"))
            answers = [label] if label in RELATIONS else []
            record = {"question": _text(one["sentence2"]), "answers": answers, "kind": label}
            yield str(one["Flickr30K_ID"]).removesuffix(".jpg"), record


def image_name(path: str, layout: QuestionLayout) -> str:
    """What a question calls the image in the file ``path``: of VQA the number at the end of its name, else the name."""
    stem = path.rpartition("/")[2].rpartition(".")[0]
    number = re.search(r"(\d+)$", stem) if layout == "vqa" else None
    return str(int(number[1])) if number else stem


def _text(value: object) -> str:
    if not isinstance(value, str | int | float):
        raise TypeError(f"{value!r} is no text")
    return str(value)


def _parsed(uri: str, field: str) -> Any:
    return parse_json("".join(_lines(uri, field)))


def _lines(uri: str, field: str = "questions") -> list[str]:
    """The lines of a text file.

    Raises:
        SettingError: no such file, or not a text.
        ReadError: the store failed.
    """
    fs, path = file_system(uri)
    try:
        with read_errors(uri), fs.open(path, "rt", encoding="utf-8-sig", compression="infer") as file:
            return list(file)
    except ReadError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable(field, uri, "a JSON file", error) from error
