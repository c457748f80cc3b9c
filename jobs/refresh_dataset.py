#!/usr/bin/env python
"""Bring a data set into WebDataset shards and publish a snapshot of it.

    ray job submit --working-dir . -- python jobs/refresh_dataset.py urls --url-list s3://bucket/list.parquet \
        --url-col url --caption-col caption --output-folder s3://bucket/cc3m --image-size 256 --resize-mode border

    python jobs/refresh_dataset.py urls … --parent latest --opt-out s3://bucket/opt-out.txt     # what has changed since

The first word names the source: urls, folder, webdataset, hugging-face, coco, drawn, stamps, stamp-scenes, or card
for a card of datasets/. The same command run again goes on where it was stopped; options and layout are img2dataset's
where it has them.
"""

import getpass
import tempfile
from dataclasses import dataclass, field
from typing import Literal

import tyro

from pipeline.config import require, run_job, writable_folder
from pipeline.dataset import load_card
from pipeline.errors import SettingError
from pipeline.shards.storage import Folder
from pipeline.sources import open_source
from pipeline.sources.coco import Coco
from pipeline.sources.drawn.source import Drawn
from pipeline.sources.folder import ImageFolder
from pipeline.sources.hugging_face import HuggingFaceParquet
from pipeline.sources.source import Source
from pipeline.sources.stamp_scenes import StampScenes
from pipeline.sources.stamps import TuxPaintStamps
from pipeline.sources.url_table import UrlTable
from pipeline.sources.webdataset import WebDatasetTars
from pipeline.stages.crawl.images import ImageOptions
from pipeline.stages.refresh.img2dataset_engine import refresh_with_img2dataset
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.progress import Floor
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.refresh.renewal import Renewal
from pipeline.stages.shard_tasks import Workers

AS_IT_IS = ShardOptions(images=ImageOptions(resize_mode="no", skip_reencode=True))
SMOKE_FOLDER = f"{tempfile.gettempdir()}/clipmill-smoke-{getpass.getuser()}/drawn"


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """What every refresh has."""

    output_folder: str
    """Where shards and snapshots go: a folder or any fsspec URI."""
    engine: Literal["native", "img2dataset"] = "native"
    """native, or the real img2dataset package (urls only)."""
    options: ShardOptions = field(default_factory=ShardOptions)
    workers: Workers = field(default_factory=Workers)
    renewal: Renewal = field(default_factory=Renewal)
    floor: Floor = field(default_factory=Floor)


@dataclass(frozen=True, kw_only=True)
class Urls(Refresh):
    """Download the images of a url table."""

    source: UrlTable


@dataclass(frozen=True, kw_only=True)
class Images(Refresh):
    """Read a folder of images with captions."""

    source: ImageFolder


@dataclass(frozen=True, kw_only=True)
class Tars(Refresh):
    """Read existing WebDataset tars."""

    source: WebDatasetTars


@dataclass(frozen=True, kw_only=True)
class Parquet(Refresh):
    """Read parquet files that hold their images."""

    source: HuggingFaceParquet


@dataclass(frozen=True, kw_only=True)
class Boxes(Refresh):
    """Read COCO's or LVIS's annotations and their images."""

    source: Coco


@dataclass(frozen=True, kw_only=True)
class World(Refresh):
    """Draw samples of the embedded world."""

    source: Drawn


@dataclass(frozen=True, kw_only=True)
class Stamps(Refresh):
    """Read the Tux Paint stamps."""

    source: TuxPaintStamps


@dataclass(frozen=True, kw_only=True)
class Scenes(Refresh):
    """Compose scenes of the Tux Paint stamps."""

    source: StampScenes


@dataclass(frozen=True, kw_only=True)
class FromCard(Refresh):
    """Read what a dataset card names."""

    card: tyro.conf.Positional[str]
    """Name of a card in datasets/, or the path of a YAML file."""


PRESETS: dict[str, tuple[str, Refresh]] = {
    "urls": (
        "Download a url table (parquet, csv, tsv, json, jsonl).",
        Urls(source=UrlTable(url_list=tyro.MISSING), output_folder=tyro.MISSING),
    ),
    "folder": (
        "A folder of images with captions.",
        Images(source=ImageFolder(folder=tyro.MISSING), output_folder=tyro.MISSING),
    ),
    "webdataset": (
        "Existing WebDataset tars, img2dataset's too; images stay as they are unless you say otherwise.",
        Tars(source=WebDatasetTars(tars=tyro.MISSING), output_folder=tyro.MISSING, options=AS_IT_IS),
    ),
    "hugging-face": (
        "Parquet files with the images inside, as Hugging Face stores image data sets.",
        Parquet(source=HuggingFaceParquet(parquet=tyro.MISSING), output_folder=tyro.MISSING),
    ),
    "coco": (
        "COCO's or LVIS's annotations and images; images stay as they are, since boxes are measured in them.",
        Boxes(source=Coco(annotations=tyro.MISSING), output_folder=tyro.MISSING, options=AS_IT_IS),
    ),
    "drawn": (
        "Samples of the embedded world, drawn as they are needed.",
        World(source=Drawn(), output_folder=tyro.MISSING, options=AS_IT_IS),
    ),
    "stamps": (
        "The Tux Paint stamps of Debian's package tuxpaint-stamps-default.",
        Stamps(source=TuxPaintStamps(), output_folder=tyro.MISSING),
    ),
    "stamp-scenes": (
        "Scenes composed of these stamps, with boxes, masks and captions.",
        Scenes(source=StampScenes(), output_folder=tyro.MISSING, options=AS_IT_IS),
    ),
    "card": ("What a dataset card names.", FromCard(card=tyro.MISSING, output_folder=tyro.MISSING)),
    "smoke": (
        "Sixty-four drawn samples into a temporary folder, in this process.",
        World(
            source=Drawn(samples=64, size=64),
            output_folder=SMOKE_FOLDER,
            options=AS_IT_IS,
            workers=Workers(processes_count=0),
        ),
    ),
}


def main(run: Refresh) -> None:
    """Wire source, folder and engine."""
    folder = Folder(writable_folder("output_folder", run.output_folder))
    card = load_card(run.card) if isinstance(run, FromCard) else None
    source: Source = open_source(card.source) if card else run.source  # type: ignore[attr-defined]
    name = card.name if card else getattr(source, "classes_of", None) or None
    if run.engine == "native":
        refresh(source, folder, run.options, run.workers, name, renewal=run.renewal, floor=run.floor)
        return
    if not isinstance(source, UrlTable):
        raise SettingError("engine", run.engine, "native for any source but urls")
    plain = not run.renewal.asked and run.floor == Floor()
    allowed = "native with --parent, --opt-out, --retry-failed, --purge or --minimum-success"
    require(plain, "engine", run.engine, allowed)
    refresh_with_img2dataset(source, folder, run.options, run.workers, name)


if __name__ == "__main__":
    run_job(PRESETS, main)
