"""A small CLIP in float64, and a plain way to run its text tower: whole prompts, padded to the full context."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.evaluation.zero_shot import classifier
from pipeline.models.adapters.adapter import FrozenClip
from pipeline.models.clip import Clip, Config

NAMES = ("dog", "German shepherd", "black-footed ferret", "car", "sea or lake")
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 4},
}


@pytest.fixture(scope="session")
def make_clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FrozenClip]:
    """``make_clip(quick_gelu=True, ...)``: random weights, in double precision for parity."""

    def make(double: bool = True, vision: dict[str, object] | None = None, **more: object) -> FrozenClip:
        folder = tmp_path_factory.mktemp("clip")
        model = {**MODEL, **({"vision_cfg": vision} if vision else {}), **more}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
        torch.manual_seed(0)
        method = Clip(Config(architecture=f"local-dir:{folder}"))
        with torch.no_grad():  # as a trained tower: what is random and small would hide mistakes
            for parameter in method.model.parameters():
                if parameter.ndim >= 2:
                    parameter *= 1.5
        return FrozenClip(method.double() if double else method, classifier)

    return make


@pytest.fixture(scope="session")
def clip(make_clip: Callable[..., FrozenClip]) -> FrozenClip:
    return make_clip(quick_gelu=True)


def plain_features(clip: FrozenClip, prompts: Tensor, ends: Tensor) -> Tensor:
    """Prompts float [C, 77, width] with their ends int64 [C] to features [C, D], as the papers' code does it."""
    model = clip.model
    hidden = model.transformer(prompts + model.positional_embedding, attn_mask=model.attn_mask)
    pooled = model.ln_final(hidden)[torch.arange(len(prompts)), ends]
    return pooled @ model.text_projection


@pytest.fixture
def root() -> Path:
    return Path(__file__).resolve().parents[3]
