"""The job that imports released weights: made-up ones become a checkpoint that every job can read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import SettingError
from pipeline.evaluation.models import load_detector
from pipeline.models.glip import Glip
from tests.glip_weights import CONFIG, released
from tests.jobs.conftest import load_job


def test_weights_become_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_job("import_glip")
    state = released(Glip(CONFIG).tokenizer.vocab_size)
    torch.save({"model": state}, tmp_path / "glip.pth")
    config = replace(CONFIG, start_from=str(tmp_path / "glip.pth"), least_score=0.0)
    script["main"](script["ImportGlip"](method=config, output_folder=str(tmp_path / "model")))
    assert capsys.readouterr().out.strip().endswith("model")
    (tmp_path / "glip.pth").unlink()
    detector: Any = load_detector(str(tmp_path / "model"), "cpu")
    assert torch.equal(detector.model.head.token_bias, state["module.rpn.head.bias_lang"])
    assert len(detector.predict([torch.zeros(3, 64, 64, dtype=torch.uint8)], ["star"])[0])


def test_smoke_and_presets(tmp_path: Path) -> None:
    script = load_job("import_glip")
    script["main"](replace(script["PRESETS"]["smoke"][1], output_folder=str(tmp_path / "model")))
    assert isinstance(load_detector(str(tmp_path / "model"), "cpu"), Glip)
    for name, (_, preset) in script["PRESETS"].items():
        if name != "smoke":
            assert preset.method.compat_offsets
            with pytest.raises(SettingError, match="start_from"):
                script["main"](preset)
