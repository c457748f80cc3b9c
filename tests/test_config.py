"""Configs through every door: JSON, YAML, flattened, fingerprint, command line."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from pipeline.config import (
    fingerprint,
    flatten,
    from_json,
    from_yaml,
    require,
    run_job,
    to_json,
    writable_folder,
)
from pipeline.dataset import Card, card_names, load_card
from pipeline.errors import ClipmillError, DataError, SettingError
from pipeline.shards.storage import Folder


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", self.lr, "more than 0")


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str = "a"
    steps: int | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    optimizer: Optimizer = field(default_factory=Optimizer)
    options: Mapping[str, Any] = field(default_factory=dict)


def test_json_round_trip_is_equal() -> None:
    run = Run(name="café", steps=3, optimizer=Optimizer(lr=1e-4), options={"a": [1, 2]})
    assert from_json(Run, to_json(run)) == run


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"optimizer": {"lrr": 1}}', r"optimizer\.lrr.*allowed: one of"),
        ('{"nmae": 1}', r"nmae.*name, optimizer"),
        ('{"precision": "fp7"}', "precision.*'bf16' or 'fp32'"),
        ('{"steps": "many"}', "steps"),
        ('{"optimizer": {"lr": -1}}', "lr"),
        ("{", "JSON"),
        ("[]", "config"),
    ],
)
def test_wrong_json_is_one_sentence_with_the_path(text: str, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        from_json(Run, text)


def test_yaml_numbers_that_yaml_reads_as_text_become_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {lr: 1e-4}\n")
    assert from_yaml(Run, path).optimizer.lr == 1e-4
    for content in ("a: [", "!!python/object/apply:os.system ['true']", "- 1"):
        path.write_text(content)
        with pytest.raises(SettingError):
            from_yaml(Run, path)
    with pytest.raises(SettingError, match=r"missing\.yaml"):
        from_yaml(Run, tmp_path / "missing.yaml")


def test_flatten_names_by_path() -> None:
    flat = flatten(Run(options={"a": 1}))
    assert flat["optimizer.lr"] == 1e-3 and flat["optimizer.betas"] == "[0.9, 0.98]" and flat["options"] == '{"a": 1}'


def test_fingerprints_differ_only_where_it_matters() -> None:
    assert fingerprint(Run()) == fingerprint(Run()) != fingerprint(Run(optimizer=Optimizer(lr=2e-3)))
    assert fingerprint(Run(name="b"), exclude=["name"]) == fingerprint(Run(), exclude=["name"])
    other = Run(optimizer=Optimizer(lr=2e-3))
    assert fingerprint(other, exclude=["optimizer"]) == fingerprint(Run(), exclude=["optimizer"])


def test_a_relative_output_inside_a_ray_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(writable_folder("output_folder", "out")).is_absolute()
    assert writable_folder("output_folder", "s3://bucket/x") == "s3://bucket/x"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(SettingError, match="absolute"):
        writable_folder("output_folder", "out")
    with pytest.raises(SettingError):
        writable_folder("output_folder", "")


PRESETS: Mapping[str, tuple[str, Run]] = {"small": ("A small one.", Run()), "named": ("With a name.", Run(name="n"))}


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str, main: Any = None) -> Run:
    seen: list[Run] = []
    monkeypatch.setattr(sys, "argv", ["job.py", *arguments])
    run_job(PRESETS, main or seen.append)
    return seen[0]


def test_presets_flags_and_saved_runs_reach_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert called(monkeypatch, "named", "--lr", "0.5") == Run(name="n", optimizer=Optimizer(lr=0.5))
    path = tmp_path / "run.json"
    path.write_text(to_json(Run(name="saved")))
    assert called(monkeypatch, "--from", str(path)) == Run(name="saved")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["smal"], "preset: 'smal' is not allowed; allowed: one of small, named"),
        (["--from", "/missing.json"], "--from"),
        (["small", "--lr", "-1"], "lr"),
    ],
)
def test_a_wrong_setting_exits_with_2_and_one_sentence(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        called(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and "Traceback" not in error


def test_broken_data_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: Run) -> None:
        raise DataError("x.tar is broken")

    with pytest.raises(SystemExit) as stopped:
        called(monkeypatch, "small", main=main)
    assert stopped.value.code == 1 and capsys.readouterr().err == "error: x.tar is broken\n"


def test_errors_survive_the_way_between_processes() -> None:
    code = (
        "import pickle; from pipeline.errors import SampleError, SettingError\n"
        "one = pickle.loads(pickle.dumps(SettingError('f', 3, 'x')))\n"
        "assert (one.field, one.value, one.allowed) == ('f', 3, 'x')\n"
        "two = pickle.loads(pickle.dumps(SampleError('failed_to_resize', 'decode', 'm', 404, 2)))\n"
        "assert (two.status, two.error_class, two.message, two.http_status, two.attempts)"
        " == ('failed_to_resize', 'decode', 'm', 404, 2)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_card_is_found_by_name_or_path_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        'name: mine\ntitle: Mine\nsource: {kind: folder, folder: x}\ntemplates: ["a {}"]\nclasses: [cat, dog]\n'
    )
    card = load_card(str(path))
    assert card == Card(
        name="mine",
        title="Mine",
        source={"kind": "folder", "folder": "x"},
        templates=("a {}",),
        classes=("cat", "dog"),
    )
    for content in (
        "name: other\ntitle: x\n",
        "name: mine\ntitle: x\nkey: y\n",
        "name: mine\ntitle: x\ntemplates: [a]\n",
    ):
        path.write_text(content)
        with pytest.raises(SettingError):
            load_card(str(path))
    with pytest.raises(SettingError, match="one of"):
        load_card("no_such_card")


@pytest.mark.parametrize("name", card_names())
def test_every_card_of_the_project_loads(name: str) -> None:
    assert load_card(name).title


COCO_80 = (
    *("person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign").split(),
    *("parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag").split(),
    *("tie suitcase frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard").split(),
    *("tennis_racket bottle wine_glass cup fork knife spoon bowl banana apple sandwich orange broccoli carrot").split(),
    *("hot_dog pizza donut cake chair couch potted_plant bed dining_table toilet tv laptop mouse remote").split(),
    *("keyboard cell_phone microwave oven toaster sink refrigerator book clock vase scissors teddy_bear").split(),
    *("hair_drier toothbrush").split(),
)
NOVEL = (4, 5, 15, 16, 19, 20, 25, 27, 31, 36, 41, 43, 55, 57, 66, 71, 76)  # places among the 80
UNUSED = (9, 10, 11, 12, 32, 34, 35, 38, 40, 52, 58, 60, 67, 77, 78)


def test_the_split_of_coco_is_the_published_one() -> None:
    names = [name.replace("_", " ") for name in COCO_80]
    everything = load_card("coco_ovd_all")
    used = [name for place, name in enumerate(names) if place not in UNUSED]
    assert len(names) == 80 and everything.classes == tuple(used) and len(used) == 65
    assert everything.novel == load_card("coco_ovd_novel").classes == tuple(names[place] for place in NOVEL)
    base = load_card("coco_ovd_base").classes
    assert len(base) == 48 and len(everything.novel) == 17
    assert set(base) | set(everything.novel) == set(everything.classes) and not set(base) & set(everything.novel)
    for name in ("coco_ovd_base", "coco_ovd_novel", "coco_ovd_all"):  # images without an object are not in the split
        assert load_card(name).source["with_objects"] is True


def test_the_drawn_shapes_are_base_or_novel() -> None:
    base, novel, everything = (load_card(name) for name in ("drawn_base", "drawn_novel", "drawn_val"))
    assert (len(base.classes), len(novel.classes)) == (18, 6)
    assert everything.novel == load_card("drawn").novel == novel.classes
    assert set(everything.classes) == {*base.classes, *novel.classes}


def test_novel_classes_are_classes() -> None:
    with pytest.raises(SettingError, match="novel"):
        Card(name="x", title="x", classes=("cat", "dog"), novel=("cow",))


DEEP = ["[" * 1_100 + "]" * 1_100, '[{"a":' * 600 + "1" + "}]" * 600]


@pytest.mark.parametrize("text", DEEP, ids=["lists", "objects"])
def test_files_that_are_nested_deep_are_a_sentence(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of settings, cards, class names, splits and lists of entries: what a user names on the command line."""
    from pipeline.evaluation.classes import json_of, lines_of
    from pipeline.sources.split_file import SplitFile
    from pipeline.stages.filters.metaclip import read_entries

    for name in ("deep.json", "deep.yaml"):
        (tmp_path / name).write_text(text)
    place = str(tmp_path / "deep.json")
    reads: list[Callable[[], object]] = [
        lambda: from_json(Run, text),
        lambda: from_yaml(Run, tmp_path / "deep.yaml"),
        lambda: json_of("words", place, "a JSON file"),
        lambda: lines_of("classes", place, "a list"),
        lambda: read_entries(place),
        lambda: list(SplitFile(folder=str(tmp_path), split="deep.json").slices(10, Folder(tmp_path))),
    ]
    for read in reads:
        with pytest.raises(ClipmillError) as error:
            read()
        assert "\n" not in str(error.value) and len(str(error.value)) < 700
    monkeypatch.setattr("sys.argv", ["job.py", "--from", place])
    with pytest.raises(SystemExit) as stopped:
        run_job({"paper": ("x", Run())}, lambda _: None)
    assert stopped.value.code == 2
