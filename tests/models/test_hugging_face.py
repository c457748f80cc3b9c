"""What is exported for transformers, opened by transformers; and what it cannot express, refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.errors import SettingError
from pipeline.models.clip import Clip, Config
from pipeline.models.towers import hugging_face, openclip
from pipeline.models.towers.openclip import CONFIGS
from pipeline.shards.storage import Folder
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.export import export
from pipeline.training.optimizer import AdamW, make_optimizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

NASTY = [
    "a red circle",
    "It's the DOG's tail!! 123",
    "¿qué? naïve  日本語",
    "tab\tand\nline",
    "don't we'll",
    "",
    "x" * 90,
]


def architecture(folder: Path, **changes: dict[str, Any]) -> Config:
    """The tiny CLIP with other settings: ``vision_cfg={...}``, ``text_cfg={...}``, or values of the model itself."""
    model = json.loads((CONFIGS / "clipmill-tiny.json").read_text())
    for part, values in changes.items():
        if isinstance(values, dict):
            model[part].update(values)
        else:
            model[part] = values
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    return Config(architecture=f"local-dir:{folder}")


def shaken(config: Config) -> Clip:
    """Random weights in all places, biases and gains included."""
    torch.manual_seed(0)
    method = Clip(config).eval()
    for name, parameter in method.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float("ln" in name and "weight" in name), std=0.1)
    return method


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quick gelu": {"quick_gelu": True},
    "tanh gelu": {"text_cfg": {"act_kwargs": {"approximate": "tanh"}}, "vision_cfg": {"act_kwargs": {}}},
    "another ratio": {"vision_cfg": {"mlp_ratio": 3.0, "layers": 1}, "text_cfg": {"heads": 4, "context_length": 32}},
    "another norm": {"vision_cfg": {"norm_kwargs": {"eps": 1e-3}}},
    "fewer patches": {"vision_cfg": {"patch_size": 32, "patch_dropout": 0.5}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_gives_the_same_features(name: str, tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    method = shaken(architecture(tmp_path / "from", **VARIANTS[name]))
    export(method, Folder(tmp_path / "to"), "hugging_face")
    model, info = CLIPModel.from_pretrained(tmp_path / "to", output_loading_info=True)
    assert not any(info.values())
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "to")
    words = tokenizer(NASTY, padding="max_length", truncation=True, return_tensors="pt")
    images = torch.randn(3, 3, 64, 64)
    ours = method.model
    with torch.no_grad():
        theirs = model.eval()(pixel_values=images, **words)
        tokens = method.tokenizer(NASTY)
        image, text = ours.encode_image(images, normalize=True), ours.encode_text(tokens, normalize=True)
        scale = ours.logit_scale.exp()
    assert (theirs.image_embeds - image).abs().max() < 1e-5
    assert (theirs.text_embeds - text).abs().max() < 1e-5
    assert torch.allclose(theirs.logits_per_image, scale * image @ text.T, atol=1e-3)


def test_the_tokenizers_agree(tmp_path: Path) -> None:
    """Token by token, but for what pads: transformers repeats the end, open_clip has zeros."""
    from transformers import CLIPTokenizer

    export(Clip(Clip.smallest()), Folder(tmp_path), "hugging_face")
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    ours = open_clip.get_tokenizer("ViT-B-32")
    rows = theirs(NASTY, padding="max_length", truncation=True)["input_ids"]
    for text, row, expected in zip(NASTY, rows, ours(NASTY).tolist(), strict=True):
        end = expected.index(49407)
        assert row[: end + 1] == expected[: end + 1] and set(row[end:]) == {49407}, text


@pytest.mark.parametrize("size", [(64, 64), (200, 120), (61, 307)])
def test_the_processor_sees_images_as_we_do(size: tuple[int, int], tmp_path: Path) -> None:
    """From an image to features. Resizing differs by rounding: a level or two of 255 on hard noise."""
    from transformers import CLIPModel, CLIPProcessor

    method = shaken(Clip.smallest())
    export(method, Folder(tmp_path), "hugging_face")
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    processor = CLIPProcessor.from_pretrained(tmp_path)
    theirs = processor(images=Image.fromarray(noise), text=["a red circle"], return_tensors="pt")
    ours = method.transforms(train=False)(noise)[None]
    normalised = (ours.float() - method.mean) / method.std
    level = 1 / 255 / 0.26
    assert (theirs["pixel_values"] - normalised).abs().max() < 3 * level
    with torch.no_grad():
        features = CLIPModel.from_pretrained(tmp_path).eval()(**theirs)
    cosine = (features.image_embeds * method.encode_image(ours)).sum()
    assert cosine > 0.9999
    assert (features.image_embeds - method.encode_image(ours)).abs().max() < 0.01


def test_the_sigmoid_bias_is_told_apart(tmp_path: Path) -> None:
    """No part of CLIPModel, so it stands in the config; with it transformers' logits are SigLIP's."""
    from transformers import CLIPModel

    method = shaken(Config(architecture="clipmill-tiny", loss="sigmoid", sigmoid_bias=-7.5))
    method.model.logit_bias.data.fill_(-7.5)
    export(method, Folder(tmp_path), "hugging_face")
    model = CLIPModel.from_pretrained(tmp_path)
    assert model.config.logit_bias == -7.5
    assert model.logit_scale.item() == pytest.approx(np.log(10))


def test_open_clip_opens_its_own_folder(tmp_path: Path) -> None:
    """The folder alone is enough, also for a size and a bias that the architecture's name does not tell."""
    method = shaken(Config(architecture="clipmill-tiny", image_size=48, loss="sigmoid"))
    export(method, Folder(tmp_path), "open_clip")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    model.eval()
    images, tokens = torch.randn(2, 3, 48, 48), open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["a", "b c"])
    with torch.no_grad():
        assert (model.encode_image(images) - method.model.encode_image(images)).abs().max() < 1e-5
        assert (model.encode_text(tokens) - method.model.encode_text(tokens)).abs().max() < 1e-5
    assert model.logit_bias.item() == method.model.logit_bias.item()
    assert transform(Image.new("RGB", (90, 60))).shape == (3, 48, 48)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 64}}, "ModifiedResNet"),
        ({"vision_cfg": {"timm_model_name": "clipmill_convnet", "timm_pool": "", "timm_proj": ""}}, "ConvNet of timm"),
        ({"vision_cfg": {"pool_type": "avg"}}, "class token"),
        ({"vision_cfg": {"ls_init_value": 0.1}}, "layer scale"),
        ({"vision_cfg": {"no_ln_pre": True}}, "norm before its blocks"),
        ({"vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 2}}, "class token"),
        ({"vision_cfg": {"block_type": "custom", "qk_norm": True}}, "blocks of its image tower"),
        ({"text_cfg": {"no_causal_mask": True}}, "not causal"),
        ({"text_cfg": {"pool_type": "last"}}, "read out by last"),
        ({"text_cfg": {"proj_bias": True}}, "bias"),
        ({"custom_text": True}, "text tower that is a TextTransformer"),
    ],
)
def test_what_has_no_place_is_named(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = openclip.create(architecture(tmp_path, **changes).architecture)
    with pytest.raises(SettingError, match=r"format: got 'hugging_face'.*CLIPModel has no place") as caught:
        hugging_face.check(model, openclip.tokenizer("clipmill-tiny"))
    assert reason in str(caught.value)


def test_images_that_are_padded_are_refused(tmp_path: Path) -> None:
    model: Any = openclip.create("clipmill-tiny", preprocess={"resize_mode": "longest"})
    with pytest.raises(SettingError, match="padded"):
        hugging_face.check(model, openclip.tokenizer("clipmill-tiny"))
    squashed = hugging_face.preprocessor({**openclip.preprocessing(model), "resize_mode": "squash"})
    assert squashed["size"] == {"height": 64, "width": 64} and not squashed["do_center_crop"]


def test_a_checkpoint_is_not_written_over(tmp_path: Path) -> None:
    method = Clip(Clip.smallest())
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=2, seed=0, snapshot="d" * 64)
    saved = Checkpoints(str(tmp_path)).save(method, make_optimizer(AdamW(), method), meta)
    with pytest.raises(SettingError, match="a folder that is not a checkpoint itself"):
        export(load_method(str(tmp_path)), saved.folder, "hugging_face")
