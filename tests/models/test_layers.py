"""Depth and blocks of towers: against timm's own layer decay, and by hand."""

from collections import Counter
from functools import cache
from typing import Any

import pytest
import timm
from timm.optim import param_groups_layer_decay
from torch import nn
from transformers import BertConfig, BertModel

from pipeline.models.clip import Clip, Config
from pipeline.models.towers import openclip
from pipeline.models.towers.layers import blocks, layers
from pipeline.training.optimizer import AdamW, rate_scales


@cache
def built(architecture: str) -> Any:
    return openclip.create(architecture)


def timm_scales(trunk: nn.Module, decay: float) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in trunk.named_parameters()}
    groups = param_groups_layer_decay(trunk, layer_decay=decay)
    return {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}


def scales(architecture: str, decay: float, tower: str) -> dict[str, float]:
    found = layers(built(architecture))
    return {name: decay**layer.above for name, layer in found.items() if layer.tower == tower}


def test_a_tower_of_timm_decays_as_timm_says() -> None:
    """As the same network with a classifier, whose place the projection has."""
    theirs = timm.create_model("vit_medium_patch16_gap_256", num_classes=3)
    expected = timm_scales(theirs, 0.7)
    found = scales("vit_medium_patch16_gap_256", 0.7, "image")
    trunk = {name.removeprefix("visual.trunk."): scale for name, scale in found.items() if ".trunk." in name}
    assert trunk == pytest.approx({name: expected[name] for name in trunk}) and len(trunk) > 100
    assert expected["head.weight"] == found["visual.head.proj.weight"] == 1.0


def test_a_tower_whose_projection_is_its_own_decays_as_timm_says() -> None:
    expected = timm_scales(built("MobileCLIP-S1").visual.trunk, 0.7)
    found = scales("MobileCLIP-S1", 0.7, "image")
    assert {name.removeprefix("visual.trunk."): scale for name, scale in found.items()} == pytest.approx(expected)


def test_open_clips_own_transformer_decays_as_timms_does() -> None:
    """The same ViT-S/16 in both libraries; timm calls its parts otherwise."""
    theirs = timm_scales(timm.create_model("vit_small_patch16_224"), 0.65)
    pairs = {
        "conv1.weight": "patch_embed.proj.weight",
        "class_embedding": "cls_token",
        "positional_embedding": "pos_embed",
        "proj": "head.weight",
        **{f"transformer.resblocks.{n}.mlp.c_fc.weight": f"blocks.{n}.mlp.fc1.weight" for n in range(12)},
        **{f"transformer.resblocks.{n}.attn.in_proj_weight": f"blocks.{n}.attn.qkv.weight" for n in range(12)},
    }
    ours = scales("clipmill-slip-small", 0.65, "image")
    assert {name: ours[f"visual.{name}"] for name in pairs} == pytest.approx(
        {name: theirs[their_name] for name, their_name in pairs.items()}
    )


def test_by_hand() -> None:
    """The tiny model has two blocks in each tower: embeddings, block, block, the rest."""
    above = {name: layer.above for name, layer in layers(built("clipmill-tiny")).items()}
    stem = {"positional_embedding", "token_embedding.weight", "visual.class_embedding", "visual.positional_embedding"}
    stem |= {"visual.conv1.weight", "visual.ln_pre.weight", "visual.ln_pre.bias"}
    top = {"text_projection", "ln_final.weight", "ln_final.bias"}
    top |= {"visual.proj", "visual.ln_post.weight", "visual.ln_post.bias"}
    assert {name for name, count in above.items() if count == 3} == stem
    assert {name for name, count in above.items() if count == 0} == top
    assert {count for name, count in above.items() if ".resblocks.0." in name} == {2}
    assert {count for name, count in above.items() if ".resblocks.1." in name} == {1}
    assert not {"logit_scale", "logit_bias"} & set(above)


def test_a_resnet_by_its_blocks() -> None:
    """3, 4, 6 and 3 bottlenecks between the stem and the attention pool."""
    above = {name: layer.above for name, layer in layers(built("RN50")).items() if layer.tower == "image"}
    assert above["visual.conv1.weight"] == above["visual.bn3.bias"] == 17
    assert above["visual.layer1.0.conv1.weight"] == 16 and above["visual.layer4.2.conv3.weight"] == 1
    assert above["visual.attnpool.c_proj.weight"] == 0


def test_a_text_tower_of_hugging_face() -> None:
    config = BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=3, intermediate_size=8, vocab_size=9)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual, self.text = nn.Linear(1, 1), nn.Module()
            self.text.transformer, self.text.proj = BertModel(config), nn.Linear(8, 4)

    found = {name: layer.above for name, layer in layers(Both()).items() if layer.tower == "text"}
    counts = Counter(found.values())
    assert found["text.transformer.embeddings.word_embeddings.weight"] == 4 and found["text.proj.weight"] == 0
    assert found["text.transformer.encoder.layer.0.attention.self.query.weight"] == 3
    assert found["text.transformer.pooler.dense.weight"] == 0 and counts[1] == counts[2] == counts[3]


@pytest.mark.parametrize(
    ("architecture", "image", "text"),
    [("clipmill-tiny", 2, 2), ("clipmill-small", 5, 1), ("RN50", 16, 12), ("clipmill-slip-small", 12, 12)],
)
def test_blocks(architecture: str, image: int, text: int) -> None:
    names = list(blocks(built(architecture)))
    assert [sum(name.startswith("visual.") == is_image for name in names) for is_image in (True, False)] == [
        image,
        text,
    ]


def test_a_towers_rate_multiplies_its_layers() -> None:
    method = Clip(Config(architecture="clipmill-tiny"))
    found = rate_scales(AdamW(layer_decay=0.5, image_rate=0.1), method)
    assert found["model.visual.proj"] == pytest.approx(0.1) and found["model.visual.conv1.weight"] == 0.1 * 0.5**3
    assert found["model.text_projection"] == 1.0 and found["model.transformer.resblocks.0.ln_1.bias"] == 0.25
