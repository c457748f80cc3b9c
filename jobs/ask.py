#!/usr/bin/env python
"""Ask a question about an image: prints the best answers with their probabilities.

    python jobs/ask.py picture IMAGE --question "how many stars are there?" --checkpoint RUN
    python jobs/ask.py picture s3://bucket/street.jpg --question "is it raining?" --checkpoint RUN --output seen.png

--output draws where the model looks: the attention of its last layer to the cells of the image.
"""

import json
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import tyro

from pipeline.config import require, run_job, writable_file
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.figures import attention_grid
from pipeline.evaluation.models import load_any
from pipeline.evaluation.report import answers_table
from pipeline.loaders.images import as_stored
from pipeline.models.clipvil import SMALLEST
from pipeline.models.method import build_method
from pipeline.runs.drawn_data import DRAWN_IMAGE, read_image
from pipeline.shards.storage import split_file


@dataclass(frozen=True, kw_only=True)
class Ask:
    """An image, a question, and a model that answers it."""

    image: tyro.conf.Positional[str]
    """Image file: a path or any fsspec URI."""
    question: str
    """Question about the image."""
    checkpoint: str
    """Checkpoint or run folder (path or URI) of jobs/train_clipvil.py."""
    top: int = 5
    """Number of answers, 1 or more."""
    output: str = ""
    """PNG file for the image with the attention to its cells: a path or a URI; empty for none."""
    json: bool = False
    """Print JSON instead of a table."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto uses a GPU if available."""

    def __post_init__(self) -> None:
        require(self.top >= 1, "top", self.top, "1 or more")
        ending = not self.output or self.output.endswith(".png")
        require(ending, "output", self.output, "a file that ends in .png, or empty")


@dataclass(frozen=True, kw_only=True)
class Smoke(Ask):
    """The same job, with an untrained model, on an image that it draws first."""


PRESETS: dict[str, tuple[str, Ask]] = {
    "picture": (
        "A question about one image.",
        Ask(image=tyro.MISSING, question=tyro.MISSING, checkpoint=tyro.MISSING),
    ),
    "smoke": (
        "A question about a drawn image, to an untrained model.",
        Smoke(image=DRAWN_IMAGE, question="what colour is the star?", checkpoint="", top=3),
    ),
}


def main(run: Ask) -> None:
    """Check image and model, then answer, print and draw."""
    require(bool(run.question.strip()), "question", run.question, "a text")
    target = split_file(writable_file("output", run.output)) if run.output else None
    image = as_stored(read_image(run.image))
    model: Any = build_method(SMALLEST).eval() if isinstance(run, Smoke) else load_any(run.checkpoint, run.device)
    able = callable(getattr(model, "answer_probabilities", None))
    require(able, "checkpoint", type(model).__name__, "a model that answers questions (jobs/train_clipvil.py)")
    with inference(model):
        (probabilities,) = model.answer_probabilities([image], [run.question])
        best = probabilities.topk(min(run.top, len(probabilities)))
        answers = [
            (model.config.answers[n], p) for n, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        if target is not None:
            content = BytesIO()
            seen = model.attention([image], [run.question])
            attention_grid([image], seen, [f"{run.question} {answers[0][0]}"]).savefig(content, format="png")
            target[0].write_atomic(target[1], content.getvalue())
    rows = [{"answer": text, "probability": value} for text, value in answers]
    print(json.dumps(rows, indent=2) if run.json else answers_table(answers))


if __name__ == "__main__":
    run_job(PRESETS, main)
