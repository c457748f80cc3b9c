"""A small run, and a tracker that remembers."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.loaders.batches import LoaderConfig
from pipeline.models.clip import Clip, Config
from pipeline.models.towers.openclip import CONFIGS
from pipeline.shards.snapshot import Snapshot
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Run


class Remember:
    """A tracker whose numbers can be looked at; ``stop_at`` makes it fail at a step, as a crash would."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.history: dict[int, dict[str, float]] = {}
        self.stop_at = stop_at
        self.closed = 0
        self.files: dict[str, bytes] = {}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.history[step] = dict(metrics)
        if step == self.stop_at:
            raise KeyboardInterrupt

    def log_file(self, name: str, content: bytes) -> None:
        self.files[name] = content

    def flush(self, seconds: float) -> None:
        """Nothing is queued."""

    def close(self) -> None:
        self.closed += 1

    def series(self, name: str) -> dict[int, float]:
        """One metric by step."""
        return {step: metrics[name] for step, metrics in self.history.items() if name in metrics}


@pytest.fixture
def remember() -> type[Remember]:
    return Remember


@pytest.fixture(scope="session")
def dropout_config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The tiny CLIP with patch dropout, so that the random state counts."""
    folder = tmp_path_factory.mktemp("architecture")
    model = json.loads((CONFIGS / "clipmill-tiny.json").read_text())
    model["vision_cfg"]["patch_dropout"] = 0.5
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    return Config(architecture=f"local-dir:{folder}", crop="resized", crop_scale=(0.5, 1.0), flip=0.5)


@pytest.fixture
def tiny_config() -> Config:
    return Clip.smallest()


@pytest.fixture(scope="session")
def data(make_snapshot: Callable[..., Snapshot]) -> Snapshot:
    return make_snapshot((14, 9, 17))


@pytest.fixture
def run(data: Snapshot, tmp_path: Path) -> Callable[..., Run]:
    """``run(steps=12)``: eight samples a step, five steps an epoch, every step logged, a checkpoint every 4."""

    def make(**changes: Any) -> Run:
        settings: dict[str, Any] = {
            "output_folder": str(tmp_path / "run"),
            "data": data.folder,
            "batch_size": 8,
            "lanes": 4,
            "shuffle_block": 6,
            "steps": 10,
            "warmup_steps": 3,
            "optimizer": AdamW(learning_rate=1e-3),
            "log_every_steps": 1,
            "checkpoint_every_steps": 4,
            "loader": LoaderConfig(loader_workers=0),
            **changes,
        }
        return Run(**settings)

    return make
