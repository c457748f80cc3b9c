#!/usr/bin/env python
"""Convert a data set to WebDataset shards and publish a snapshot of it.

    ray job submit --working-dir . -- python jobs/refresh_dataset.py urls --url-list s3://bucket/list.parquet \
        --url-col url --caption-col caption --output-folder s3://bucket/cc3m --image-size 256 --resize-mode border

    python jobs/refresh_dataset.py urls … --parent latest --opt-out s3://bucket/opt-out.txt     # what has changed since

The first argument names the source: one of pipeline/sources with a summary (urls, folder, webdataset, hugging-face,
coco, drawn, ...), or card for a card of datasets/:

    python jobs/refresh_dataset.py card esc50 --source-options folder=ESC-50-master --output-folder data/esc50

The same command resumes. Options and layout are those of img2dataset where it has them.
"""

import getpass
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass, replace
from typing import Any, ClassVar, Literal

import tyro
import yaml

from pipeline.codecs import codec_names, codec_of
from pipeline.codecs.options import MediaOptions
from pipeline.config import require, run_job, writable_folder
from pipeline.dataset import load_card
from pipeline.errors import SettingError
from pipeline.shards.storage import Folder
from pipeline.sources import open_source, source_classes
from pipeline.sources.source import Source
from pipeline.sources.urls import UrlTable
from pipeline.stages.refresh.img2dataset_engine import refresh_with_img2dataset
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.progress import Floor
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.refresh.settings import Renewal
from pipeline.stages.shard_tasks import Workers

SMOKE_FOLDER = f"{tempfile.gettempdir()}/clipmill-smoke-{getpass.getuser()}/drawn"


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """Options of every refresh."""

    # Before there were other media.
    moved_keys: ClassVar[Mapping[str, str]] = {"options.images": "options.media.image"}

    output_folder: str
    """Output folder for shards and snapshots: a path or any fsspec URI."""
    engine: Literal["native", "img2dataset"] = "native"
    """Download engine: native, or the img2dataset package (urls only)."""
    options: ShardOptions = field(default_factory=ShardOptions)
    workers: Workers = field(default_factory=Workers)
    renewal: Renewal = field(default_factory=Renewal)
    floor: Floor = field(default_factory=Floor)


@dataclass(frozen=True, kw_only=True)
class FromCard(Refresh):
    """Read the source of a dataset card."""

    card: tyro.conf.Positional[str]
    """Name of a card in datasets/, or the path of a YAML file."""
    source_options: tuple[str, ...] = ()
    """Options of the source in place of the card's, each NAME=VALUE with the value in YAML: `folder=ESC-50-master`,
    `"folds=[1, 2]"`."""

    def opened(self) -> Source:
        """The card's source.

        Raises:
            SettingError: an entry that is not NAME=VALUE, or a wrong option of the source.
        """
        return open_source({**load_card(self.card).source, **dict(map(_assigned, self.source_options))})


def _assigned(entry: str) -> tuple[str, Any]:
    name, given, value = entry.partition("=")
    allowed = "NAME=VALUE, the value in YAML"
    require(bool(name and given) and name != "kind", "source_options", entry, allowed)
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingError("source_options", entry, allowed) from error


def refresh_of(kind: str, **settings: Any) -> Refresh:
    """A refresh from a source of ``kind``; required options stay open. ``settings`` are the source's."""
    made = SOURCES[kind]
    open_fields = {one.name: tyro.MISSING for one in fields(made) if one.default is one.default_factory is MISSING}
    media = {medium: codec_of(medium).options(**getattr(made, f"{medium}_options", {})) for medium in codec_names()}
    return KINDS[kind](
        source=made(**{**open_fields, **settings}),
        output_folder=tyro.MISSING,
        options=ShardOptions(media=MediaOptions(**media)),
    )


SOURCES: dict[str, Any] = {kind: made for kind, made in source_classes().items() if hasattr(made, "summary")}
# One class per source, so that the command line and --from know its fields.
KINDS: dict[str, Any] = {
    kind: make_dataclass(
        f"Refresh{made.__name__}",
        [("source", made)],
        bases=(Refresh,),
        namespace={"__doc__": made.summary, "__module__": __name__},
        frozen=True,
        kw_only=True,
    )
    for kind, made in SOURCES.items()
}
PRESETS: dict[str, tuple[str, Refresh]] = {
    **{kind: (made.summary, refresh_of(kind)) for kind, made in SOURCES.items()},
    "card": ("The source of a dataset card.", FromCard(card=tyro.MISSING, output_folder=tyro.MISSING)),
    "smoke": (
        "Sixty-four drawn samples into a temporary folder, in this process.",
        replace(
            refresh_of("drawn", samples=64, size=64), output_folder=SMOKE_FOLDER, workers=Workers(processes_count=0)
        ),
    ),
}


def main(run: Refresh) -> None:
    """Wire source, folder and engine."""
    folder = Folder(writable_folder("output_folder", run.output_folder))
    source: Source = run.opened() if isinstance(run, FromCard) else run.source  # type: ignore[attr-defined]
    own = getattr(source, "classes_of", None) or None
    name = load_card(run.card).name if isinstance(run, FromCard) else own
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
    run_job(PRESETS, main, "the same command goes on and keeps the finished shards")
