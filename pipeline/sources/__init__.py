"""Raw rows: url tables, folders of images, WebDataset tars, split files, COCO's and LVIS's annotations, the drawn
world, the Tux Paint stamps and scenes of them.

Each source is one frozen dataclass in a module of its own; a dataset card names it by ``kind``.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

from pipeline.config import from_plain, require
from pipeline.sources.source import Source

KINDS = {
    "coco": ("pipeline.sources.coco", "Coco"),
    "urls": ("pipeline.sources.url_table", "UrlTable"),
    "folder": ("pipeline.sources.folder", "ImageFolder"),
    "webdataset": ("pipeline.sources.webdataset", "WebDatasetTars"),
    "drawn": ("pipeline.sources.drawn.source", "Drawn"),
    "hugging-face": ("pipeline.sources.hugging_face", "HuggingFaceParquet"),
    "picked": ("pipeline.sources.picked", "Picked"),
    "split-file": ("pipeline.sources.split_file", "SplitFile"),
    "stamps": ("pipeline.sources.stamps", "TuxPaintStamps"),
    "stamp-scenes": ("pipeline.sources.stamp_scenes", "StampScenes"),
}


def open_source(options: Mapping[str, Any]) -> Source:
    """The source that a card's ``source`` mapping describes: its ``kind`` and that source's options.

    Raises:
        SettingError: an unknown kind, or an option that the source does not have or refuses.
    """
    kind = options.get("kind")
    require(kind in KINDS, "source.kind", kind, "one of " + ", ".join(KINDS))
    module, name = KINDS[str(kind)]
    # Imported by name, so that reading a url table does not load the drawing code.
    source = getattr(import_module(module), name)
    plain = {key: value for key, value in options.items() if key != "kind"}
    return cast(Source, from_plain(source, plain, f"source {kind}"))
