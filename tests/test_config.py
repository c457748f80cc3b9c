"""Configs through every door: JSON, YAML, flattened, fingerprint, command line."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from pipeline.config import (
    chosen_preset,
    differences,
    fingerprint,
    flatten,
    from_json,
    from_plain,
    from_yaml,
    require,
    run_job,
    to_json,
    writable_file,
    writable_folder,
)
from pipeline.dataset import Card, card_names, load_card
from pipeline.errors import ClipmillError, DataError, SettingError, unreadable
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
        (
            '{"optimizer": {"lrr": 1}}',
            r"^config: optimizer\.lrr: unknown key, expected a key of Optimizer: betas, lr \(did",
        ),
        ('{"nmae": 1}', r"^config: nmae: unknown key, expected a key of Run: name, .*\(did you mean name\?\)$"),
        ('{"precision": "fp7"}', "^config: precision: got 'fp7', expected 'bf16' or 'fp32'$"),
        ('{"steps": "many"}', "^config: steps: got 'many', expected a valid integer"),
        ('{"optimizer": {"lr": -1}}', r"^config: optimizer\.lr: got -1.0, expected more than 0$"),
        ("{", "well-formed JSON"),
        ("[]", "config"),
    ],
)
def test_wrong_json_is_one_sentence_with_the_path(text: str, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        from_json(Run, text)


@dataclass(frozen=True, kw_only=True)
class Several:
    runs: tuple[Run, ...] = ()
    named: Mapping[str, Run] = field(default_factory=dict)
    either: Run | Optimizer | None = None
    maybe: Optimizer | None = None


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"runs": [{}, {"stps": 1}]}, r"runs\.1\.stps: unknown key, expected a key of Run: .*\(did you mean steps\?\)"),
        ({"named": {"a": {"optimizer": {"beta": 1}}}}, "named.a.optimizer.beta: .* a key of Optimizer: .*mean betas"),
        ({"maybe": {"rate": 1}}, r"maybe\.rate: unknown key, expected a key of Optimizer: betas, lr$"),
        ({"either": {"precison": 1}}, "a key of Run: .*did you mean precision"),
    ],
)
def test_an_unknown_key_is_explained_by_its_own_class(plain: Any, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        from_plain(Several, plain)


@dataclass(frozen=True, kw_only=True)
class Needed:
    name: str


def test_a_missing_key_is_called_missing() -> None:
    with pytest.raises(SettingError, match=r"^config: name: missing$"):
        from_plain(Needed, {})
    with pytest.raises(
        SettingError, match=r"^config: nmae: unknown key, expected a key of Needed: name \(did you mean"
    ):
        from_plain(Needed, {"nmae": "a"})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-1, "steps: got -1, expected 1 or more"),
        ("", "steps: nothing given, expected 1 or more"),
        (None, "steps: nothing given, expected 1 or more"),
        ((), "steps: nothing given, expected 1 or more"),
        (0, "steps: got 0, expected 1 or more"),
        (False, "steps: got False, expected 1 or more"),
    ],
)
def test_a_setting_error_is_a_sentence(value: object, said: str) -> None:
    assert str(SettingError("steps", value, "1 or more")) == said


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Each with the reason, by the errors that Python itself raises."""
    (tmp_path / "latin").write_bytes(b"\xe9")
    found = []
    for name in ("none", "", "latin"):
        try:
            (tmp_path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            found.append(str(unreadable("url_list", name, "a table", error)))
    assert found == [
        "url_list: no such file or folder: 'none'",
        "url_list: '' is a folder, expected a table",
        "url_list: 'latin' is not UTF-8 text, expected a table",
    ]


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
    changed = called(monkeypatch, "--from", str(path), "--lr", "0.25", "--steps", "7")
    assert changed == Run(name="saved", steps=7, optimizer=Optimizer(lr=0.25))


@dataclass(frozen=True, kw_only=True)
class MovedRun(Run):
    moved_keys: ClassVar[Mapping[str, str]] = {"rates": "optimizer", "speed": "options.inner.speed"}


@pytest.mark.parametrize(
    ("saved", "found"),
    [
        ({"rates": {"lr": 0.5}}, MovedRun(optimizer=Optimizer(lr=0.5))),
        ({"speed": 3}, MovedRun(options={"inner": {"speed": 3}})),
        ({"optimizer": {"lr": 0.5}}, MovedRun(optimizer=Optimizer(lr=0.5))),
        ({"rates": {"lr": 0.5}, "optimizer": {"lr": 0.25}}, "rates"),
        ({"speed": 3, "options": 7}, "options: got 7"),
        (["rates"], "run.json"),
    ],
)
def test_keys_of_older_runs_are_moved(
    saved: Any, found: MovedRun | str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    path, seen = tmp_path / "run.json", []
    path.write_text(json.dumps(saved))
    monkeypatch.setattr(sys, "argv", ["job.py", "--from", str(path)])
    if isinstance(found, MovedRun):
        run_job({"small": ("Small.", MovedRun())}, seen.append)
        assert seen == [found]
        return
    with pytest.raises(SystemExit):
        run_job({"small": ("Small.", MovedRun())}, seen.append)
    assert found in capsys.readouterr().err


def test_the_preset_of_the_command_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = called(monkeypatch, "named", "--lr", "0.5")
    assert chosen_preset() == ("named", Run(name="n"))
    assert differences(run, Run(name="n")) == {"optimizer.lr": "0.5"}
    path = tmp_path / "run.json"
    path.write_text(to_json(run))
    called(monkeypatch, "--from", str(path))
    assert chosen_preset() is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["smal"], "preset: got 'smal', expected one of small, named"),
        (["smal"], "(did you mean small?)"),
        (["--from"], "--from: nothing given, expected the config.json of an earlier run"),
        (["--from", "/missing.json"], "--from: no such file or folder: '/missing.json'"),
        (["small", "--lr", "-1"], "error: --lr: got -1.0, expected more than 0"),
        (["small", "--lr=-1"], "error: --lr: got -1.0, expected more than 0"),
    ],
)
def test_a_wrong_setting_exits_with_2_and_one_sentence(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        called(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and "Traceback" not in error


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_job_with_what_the_same_command_does(
    sent: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = []

    def main(_: Run) -> None:
        try:
            signal.raise_signal(sent)
            time.sleep(10)
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    # A shell that starts the tests in the background lets them ignore SIGINT.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(sys, "argv", ["job.py", "small"])
    with pytest.raises(SystemExit) as stopped:
        run_job(PRESETS, main, "the same command goes on")
    signal.signal(signal.SIGTERM, before)
    signal.signal(signal.SIGINT, ignored)
    assert stopped.value.code == code and cleaned
    assert capsys.readouterr().err == "stopped; the same command goes on\n"


@pytest.mark.parametrize("arguments", ["'small', '--help'", "'small'"])
def test_a_reader_that_leaves_is_no_error(arguments: str) -> None:
    """As in ``--help | head -1``."""
    code = (
        "import dataclasses, sys; sys.argv = ['job.py', " + arguments + "]\n"
        "@dataclasses.dataclass\n"
        "class Run:\n    steps: int = 1\n"
        "from pipeline.config import run_job\n"
        "run_job({'small': ('Small.', Run())}, lambda run: print('x' * 1_000_000))\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        assert job.stdout is not None and job.stderr is not None
        job.stdout.close()
        assert job.stderr.read() == b""
        assert job.wait() == 141


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("a")
    with pytest.raises(SettingError, match=r"^output: '.*list\.csv' is a file, expected a folder$"):
        writable_folder("output", str(path))
    with pytest.raises(SettingError, match=r"^output: '.*list\.csv' is a file, expected"):
        writable_folder("output", str(path / "below" / "it"))
    assert writable_file("output", str(path)) == str(path)
    with pytest.raises(SettingError, match="^output: .* is a folder, expected a file$"):
        writable_file("output", str(tmp_path))


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
    with pytest.raises(SettingError, match="card: got 'no_such_card', expected a YAML file or one of"):
        load_card("no_such_card")
    with pytest.raises(SettingError, match=r"\(did you mean drawn_shapes\?\)"):
        load_card("drawn_shape")
    with pytest.raises(SettingError, match="^card: no such file or folder: 'none.yaml'$"):
        load_card("none.yaml")


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
