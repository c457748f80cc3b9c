#!/usr/bin/env python
"""Search a data set by a text or a file: prints a table, writes a page that shows images and plays sounds and videos.

    python jobs/search.py --query "dog barking" --data s3://bucket/clotho --checkpoint RUN
    python jobs/search.py --query-file bark.flac --medium image --data s3://bucket/audioset --checkpoint RUN --top 50
    ray job submit --working-dir . -- python jobs/search.py --query-file dog.jpg --data s3://bucket/audioset \
        --checkpoint RUN --output s3://bucket/dog.html

    python jobs/search.py --query "a dog at play" --data s3://bucket/msrvtt --checkpoint ViT-B-32-quickgelu:openai

Every method with encoders of the media works. A model of images finds videos by their frames and marks the best moment.
Features are those of jobs/embed_dataset.py where they are of the same model and precision; other samples are encoded.
"""

import getpass
import logging
import tempfile
from dataclasses import dataclass, field
from typing import Literal

import tyro

from pipeline.config import require, run_job, writable_file
from pipeline.evaluation.data import open_data
from pipeline.evaluation.embedder import ModelEmbedder, Precision
from pipeline.evaluation.frame_embedder import FrameEmbedder, FrameRate
from pipeline.evaluation.models import load_any, usable_device
from pipeline.evaluation.moments import MOMENTS, MomentFinder
from pipeline.evaluation.report import matches_table
from pipeline.evaluation.search import (
    SearchOptions,
    as_encoded,
    file_query,
    medium_to_search,
    query_features,
    search,
    text_query,
    words_read,
)
from pipeline.evaluation.search_page import facts_of, search_page
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.storage import Folder, split_file
from pipeline.stages.annotate import frame_features

SMOKE = f"{tempfile.gettempdir()}/clipmill-smoke-{getpass.getuser()}/searched"
logger = logging.getLogger("search")


@dataclass(frozen=True, kw_only=True)
class Search:
    """A query, a data set, and a model."""

    data: str
    """Dataset card, or folder of a snapshot (its latest) or FOLDER@ID; a path or any fsspec URI."""
    checkpoint: str
    """Folder of a checkpoint or a run (path or URI), ARCHITECTURE:TAG, ARCHITECTURE:FILE, or ARCHITECTURE:untrained."""
    query: str = ""
    """Text to search by."""
    query_file: str = ""
    """Image, sound or video to search by, instead of a text: a path or URI; its content decides which of them it is."""
    medium: str = "auto"
    """Medium to rank: image, audio, video, moments (videos by their best frame), text (captions), or auto (the first
    one that is not the query's own)."""
    top: int = 20
    """Number of results, 1 to 1000."""
    output: str = "search.html"
    """HTML file for the results: a path or a URI."""
    play_seconds: float = 10.0
    """Seconds of each sound and video on the page, more than 0, at most 600."""
    name: str = ""
    """Name of the sidecar with features, as of jobs/embed_dataset.py; empty for `embeddings`, of moments `frames`."""
    rate: FrameRate = field(default_factory=FrameRate)
    precision: Precision = "fp32"
    """Precision of the model; features of another one are not used."""
    batch_size: int = 64
    """Samples per batch where they are encoded, 1 to 65,536."""
    threads: int = 4
    """Decoding threads, 1 to 256."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto uses a GPU if available."""

    def __post_init__(self) -> None:
        require(1 <= self.top <= 1000, "top", self.top, "1 to 1000")
        require(0 < self.play_seconds <= 600, "play_seconds", self.play_seconds, "more than 0, at most 600")
        require(self.name == "" or self.name.isidentifier(), "name", self.name, "a plain word, or empty")
        require(1 <= self.batch_size <= 65_536, "batch_size", self.batch_size, "1 to 65,536")
        require(1 <= self.threads <= 256, "threads", self.threads, "1 to 256")
        require(self.output.endswith(".html"), "output", self.output, "a file that ends in .html")
        require(not (self.query and self.query_file), "query", self.query, "a text or --query-file, one of the two")


@dataclass(frozen=True, kw_only=True)
class Smoke(Search):
    """The same job, on a snapshot that it draws first."""


DATA = Search(data=tyro.MISSING, checkpoint=tyro.MISSING)
PRESETS: dict[str, tuple[str, Search]] = {
    "samples": ("The samples of --data, by --query or --query-file; the preset if none is named.", DATA),
    "smoke": (
        "Drawn images by a text, with an untrained model.",
        Smoke(data=SMOKE, checkpoint="clipmill-tiny:untrained", query="a red star", output=f"{SMOKE}.html", top=5),
    ),
}


def main(run: Search) -> None:
    """Check query, output and data, then search, print and write the page."""
    query = file_query(run.query_file) if run.query_file else text_query(run.query)
    folder, name = split_file(writable_file("output", run.output))
    usable_device(run.device)
    if isinstance(run, Smoke):
        drawn_snapshot(Folder(run.data))
    data, model = open_data(run.data), load_any(run.checkpoint, run.device)
    embedder = ModelEmbedder(model, run.precision)
    query = as_encoded(query, embedder.media)
    medium = medium_to_search(run.medium, query, embedder, data)
    features = query_features(embedder, query)
    cut = words_read(model.tokenizer, query.text) if query.text else None
    if cut is not None:
        logger.warning("the query is longer than the model's context: it reads the first %d words", cut)
    sidecar = run.name or (frame_features.NAME if medium == MOMENTS else "embeddings")
    options = SearchOptions(top=run.top, sidecar=sidecar, batch_size=run.batch_size, threads=run.threads)
    finder = None
    if medium == MOMENTS:
        frames = FrameEmbedder(model, run.rate, run.precision)
        finder = MomentFinder(frames, sidecar, run.batch_size, run.threads)
    found = search(embedder, features, data, medium, options, finder)
    print(matches_table(found.matches))
    page = search_page(query, found, facts_of(run.data, run.checkpoint, cut), run.play_seconds)
    folder.write_atomic(name, page.encode())
    print(f"{folder.join(name)}: {len(found.matches)} of {found.compared} samples, {found.stored} from a sidecar")


if __name__ == "__main__":
    run_job(PRESETS, main, default="samples")
