"""Captions that a model writes, against reference captions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import require
from pipeline.evaluation.caption_scores import caption_metrics
from pipeline.evaluation.data import Data, evaluation_batches
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.figures import image_grid
from pipeline.evaluation.task import SAMPLES, Cache, Column, PreparedSet, Reading, Report, Task, option
from pipeline.loaders.batches import Row, SamplePosition
from pipeline.loaders.readers import ImageReader
from pipeline.loaders.text import caption_field, read_captions
from pipeline.shards.sample import Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES_AT_ONCE, SHOWN = 16, 8


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a set."""

    caption: str = option(
        "auto",
        "captioning_caption",
        "Field of the reference captions: auto (the list `captions` of the samples' json, else their txt), txt, or "
        "json:KEY.",
    )

    def __post_init__(self) -> None:
        if self.caption != "auto":
            caption_field(self.caption)


@dataclass(frozen=True, kw_only=True)
class ReferenceReader:
    """``references``: all captions of each sample, as texts."""

    caption: str
    fields = ()

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """The captions; raises ``UnreadableSample`` without any."""
        return {"references": read_captions(sample, self.caption)}

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """A list of lists."""
        return {"references": [row["references"] for row in rows]}


class Captioning(Task):
    """CIDEr-D and BLEU; ``ready`` is the field of the references."""

    report = Report(
        "captioning",
        "captioning",
        (Column("cider", "CIDEr"), *(Column(f"bleu{n}", f"BLEU-{n}") for n in range(1, 5)), SAMPLES),
    )
    help = "Captioning sets for a model that writes captions; see --zero-shot."
    rank = 6
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require a model that describes images."""
        writes = callable(getattr(model, "describe", None)) and getattr(model, "language", None) is not None
        require(writes, "checkpoint", type(model).__name__, "a model that writes captions (jobs/finetune_glipv2.py)")

    def prepare(self, config: Config, data: Data, name: str) -> str:
        """The field of the references."""
        return config.caption

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """Write a caption of every image."""
        readers = (ImageReader(transform=None), ReferenceReader(caption=one.ready))
        size = min(reading.evaluation_batch, IMAGES_AT_ONCE)
        written: list[str] = []
        references: list[list[str]] = []
        for batch in evaluation_batches(one.samples(), readers, size, reading.evaluation_threads):
            with inference(model, reading.evaluation_precision):
                written += model.describe(batch["image"])
            references += batch["references"]
        return {**caption_metrics(written, references), "samples": float(len(written))}

    def figures(self, model: Any, one: PreparedSet, title: str) -> dict[str, "Figure"]:
        """``captions``: eight images with what is written about them."""
        (batch,) = evaluation_batches(one.samples(SHOWN), (ImageReader(transform=None),), SHOWN, threads=2)
        with inference(model):
            written = model.describe(batch["image"])
        named = f"{one.name} {title}".strip()
        return {"captions": image_grid(batch["image"], written, columns=4, title=f"{named}: captions")}
