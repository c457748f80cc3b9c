"""Image-text retrieval: the captions of an image among all captions, and the image of a caption among all images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline.evaluation.data import Data, evaluation_batches
from pipeline.evaluation.encoder import Evaluable, as_encoder, encode_tokens, inference
from pipeline.evaluation.figures import retrieval_examples, similarity_matrix
from pipeline.evaluation.retrieval import retrieval
from pipeline.evaluation.task import SAMPLES, Cache, Column, PreparedSet, Reading, Report, Task, option
from pipeline.loaders.readers import CaptionsReader, FirstCaptionReader, ImageReader
from pipeline.loaders.text import caption_field

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATRIX, GALLERY = 16, 64


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a set."""

    caption: str = option(
        "auto",
        "retrieval_caption",
        "Field of the captions: auto (the list `captions` of the samples' json, else their txt), txt, or json:KEY.",
    )

    def __post_init__(self) -> None:
        if self.caption != "auto":
            caption_field(self.caption)


class Retrieval(Task):
    """Both directions; ``ready`` is the field of the set's captions."""

    report = Report(
        "retrieval",
        "retrieval",
        (
            *(
                column
                for way in ("i2t", "t2i")
                for column in (
                    *(Column(f"{way}_r{few}", f"{way} R@{few}") for few in (1, 5, 10)),
                    Column(f"{way}_median_rank", f"{way} median", ".1f"),
                )
            ),
            *(Column("chance"), SAMPLES),
        ),
    )
    help = "Retrieval sets; see --zero-shot."
    rank = 1
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require an encoder of images and texts."""
        as_encoder(model, type(model).__name__)

    def prepare(self, config: Config, data: Data, name: str) -> str:
        """The field of the captions."""
        return config.caption

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """Recall and median ranks."""
        image = ImageReader(transform=model.transforms(train=False))
        readers = (image, CaptionsReader(tokenizer=model.tokenizer, caption=one.ready))
        batches = evaluation_batches(one.samples(), readers, reading.evaluation_batch, reading.evaluation_threads)
        return retrieval(model, batches, reading.evaluation_precision)

    def figures(self, model: Any, one: PreparedSet, title: str) -> dict[str, "Figure"]:
        """``similarity`` and ``examples`` of a few dozen held-out pairs."""
        images, captions, scores = _scores(model, one)
        named = f"{one.name} {title}".strip()
        few = min(MATRIX, len(images))
        return {
            "similarity": similarity_matrix(
                images[:few], captions[:few], scores[:few, :few], f"{named}: similarity of held-out pairs"
            ),
            "examples": retrieval_examples(
                images, captions, scores, title=f"{named}: retrieval among {len(images)} held-out pairs"
            ),
        }


def _scores(model: Evaluable, one: PreparedSet) -> tuple[Tensor, list[str], Tensor]:
    """Images, their captions, and the cosines ``[N, N]`` with images first."""
    readers = (ImageReader(transform=model.transforms(train=False)), FirstCaptionReader(caption=one.ready))
    (batch,) = evaluation_batches(one.samples(GALLERY), readers, GALLERY, threads=2)
    with inference(model) as device:
        image_features = model.encode_image(batch["image"].to(device)).float()
        text_features = encode_tokens(model, model.tokenizer(batch["caption"]), device)
        return batch["image"], batch["caption"], (image_features @ text_features.T).cpu()
