"""open_clip's models: architectures, pretrained tags, local and remote checkpoints, and export to open_clip.

Nothing of open_clip is copied or changed. Our own architectures are open_clip model configs in
``pipeline/models/configs``. They are registered when this module is imported (with the tower that timm lacks), and are
named like any other.
"""

import difflib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any, cast

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from open_clip.transformer import text_global_pool
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.config import require
from pipeline.errors import DataError, SettingError
from pipeline.loaders.cache import FileCache
from pipeline.loaders.images import ImageTransform
from pipeline.models.towers import convnet  # noqa: F401 - registers it with timm
from pipeline.models.towers.weights import misfit, read_any_weights
from pipeline.shards.storage import Folder

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
WEIGHTS = "model.safetensors"
MODEL_CARD = "open_clip_config.json"  # the file that open_clip.create_model("local-dir:FOLDER") reads
BIG_VISION = (".npz", ".npy")
_FREE = {  # settings of a tower that do not change its features
    "vision_cfg": ("patch_dropout", "timm_model_pretrained", "timm_drop", "timm_drop_path", "output_tokens"),
    "text_cfg": ("hf_model_pretrained", "output_tokens"),
}

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


def check(
    architecture: str,
    pretrained: str | None,
    *,
    patch_dropout: float = 0.0,
    image_size: int | None = None,
    context_length: int | None = None,
) -> None:
    """Raise as :func:`create` does for what can be known before; builds the image tower without memory, downloads
    nothing."""
    config = check_architecture(architecture)
    is_resnet = isinstance(config["vision_cfg"].get("layers"), list)
    require(
        not (is_resnet and patch_dropout), "patch_dropout", patch_dropout, f"0, since {architecture} has no patches"
    )
    if image_size is not None and not takes(config, image_size):
        some = " or ".join(map(str, near_sizes(config, image_size))) or config["vision_cfg"].get("image_size", 224)
        raise SettingError("image_size", image_size, f"a size that {architecture} takes, such as {some}")
    if pretrained:
        _place(architecture, config, pretrained, image_size, context_length)


def takes(config: Mapping[str, Any], image_size: int) -> bool:
    """Whether the image tower of a model config takes images of ``image_size`` x ``image_size`` pixels: tried on the
    meta device, without memory or arithmetic."""
    vision = {**config["vision_cfg"], "image_size": image_size, "timm_model_pretrained": False}
    text = {"width": 8, "heads": 1, "layers": 1, "vocab_size": 8}  # any: only the image tower runs
    try:
        with torch.device("meta"), _quiet_root_logger():
            model = open_clip.CLIP(config["embed_dim"], vision, text, bool(config.get("quick_gelu")))
            if "timm_model_name" in vision and hasattr(
                model.visual, "set_input_size"
            ):  # as open_clip.create_model does
                model.visual.set_input_size(image_size)
            model.encode_image(torch.empty(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError, ZeroDivisionError, IndexError):
        return False
    return True


def near_sizes(config: Mapping[str, Any], image_size: int) -> tuple[int, ...]:
    """The nearest multiples of a patch's or a stride's size, below and above ``image_size``, that the tower takes."""
    steps = {int(config["vision_cfg"].get("patch_size") or 32), 8, 14, 16, 32}
    below = sorted({image_size // step * step for step in steps}, reverse=True)
    above = sorted({(image_size // step + 1) * step for step in steps})
    found = (next((size for size in some if size > 0 and takes(config, size)), 0) for some in (below, above))
    return tuple(size for size in found if size)


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

    Weights with a bias give the model one, also if neither ``logit_bias`` nor the architecture asks for it: the
    softmax loss, classes and retrieval do not depend on it, and a checkpoint keeps it.

    Raises:
        SettingError: no such architecture or weights, weights that do not fit it by names, shapes, kind of GELU or
            the settings in their folder's ``open_clip_config.json``, or patch dropout for a tower without patches.
        DataError: a damaged checkpoint, or a file that holds no weights.
    """
    config = check_architecture(architecture)
    place = _place(architecture, config, pretrained, image_size, context_length) if pretrained and load else None
    path = FileCache().fetch(*place) if place else None
    is_numpy = path is not None and path.suffix in BIG_VISION
    weights = read_any_weights(path, place[0].join(place[1])) if path and place and not is_numpy else None
    if weights and "logit_bias" in weights and logit_bias is None and "init_logit_bias" not in config:
        logit_bias = 0.0
    images = _card(place[0]).get("preprocess_cfg", {}) if place else {}
    found_preprocess = {key: value for key, value in images.items() if key != "size"}
    try:
        with _quiet_root_logger():
            model = open_clip.create_model(
                architecture,
                pretrained=pretrained if load and place is None else None,
                load_weights=load and place is None,
                force_image_size=image_size,
                force_context_length=context_length,
                force_patch_dropout=patch_dropout or None,
                force_preprocess_cfg={**found_preprocess, **(preprocess or {})},
                pretrained_image=pretrained_towers and load and place is None,
                pretrained_text=pretrained_towers and load and place is None,
                **({} if logit_bias is None else {"init_logit_bias": logit_bias}),
            )
            if is_numpy:
                open_clip.load_checkpoint(model, str(path))
    except (RuntimeError, ValueError, LookupError, OSError, AttributeError, UnpicklingError, SafetensorError) as error:
        problem = (str(error).strip() or repr(error)).splitlines()[0]
        raise SettingError(
            "pretrained", pretrained or architecture, f"weights that fit {architecture} ({problem})"
        ) from error
    if weights is not None:
        problem = _load(model, weights)
        require(not problem, "pretrained", pretrained, f"weights that fit {architecture}; these are {problem}")
    drops = any(type(module).__name__.startswith("PatchDropout") for module in model.visual.modules())
    require(drops or not patch_dropout, "patch_dropout", patch_dropout, f"0, since {architecture} has no patches")
    return cast(nn.Module, model)


def _load(model: nn.Module, weights: dict[str, Tensor]) -> str:
    """Load weights of open_clip or of a kind that it converts; returns how they differ from the model's, if they do."""
    state = dict(convert_state_dict(model, weights))
    wanted = model.state_dict()
    if "positional_embedding" in state and "positional_embedding" not in wanted:
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):  # some have one dimension
        if name in state and name in wanted and state[name].numel() == 1:
            state[name] = state[name].reshape(wanted[name].shape)
    if "logit_bias" in wanted:
        state.setdefault("logit_bias", torch.zeros_like(wanted["logit_bias"]))
    state = {name: tensor for name, tensor in state.items() if not name.endswith("embeddings.position_ids")}
    for resize in (resize_pos_embed, resize_text_pos_embed):
        with suppress(RuntimeError, AssertionError, AttributeError, IndexError):  # of other widths: found below
            resize(state, model)
    problem = misfit(wanted, state)
    if not problem:
        model.load_state_dict(state)
    return problem


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


def _card(folder: Folder) -> Mapping[str, Any]:
    """The content of a folder's ``open_clip_config.json``; empty without the file.

    Raises:
        DataError: it is no model's description.
    """
    if not folder.exists(MODEL_CARD):
        return {}
    try:
        card = json.loads(folder.read_bytes(MODEL_CARD))
        configs = [card[name] for name in ("model_cfg", "preprocess_cfg") if name in card]
        configs += [card["model_cfg"][name] for name in ("vision_cfg", "text_cfg")]
        if not all(isinstance(config, Mapping) for config in configs):
            raise ValueError("its parts are no objects")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(
            f"{folder.join(MODEL_CARD)} is no model's description as open_clip writes it ({error!r})"
        ) from error
    return cast(Mapping[str, Any], card)


def _place(
    architecture: str,
    config: Mapping[str, Any],
    pretrained: str,
    image_size: int | None = None,
    context_length: int | None = None,
) -> tuple[Folder, str] | None:
    """Folder and name of the weights file; ``None`` if ``pretrained`` is a tag of open_clip."""
    if open_clip.is_pretrained_cfg(architecture, pretrained):
        _check_activation(architecture, config, pretrained)
        return None
    if ":" in architecture:
        raise SettingError("pretrained", pretrained, f"nothing, since {architecture} has its own weights")
    parent, _, name = pretrained.rstrip("/").rpartition("/")
    folder = Folder(parent or ("/" if pretrained.startswith("/") else "."))
    if folder.exists(f"{name}/{WEIGHTS}"):
        folder, name = folder.folder(name), WEIGHTS
    elif not name or not folder.exists(name) or folder.fs.isdir(f"{folder.path}/{name}"):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        allowed = f"a tag of {architecture} ({tags}), a weights file, or a checkpoint folder with {WEIGHTS}"
        raise SettingError("pretrained", pretrained, allowed)
    _check_card(architecture, config, folder, pretrained, image_size, context_length)
    return folder, name


def _check_card(
    architecture: str,
    config: Mapping[str, Any],
    folder: Folder,
    pretrained: str,
    image_size: int | None,
    context_length: int | None,
) -> None:
    """Compare what the shapes of weights do not show. An explicit size is the user's choice; others must be equal."""
    card = _card(folder)
    if not card:
        return
    trained, wanted = _settings(card["model_cfg"]), _settings(config)
    for name, explicit in (("vision_cfg.image_size", image_size), ("text_cfg.context_length", context_length)):
        if explicit is not None:
            trained.pop(name, None)
    others = [
        f"{name.rpartition('.')[2]} {json.dumps(value)} instead of {json.dumps(wanted.get(name))}"
        for name, value in trained.items()
        if value != wanted.get(name)
    ]
    allowed = f"weights for the settings of {architecture}; {folder.join(MODEL_CARD)} has {', '.join(others)}"
    require(
        not others, "pretrained", pretrained, f"{allowed} (local-dir:FOLDER as architecture takes the folder's own)"
    )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model config that change its features, by name, with open_clip's defaults."""
    found: dict[str, Any] = {"quick_gelu": bool(config.get("quick_gelu", False))}
    defaults = {"vision_cfg": asdict(open_clip.CLIPVisionCfg()), "text_cfg": asdict(open_clip.CLIPTextCfg())}
    for tower, default in defaults.items():
        settings = {**default, **config[tower]}
        found |= {f"{tower}.{name}": value for name, value in settings.items() if name not in _FREE[tower]}
    return cast(dict[str, Any], json.loads(json.dumps(found)))  # lists for tuples


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
