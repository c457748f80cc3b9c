"""Made-up weights of GLIP with the names and shapes of the authors' release, for the network ``SMALLEST``."""

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.models.glip import Config
from pipeline.models.glip.config import SMALLEST

CONFIG = replace(Config(**SMALLEST), compat_offsets=True)
WIDTH, TEXT, FUSED, HEADS, GROUPS = 32, 32, 32, 2, 4
State = dict[str, Tensor]


def swin(random: torch.Generator) -> State:
    """An original Swin of one block a stage: the downsampling is the last part of a stage, the norms follow."""
    state: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (24, 3, 4, 4)}
    vectors = {"patch_embed.proj.bias": 24, "patch_embed.norm.weight": 24, "patch_embed.norm.bias": 24}
    for stage in range(4):
        width, heads = 24 * 2**stage, 2**stage
        block = f"layers.{stage}.blocks.0."
        state |= {
            f"{block}attn.relative_position_bias_table": (49, heads),
            f"{block}attn.qkv.weight": (3 * width, width),
            f"{block}attn.proj.weight": (width, width),
            f"{block}mlp.fc1.weight": (4 * width, width),
            f"{block}mlp.fc2.weight": (width, 4 * width),
        }
        vectors |= {f"{block}{norm}.{part}": width for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        vectors |= {f"{block}attn.qkv.bias": 3 * width, f"{block}attn.proj.bias": width}
        vectors |= {f"{block}mlp.fc1.bias": 4 * width, f"{block}mlp.fc2.bias": width}
        if stage < 3:
            state[f"layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
            vectors |= {f"layers.{stage}.downsample.norm.{part}": 4 * width for part in ("weight", "bias")}
        if stage:
            vectors |= {f"norm{stage}.{part}": width for part in ("weight", "bias")}
    shapes = state | {name: (size,) for name, size in vectors.items()}
    found = {name: torch.randn(shape, generator=random) * 0.2 for name, shape in shapes.items()}
    return found | {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64)}


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def fusion(name: str) -> dict[str, tuple[int, ...]]:
    shapes = norm(f"{name}.layer_norm_v", WIDTH) | norm(f"{name}.layer_norm_l", TEXT)
    for part, width in (("v", WIDTH), ("l", TEXT)):
        shapes |= linear(f"{name}.attn.{part}_proj", FUSED, width) | linear(
            f"{name}.attn.values_{part}_proj", FUSED, width
        )
        shapes |= linear(f"{name}.attn.out_{part}_proj", width, FUSED)
    return shapes | {f"{name}.gamma_v": (WIDTH,), f"{name}.gamma_l": (TEXT,)}


def bert_layer(name: str) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for part in ("query", "key", "value"):
        shapes |= linear(f"{name}.attention.self.{part}", TEXT, TEXT)
    shapes |= linear(f"{name}.attention.output.dense", TEXT, TEXT) | norm(f"{name}.attention.output.LayerNorm", TEXT)
    shapes |= linear(f"{name}.intermediate.dense", 4 * TEXT, TEXT) | linear(f"{name}.output.dense", TEXT, 4 * TEXT)
    return shapes | norm(f"{name}.output.LayerNorm", TEXT)


def dynamic(name: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(3):
        part = f"{name}.DyConv.{number}"
        shapes |= {f"{part}.conv.weight": (WIDTH, WIDTH, 3, 3), f"{part}.conv.bias": (WIDTH,)} | norm(
            f"{part}.bn", WIDTH
        )
    shapes |= {f"{name}.AttnConv.1.weight": (1, WIDTH, 1, 1), f"{name}.AttnConv.1.bias": (1,)}
    shapes |= {f"{name}.offset.weight": (27, WIDTH, 3, 3), f"{name}.offset.bias": (27,)}
    return shapes | linear(f"{name}.relu.fc.0", WIDTH // 4, WIDTH) | linear(f"{name}.relu.fc.2", 4 * WIDTH, WIDTH // 4)


def released(vocabulary: int, fused: bool = True, seed: int = 0) -> State:
    """A state of the authors' ``GeneralizedVLRCNN``, wrapped for several GPUs."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number, width in ((2, 48), (3, 96), (4, 192)):
        shapes |= {f"backbone.fpn.fpn_inner{number}.weight": (WIDTH, width, 1, 1)}
        shapes |= {f"backbone.fpn.fpn_layer{number}.weight": (WIDTH, WIDTH, 3, 3)}
        shapes |= {f"backbone.fpn.fpn_{part}{number}.bias": (WIDTH,) for part in ("inner", "layer")}
    for part in ("p6", "p7"):
        shapes |= {f"backbone.fpn.top_blocks.{part}.weight": (WIDTH, WIDTH, 3, 3)}
        shapes |= {f"backbone.fpn.top_blocks.{part}.bias": (WIDTH,)}
    bert = "language_backbone.body.model"
    shapes |= {f"{bert}.embeddings.word_embeddings.weight": (vocabulary, TEXT)}
    shapes |= {f"{bert}.embeddings.position_embeddings.weight": (256, TEXT)}
    shapes |= {f"{bert}.embeddings.token_type_embeddings.weight": (2, TEXT)} | norm(
        f"{bert}.embeddings.LayerNorm", TEXT
    )
    shapes |= bert_layer(f"{bert}.encoder.layer.0") | linear(f"{bert}.pooler.dense", TEXT, TEXT)
    for block in range(2):
        first = 3 * block
        if fused:
            shapes |= fusion(f"rpn.head.dyhead_tower.{first}.b_attn") | bert_layer(f"rpn.head.dyhead_tower.{first + 1}")
        shapes |= dynamic(f"rpn.head.dyhead_tower.{first + 2 if fused else block}")
    head = "rpn.head"
    shapes |= {f"{head}.cls_logits.weight": (80, WIDTH, 1, 1), f"{head}.cls_logits.bias": (80,)}
    shapes |= {f"{head}.bbox_pred.weight": (4, WIDTH, 1, 1), f"{head}.bbox_pred.bias": (4,)}
    shapes |= {f"{head}.centerness.weight": (1, WIDTH, 1, 1), f"{head}.centerness.bias": (1,)}
    shapes |= {f"{head}.scales.{level}.scale": (1,) for level in range(5)}
    shapes |= linear(f"{head}.dot_product_projection_text", WIDTH, TEXT)
    shapes |= {f"{head}.bias_lang": (TEXT,), f"{head}.bias0": (1,), f"{head}.log_scale": (1,)}
    random = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=random) * 0.2 for name, shape in shapes.items()}
    state |= {f"backbone.body.{name}": tensor for name, tensor in swin(random).items()}
    state |= {f"{bert}.embeddings.position_ids": torch.arange(256)[None]}
    state |= {f"rpn.anchor_generator.cell_anchors.{level}": torch.zeros(1, 4) for level in range(5)}
    return {f"module.{name}": tensor for name, tensor in state.items()}
