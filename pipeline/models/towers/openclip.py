"""open_clip's models: architectures, pretrained tags, local and remote checkpoints, and export to open_clip.

Nothing of open_clip is copied or changed. Our own architectures are open_clip model configs in
``pipeline/models/configs``. They are registered when this module is imported (with the tower that timm lacks), and are
named like any other.
"""

import difflib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import open_clip
import torch
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from pipeline.config import require
from pipeline.errors import SettingError
from pipeline.loaders.cache import FileCache
from pipeline.loaders.images import ImageTransform
from pipeline.models.towers import convnet  # noqa: F401 - registers it with timm
from pipeline.shards.storage import Folder

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
WEIGHTS = "model.safetensors"
MODEL_CARD = "open_clip_config.json"  # the file that open_clip.create_model("local-dir:FOLDER") reads

open_clip.add_model_config(CONFIGS)


def check_architecture(name: str) -> dict[str, Any]:
    """open_clip's model config of ``name``: one of its names or ours, ``local-dir:FOLDER`` or ``hf-hub:ORG/REPO``.

    Raises:
        SettingError: unknown (similar names are listed), or a captioning model, which does not support a CLIP loss.
    """
    try:
        config = open_clip.get_model_config(name if ":" in name else plain_name(name))
    except (OSError, ValueError) as error:
        raise SettingError("architecture", name, f"a model config that can be read ({error})") from error
    if config is None:
        known = open_clip.list_models()
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or ["ViT-B-32", "RN50"]
        allowed = f"one of open_clip's {len(known)} architectures, such as {', '.join(near)} (open_clip.list_models())"
        raise SettingError("architecture", name, allowed)
    require("multimodal_cfg" not in config, "architecture", name, "an architecture without a caption decoder")
    return dict(config)


def check(architecture: str, pretrained: str | None, patch_dropout: float = 0.0) -> None:
    """Raise as :func:`create` does for a missing architecture or missing weights; builds and downloads nothing."""
    config = check_architecture(architecture)
    is_resnet = isinstance(config["vision_cfg"].get("layers"), list)
    require(
        not (is_resnet and patch_dropout), "patch_dropout", patch_dropout, f"0, since {architecture} has no patches"
    )
    if pretrained:
        _place(architecture, config, pretrained)


def parse_address(address: str) -> tuple[str, str | None] | None:
    """Architecture and weights of ``ARCHITECTURE:WEIGHTS``; ``None`` if ``address`` has another form.

    ``hf-hub:ORG/REPO`` and ``local-dir:FOLDER`` are architectures with their own weights.
    """
    architecture, colon, weights = address.partition(":")
    if architecture in ("hf-hub", "local-dir"):
        return address, None
    is_uri = "/" in architecture or weights.startswith("//")
    return (architecture, weights) if colon and architecture and weights and not is_uri else None


def create(
    architecture: str,
    pretrained: str | None = None,
    *,
    image_size: int | None = None,
    pretrained_towers: bool = False,
    load: bool = True,
    preprocess: Mapping[str, Any] | None = None,
    logit_bias: float | None = None,
    context_length: int | None = None,
    patch_dropout: float = 0.0,
) -> nn.Module:
    """Build an open_clip model.

    ``pretrained`` is a tag of the architecture, or a path or URI of a weights file or of a checkpoint folder.
    ``pretrained_towers`` initialises towers of timm and Hugging Face with their own weights. ``load=False`` builds the
    modules alone. ``preprocess`` overrides the images' size, mean, std and so on. ``logit_bias`` adds the parameter of
    a sigmoid loss, with this value. If ``image_size`` or ``context_length`` differs from that of the weights, open_clip
    interpolates their position embeddings: images' with antialiased bicubic, texts' linearly. ``patch_dropout`` is the
    part of the patches that is dropped in training.

    Raises:
        SettingError: no such architecture or weights, weights that were trained with the other kind of GELU, or
            patch dropout for a tower without patches.
        DataError: a damaged checkpoint.
    """
    config = check_architecture(architecture)
    found, found_preprocess = _find(architecture, config, pretrained) if pretrained and load else (None, {})
    try:
        with _quiet_root_logger():
            model = open_clip.create_model(
                architecture,
                pretrained=found,
                load_weights=load,
                force_image_size=image_size,
                force_context_length=context_length,
                force_patch_dropout=patch_dropout or None,
                force_preprocess_cfg={**found_preprocess, **(preprocess or {})},
                pretrained_image=pretrained_towers and load,
                pretrained_text=pretrained_towers and load,
                **({} if logit_bias is None else {"init_logit_bias": logit_bias}),
            )
    except RuntimeError as error:
        problem = str(error).strip().splitlines()[0]
        raise SettingError("pretrained", pretrained, f"weights that fit {architecture} ({problem})") from error
    drops = any(type(module).__name__.startswith("PatchDropout") for module in model.visual.modules())
    require(drops or not patch_dropout, "patch_dropout", patch_dropout, f"0, since {architecture} has no patches")
    return cast(nn.Module, model)


def tokenizer(architecture: str, context_length: int | None = None) -> Any:
    """The tokenizer of ``architecture``: texts to int64 [B, context length]; the architecture's by default."""
    with _quiet_root_logger():
        return open_clip.get_tokenizer(architecture, context_length=context_length)


def same_tokens(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two model configs name the same tokenizer; the context lengths may differ."""
    texts = one["text_cfg"], other["text_cfg"]
    return all(texts[0].get(key) == texts[1].get(key) for key in ("hf_tokenizer_name", "tokenizer_kwargs"))


def plain_name(architecture: str) -> str:
    """``ViT-B-32`` of ``ViT-B/32``, ``model`` of ``hf-hub:org/model``: a name for a file."""
    scheme, colon, rest = architecture.partition(":")
    return rest.rstrip("/").rpartition("/")[2] if colon else scheme.replace("/", "-")


def register(architecture: str, description: Mapping[str, str]) -> str:
    """Register the architecture of a checkpoint, which may be unknown on this machine; returns its plain name.

    ``description`` are the text files that :func:`describe` made.
    """
    name = plain_name(architecture)
    if open_clip.get_model_config(name) is None:
        with TemporaryDirectory() as folder:
            (Path(folder) / f"{name}.json").write_text(description[f"{name}.json"])
            open_clip.add_model_config(folder)
    return name


def describe(
    model: nn.Module, architecture: str, image_size: int | None = None, context_length: int | None = None
) -> dict[str, str]:
    """The text files with which open_clip opens a folder with ``model.safetensors``.

    One is an architecture for ``open_clip.add_model_config(folder)``, the other enables ``local-dir:``.
    """
    config = check_architecture(architecture)
    if image_size is not None:
        config["vision_cfg"]["image_size"] = image_size
    if context_length is not None:
        config["text_cfg"]["context_length"] = context_length
    if cast(Any, model).logit_bias is not None:
        config.setdefault("init_logit_bias", 0.0)  # the weights hold the value
    card = {"model_cfg": config, "preprocess_cfg": preprocessing(model)}
    return {f"{plain_name(architecture)}.json": json.dumps(config, indent=4), MODEL_CARD: json.dumps(card, indent=4)}


def preprocessing(model: nn.Module) -> dict[str, Any]:
    """Size, mean, std, interpolation and resize mode of the input images of ``model``."""
    return dict(cast(Any, model).visual.preprocess_cfg)


def image_transform(model: nn.Module, **training: Any) -> ImageTransform:
    """The evaluation transform of ``model``; with ``training`` settings (crop, scale, ...), the training transform."""
    settings = preprocessing(model)
    size = settings["size"]
    return ImageTransform(
        size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        fit=settings["resize_mode"],
        interpolation="bilinear" if settings["interpolation"] == "bilinear" else "bicubic",
        fill=int(settings.get("fill_color", 0)),
        **training,
    )


def end_of_text(model: nn.Module, tokenizer: Any) -> int | None:
    """The token after which ``model`` ignores the text, so that it may be cut there; ``None`` if it reads all tokens.

    Such a token exists for open_clip's own causal text tower, pooled at the token's first position.
    """
    if not isinstance(model, open_clip.CLIP) or model.attn_mask is None:
        return None
    if model.text_pool_type == "argmax":
        token = getattr(tokenizer, "eot_token_id", None)
        return token if token == model.vocab_size - 1 else None
    return int(model.text_eos_id) if model.text_pool_type == "eos" else None


def start_as_bag_of_words(model: Any) -> None:
    """Initialise every layer of the text transformer as the mean of the words before it.

    Queries start at zero, so attention is uniform; values and output are the identity, so it adds the mean word; the
    MLP adds nothing; position embeddings and the two boundary tokens are zero. All of these are trained. With random
    layers, a small tower maps all captions to nearly the same vector, and a run of minutes spends most of its time
    on separating them.

    Raises:
        SettingError: not open_clip's own text transformer.
    """
    require(isinstance(model, open_clip.CLIP), "text_start", "bag_of_words", "paper, for this text tower")
    with torch.no_grad():
        model.positional_embedding.zero_()
        model.token_embedding.weight[-2:] = 0
        for block in model.transformer.resblocks:
            queries, _, values = block.attn.in_proj_weight.chunk(3)
            queries.zero_()
            nn.init.eye_(values)
            nn.init.eye_(block.attn.out_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.bias)


def encode_text(model: Any, text: Tensor) -> Tensor:
    """Features of tokens int64 [B, L], not normalised: float [B, D]; L may be less than the tower's context length.

    open_clip's own method needs the full context length; here its modules run on the given tokens.
    """
    length = text.shape[1]
    if length == model.context_length:
        features: Tensor = model.encode_text(text)
        return features
    kind = model.transformer.get_cast_dtype()
    hidden = model.token_embedding(text).to(kind) + model.positional_embedding[:length].to(kind)
    hidden = model.transformer(hidden, attn_mask=model.attn_mask[:length, :length])
    pooled = text_global_pool(model.ln_final(hidden), text, model.text_pool_type, eos_token_id=model.text_eos_id)
    if model.text_projection is None:
        return cast(Tensor, pooled)
    if isinstance(model.text_projection, nn.Linear):
        return cast(Tensor, model.text_projection(pooled))
    return cast(Tensor, pooled @ model.text_projection)


def _find(architecture: str, config: Mapping[str, Any], pretrained: str) -> tuple[str, Mapping[str, Any]]:
    """The value of ``pretrained`` for open_clip (a tag or a local file), and the image settings of its training."""
    place = _place(architecture, config, pretrained)
    if place is None:
        return pretrained, {}
    folder, name = place
    card = json.loads(folder.read_bytes(MODEL_CARD)) if folder.exists(MODEL_CARD) else {}
    images = {key: value for key, value in card.get("preprocess_cfg", {}).items() if key != "size"}
    return str(FileCache().fetch(folder, name)), images


def _place(architecture: str, config: Mapping[str, Any], pretrained: str) -> tuple[Folder, str] | None:
    """Folder and name of the weights file; ``None`` if ``pretrained`` is a tag of open_clip."""
    if open_clip.is_pretrained_cfg(architecture, pretrained):
        _check_activation(architecture, config, pretrained)
        return None
    if ":" in architecture:
        raise SettingError("pretrained", pretrained, f"nothing, since {architecture} has its own weights")
    parent, _, name = pretrained.rstrip("/").rpartition("/")
    folder = Folder(parent or ("/" if pretrained.startswith("/") else "."))
    if folder.exists(f"{name}/{WEIGHTS}"):
        return folder.folder(name), WEIGHTS
    if not name or not folder.exists(name) or folder.fs.isdir(f"{folder.path}/{name}"):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        allowed = f"a tag of {architecture} ({tags}), a weights file, or a checkpoint folder with {WEIGHTS}"
        raise SettingError("pretrained", pretrained, allowed)
    return folder, name


def _check_activation(architecture: str, config: Mapping[str, Any], tag: str) -> None:
    """OpenAI's weights need QuickGELU; with the usual GELU they load without an error and perform worse."""
    weights_quick = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", False))
    model_quick = bool(config.get("quick_gelu", False))
    if weights_quick != model_quick:
        right = f"{architecture}-quickgelu" if weights_quick else architecture.removesuffix("-quickgelu")
        raise SettingError("architecture", architecture, f"{right}, since the weights {tag} were trained with it")


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """open_clip logs to the root logger, and warns that a model to be trained has random weights."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
