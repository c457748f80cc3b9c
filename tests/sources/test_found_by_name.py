"""Sources are found by the names of their modules; the refresh job has a preset for each source with a summary."""

import dataclasses
import json
import sys
import tarfile
from pathlib import Path

import pytest

import pipeline.sources
from jobs.refresh_dataset import PRESETS, Refresh, refresh_of
from pipeline.config import from_json, to_json
from pipeline.errors import SettingError
from pipeline.sources import open_source, source_class, source_classes
from pipeline.sources.drawn.source import Drawn
from pipeline.sources.urls import UrlTable
from tests.jobs.conftest import Type, job  # noqa: F401  (the fixture that runs jobs)

KINDS = (
    "class-masks clips coco depth-maps drawn flickr30k-entities folder glip-tsv hdf5-points hugging-face label-maps "
    "mdetr nyu-depth odvg picked questions sound-table split-file stamp-scenes stamps stored urls video-sets webdataset"
).split()

NEW = '''
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """No rows."""

    kind: ClassVar[str] = "nothing-here"
    summary: ClassVar[str] = "Nothing at all."
    times: int = 1
'''


def test_every_source_is_found_and_helpers_are_none() -> None:
    assert [*source_classes()] == KINDS
    assert source_class("urls") is UrlTable and source_class("drawn") is Drawn
    assert open_source({"kind": "drawn", "samples": 3}) == Drawn(samples=3)


@pytest.mark.parametrize("kind", ["source", "stamp-classes", "coco-annotations", "url_table", "os.path", "", "../urls"])
def test_other_names_are_refused_with_the_kinds_there_are(kind: str) -> None:
    with pytest.raises(SettingError, match="one of class-masks, clips, coco, depth-maps, drawn, .*webdataset"):
        open_source({"kind": kind})


def test_one_file_makes_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nothing_here.py").write_text(NEW)
    monkeypatch.setattr(pipeline.sources, "__path__", [*pipeline.sources.__path__, str(tmp_path)])
    assert dataclasses.asdict(open_source({"kind": "nothing-here", "times": 2})) == {"times": 2}
    assert "nothing-here" in source_classes()
    del sys.modules["pipeline.sources.nothing_here"]


def test_presets_come_from_the_sources() -> None:
    named = [kind for kind, made in source_classes().items() if hasattr(made, "summary")]
    assert [*PRESETS] == [*named, "card", "smoke"]
    modes = {kind: run.options.media.image.resize_mode for kind, (_, run) in PRESETS.items() if kind in named}
    kept = {kind for kind, mode in modes.items() if mode == "no"}
    kinds = {"class-masks", "coco", "drawn", "flickr30k-entities", "glip-tsv", "label-maps", "mdetr", "odvg"}
    kinds |= {"depth-maps", "nyu-depth", "questions", "stamp-scenes", "webdataset"}
    assert kept == kinds


def test_a_refresh_can_be_run_again_from_its_json() -> None:
    run = dataclasses.replace(refresh_of("urls", url_list="a.csv"), output_folder="out")
    again = from_json(type(run), to_json(run))
    assert again == run and isinstance(again, Refresh)
    plain = json.loads(to_json(run))
    plain["source"]["samples"] = 3
    with pytest.raises(SettingError, match="samples"):
        from_json(type(run), json.dumps(plain))


def test_from_runs_what_an_earlier_run_wrote(job: Type, tmp_path: Path) -> None:  # noqa: F811
    smoke = dataclasses.replace(PRESETS["smoke"][1], output_folder=str(tmp_path / "set"))
    (tmp_path / "run.json").write_text(to_json(smoke))
    assert job("refresh_dataset", "--from", str(tmp_path / "run.json")) == 0
    assert (tmp_path / "set" / "00000.tar").exists()


def test_from_reads_the_options_of_images_at_their_old_place(job: Type, tmp_path: Path) -> None:  # noqa: F811
    smoke = dataclasses.replace(PRESETS["smoke"][1], output_folder=str(tmp_path / "set"))
    old = json.loads(to_json(smoke))
    old["options"]["images"] = {
        **old["options"].pop("media")["image"],
        "encode_format": "png",
        "encode_quality": 9,
        "keep_bytes": False,
    }
    (tmp_path / "run.json").write_text(json.dumps(old))
    assert job("refresh_dataset", "--from", str(tmp_path / "run.json")) == 0
    with tarfile.open(tmp_path / "set" / "00000.tar") as tar:
        assert sum(name.endswith(".png") for name in tar.getnames()) == 64
