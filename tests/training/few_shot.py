"""A tiny CLIP and images that are mostly red, green or blue, for the tests of adaptation."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

from pipeline.evaluation.zero_shot import classifier
from pipeline.models.adapters.adapter import FrozenClip, adapter_class, adapter_names
from pipeline.models.clip import Clip, Config
from pipeline.training.adapt import Adapted, Labelled, adapt
from pipeline.training.adapt_recipes import AdaptRecipe, paper_config, paper_recipe

NAMES = ("red", "green", "blue")
TEMPLATES = ("a photo of a {}.",)
# Those of images; tests/models/adapters/test_pointclip.py trains on views of clouds.
METHODS = [name for name in adapter_names() if adapter_class(name).reads != "views"]
LEARNERS = [name for name in METHODS if adapter_class(name).learns]
MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 24, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


def make_clip(folder: Path, **vision: Any) -> FrozenClip:
    """Random weights, always the same ones."""
    model = {**MODEL, "vision_cfg": vision or MODEL["vision_cfg"]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    torch.manual_seed(0)
    return FrozenClip(Clip(Config(architecture=f"local-dir:{folder}")), classifier)


def make_images(clip: FrozenClip, count: int, seed: int, views: int = 1, classes: int = 3) -> Labelled:
    """Noise with more red, green or blue in it, and raw features of each image, a little apart in each view."""
    random = np.random.default_rng(seed)
    labels = torch.arange(count) % classes
    pixels = random.integers(0, 120, (count, 32, 32, 3))
    pixels[np.arange(count), :, :, labels.numpy() % 3] += 90
    files = [simplejpeg.encode_jpeg(one.astype(np.uint8)) for one in pixels]
    still = clip.method.transforms(train=False)
    features = clip.raw_features(torch.stack([still.read(file) for file in files]))
    noise = 0.1 * torch.randn(count, views, features.shape[1], generator=torch.Generator().manual_seed(seed))
    return Labelled(labels=labels, features=features[:, None] + noise, images=files)


@pytest.fixture(scope="module", name="clip")
def clip_fixture(tmp_path_factory: pytest.TempPathFactory) -> FrozenClip:
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module", name="sets")
def sets_fixture(clip: FrozenClip) -> tuple[Labelled, Labelled, Labelled]:
    """Shots with three views, validation and test images."""
    return make_images(clip, 12, 0, views=3), make_images(clip, 9, 1), make_images(clip, 30, 2)


def small(method: str) -> Any:
    config = paper_config(method)
    shallow = {name: 2 for name in ("depth", "text_depth", "vision_depth") if hasattr(config, name)}
    return replace(config, **shallow)


def short(method: str, **changes: Any) -> AdaptRecipe | None:
    recipe = paper_recipe(method, 4)
    values = {"epochs": 3, "batch_size": min(recipe.batch_size, 4), "learning_rate": 0.01} if recipe else {}
    return replace(recipe, **{**values, **changes}) if recipe else None


def run(clip: FrozenClip, method: str, train: Labelled, validation: Labelled, **more: Any) -> Adapted:
    recipe = more.pop("recipe", None) or short(method)
    return adapt(method, small(method), recipe, clip, NAMES, TEMPLATES, train, validation, **{"seed": 1, **more})
