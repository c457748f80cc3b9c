"""The jobs that make something of checkpoints, as users type them."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.models.clip import Clip
from pipeline.training.checkpoint import Checkpoints, EvaluationRecord, Meta, load_method, write_evaluation
from pipeline.training.optimizer import AdamW, make_optimizer
from tests.jobs.conftest import Type

METRIC = "zeroshot/drawn_shapes/top1"
FEW = ["--zero-shot", "drawn_shapes", "--evaluation-samples", "24", "--metric", METRIC]


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two runs; the second has an average and an evaluation."""
    for number in range(2):
        torch.manual_seed(number)
        method = Clip(Clip.smallest())
        meta = Meta(step=3, samples_seen=24, batch_size=8, lanes=2, seed=0, snapshot="d" * 64)
        saved = Checkpoints(tmp_path / f"run-{number}").save(method, make_optimizer(AdamW(), method), meta)
        write_evaluation(saved, EvaluationRecord(step=3, metrics={METRIC: 0.1 * number}))
    return [str(tmp_path / f"run-{number}") for number in range(2)]


def test_smoke_presets(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("export_model", "smoke") == 0
    assert "preprocessor_config.json" in capsys.readouterr().out
    assert job("average_checkpoints", "smoke") == 0
    assert METRIC in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.name != "data"] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_export_to_a_store(job: Type, runs: list[str], s3: str, tmp_path: Path) -> None:
    import s3fs
    from transformers import CLIPModel

    assert job("export_model", "hugging-face", "--checkpoint", runs[0], "--output", f"{s3}/exported") == 0
    s3fs.S3FileSystem().get(f"{s3}/exported", str(tmp_path / "local"), recursive=True)
    model = CLIPModel.from_pretrained(tmp_path / "local")
    assert model.logit_scale.item() == load_method(runs[0]).logit_scale.item()  # type: ignore[union-attr,operator]
    assert job("export_model", "open-clip", "--checkpoint", runs[0], "--output", f"{s3}/other") == 0
    assert any(name.endswith("open_clip_config.json") for name in s3fs.S3FileSystem().ls(f"{s3}/other"))


def test_averages_are_checkpoints(job: Type, runs: list[str], tmp_path: Path) -> None:
    both = [load_method(run).state_dict()["model.visual.proj"] for run in runs]
    assert job("average_checkpoints", "wise-ft", "--checkpoints", *runs, "--alpha", "0.25", "--output", "wise") == 0
    made = load_method(str(tmp_path / "wise")).state_dict()["model.visual.proj"]
    assert torch.allclose(made, 0.75 * both[0] + 0.25 * both[1])
    assert job("average_checkpoints", "uniform", "--checkpoints", *runs, "--output", "soup") == 0
    made = load_method(str(tmp_path / "soup")).state_dict()["model.visual.proj"]
    assert torch.allclose(made, (both[0] + both[1]) / 2)
    assert job("average_checkpoints", "greedy", "--checkpoints", *runs, "--output", "greedy", *FEW) == 0
    record = json.loads((tmp_path / "greedy" / "average.json").read_text())
    assert next(iter(record["shares"])) == runs[1]  # by the stored metric
    assert record["scores"][runs[0]] == 0.0 and record["scores"][runs[1]] == 0.1
    assert job("export_model", "hugging-face", "--checkpoint", "greedy", "--output", "exported") == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["export_model", "open-clip", "--checkpoint", "RUN"], "output: ''"),
        (["export_model", "open-clip", "--checkpoint", "RUN:ema", "--output", "x"], "has no model_ema.safetensors"),
        (["export_model", "hugging-face", "--checkpoint", "clipmill-small:untrained", "--output", "x"], "of timm"),
        (["average_checkpoints", "uniform", "--checkpoints", "RUN", "--output", "x"], "checkpoints: 1"),
        (["average_checkpoints", "greedy", "--checkpoints", "RUN", "RUN", "--output", "x"], "metric"),
        (
            ["average_checkpoints", "greedy", "--checkpoints", "RUN", "RUN", "--output", "x", "--metric", "nothing"],
            "at least one set",
        ),
        (
            ["average_checkpoints", "uniform", "--checkpoints", "RUN", "clipmill-small:untrained", "--output", "x"],
            "the architecture of",
        ),
    ],
)
def test_wrong_options_are_one_sentence(
    words: list[str], sentence: str, job: Type, runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert job(*[word.replace("RUN", runs[0]) for word in words]) in (1, 2)
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert sentence in error and "Traceback" not in error
