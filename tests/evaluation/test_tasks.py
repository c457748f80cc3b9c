"""Kinds of evaluation are found by name, and a set brings its own options."""

import io
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

import pipeline.evaluation.tasks
from pipeline.config import from_json, to_json
from pipeline.errors import SettingError
from pipeline.evaluation.report import table
from pipeline.evaluation.showcase import model_figures, snapshot_figure
from pipeline.evaluation.suite import Evaluations, evaluate, evaluations_class, own_options
from pipeline.shards.snapshot import Snapshot

MakeSnapshot = Callable[..., Snapshot]
MakeRow = Callable[..., dict[str, bytes]]

COUNTING = """
from dataclasses import dataclass
from matplotlib.figure import Figure
from pipeline.evaluation.data import evaluation_batches
from pipeline.evaluation.task import SAMPLES, Column, Report, Task, option

@dataclass(frozen=True, kw_only=True)
class Config:
    word: str = option("a", "counted_word", "Word that is counted.")
    least: int = option(1)

class WordReader:
    fields = ("txt",)
    def read(self, sample, at=None):
        return {"words": sample.fields["txt"].decode().split()}
    def collate(self, rows):
        return {"words": [row["words"] for row in rows]}

class Counting(Task):
    report = Report("counting", "counting", (Column("share", "with it"), SAMPLES))
    help = "Sets whose words are counted."
    options = Config
    def check(self, model, one):
        pass
    def prepare(self, config, data, name):
        return config
    def run(self, model, one, reading, cache):
        rows = [words for batch in evaluation_batches(one.samples(), [WordReader()], 2, 1) for words in batch["words"]]
        found = [words.count(one.ready.word) >= one.ready.least for words in rows]
        return {"share": sum(found) / len(found), "samples": float(len(found))}
    def figures(self, model, one, title):
        return {"words": Figure()}
"""


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A new kind: one file in a folder of tasks."""
    folder = tmp_path / "kinds"
    folder.mkdir()
    (folder / "counting.py").write_text(COUNTING)
    monkeypatch.setattr(pipeline.evaluation.tasks, "__path__", [*pipeline.evaluation.tasks.__path__, str(folder)])
    yield
    sys.modules.pop("pipeline.evaluation.tasks.counting", None)
    if hasattr(pipeline.evaluation.tasks, "counting"):
        monkeypatch.delattr(pipeline.evaluation.tasks, "counting")


def test_a_new_kind_is_one_file(counting: None, make_snapshot: MakeSnapshot) -> None:
    """Its flag, options, columns and figure; its samples have no image."""
    folder = make_snapshot([{"txt": text} for text in (b"a b", b"a a", b"b b", b"a")]).folder
    made: Any = evaluations_class()
    arguments = ["--counting", f"plain={folder}", f"twice={folder},least=2", f"b={folder},word=b,samples=2"]
    prepared = tyro.cli(made, args=[*arguments, "--counted-word", "a"]).prepare()
    metrics = evaluate(object(), prepared)
    assert [metrics[f"counting/{name}/share"] for name in ("plain", "twice", "b")] == [0.75, 0.25, 1.0]
    assert metrics["counting/b/samples"] == 2
    head, first = table(metrics).splitlines()[:2]
    assert head.split() == ["counting", "with", "it", "samples"] and first.split() == ["plain", "75.00", "%", "4"]
    assert list(model_figures(object(), prepared)) == ["words/plain", "words/twice", "words/b"]
    with pytest.raises(SettingError, match=r"one of word, least, samples"):
        made(counting=(f"{folder},many=2",))


def test_one_run_mixes_classes_and_prompts(
    row: MakeRow, colour_model: Any, make_snapshot: MakeSnapshot, tmp_path: Path
) -> None:
    folder = make_snapshot([row(name) for name in ("red", "blue", "red", "blue")]).folder
    (tmp_path / "two.txt").write_text("red\nblue\n")
    (tmp_path / "three.txt").write_text("red\ngreen\nblue\n")
    sets = (
        f"two={folder},classes={tmp_path / 'two.txt'},templates=none",
        f"three={folder},samples=2",
    )
    prepared = Evaluations(zero_shot=sets, classes=str(tmp_path / "three.txt")).prepare()
    assert [one.ready.templates for one in prepared.sets] == [("{}",), ("a photo of a {}.",)]
    found = evaluate(colour_model, prepared)
    assert found["zeroshot/two/chance"] == 1 / 2 and found["zeroshot/three/chance"] == pytest.approx(1 / 3)
    assert found["zeroshot/two/samples"] == 4 and found["zeroshot/three/samples"] == 2


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"retrieval": ("drawn_val",), "classes": "f.txt"}, r"classes: got 'f.txt'.*no set of --zero-shot or"),
        ({"zero_shot": ("drawn_shapes",), "detection_words": "drawn_novel"}, "detection_words.*--detection"),
        ({"zero_shot": ("drawn_shapes,templates=none",), "templates": "imagenet"}, "templates"),
        ({"zero_shot": ("drawn_shapes,words=a",)}, r"words=a.*one of .*classes, templates, label, .*samples"),
        ({"retrieval": ("drawn_val,samples=none",)}, "samples.*1 or more"),
        ({"retrieval": ("drawn_val,samples=0",)}, "samples.*1 or more"),
        ({"retrieval": ("drawn_val,caption=title",)}, "caption"),
    ],
)
def test_settings_that_no_set_takes_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        Evaluations(**settings).prepare()


def test_only_a_known_shape_of_option_is_cut_off() -> None:
    assert own_options("it=s3://b/a,b@1,templates=none") == ("it=s3://b/a,b@1", {"templates": "none"})
    assert own_options("drawn_val,caption=json:a=b,c") == ("drawn_val", {"caption": "json:a=b,c"})


def test_the_settings_are_kept_as_before() -> None:
    """Runs of before the tasks wrote the same keys."""
    settings = Evaluations(zero_shot=("a", "b=c,templates=none"), detection_words="x", evaluation_samples=3)
    assert from_json(Evaluations, to_json(settings)) == settings == pickle.loads(pickle.dumps(settings))
    assert {"zero_shot", "retrieval", "classification", "detection", "classes", "templates", "label"} <= set(
        json.loads(to_json(settings))
    )


def test_help_says_what_each_flag_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(Evaluations, args=["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("--zero-shot", "Retrieval sets", "Words to detect", "Samples per batch of the encoder", "80 prompts"):
        assert words in text


def test_samples_without_images_are_shown_as_a_table(make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot([{"txt": b"a $sound$", "json": b'{"a": 1}', "wav": b"RIFF"}, {"txt": b"two"}])
    figure = snapshot_figure(snapshot)
    figure.savefig(io.BytesIO(), format="png")
    (drawn,) = figure.axes[0].tables
    shown = {cell.get_text().get_text() for cell in drawn.get_celld().values()}
    assert {"a $sound$", "two", "4 bytes", "-", "wav"} <= shown
