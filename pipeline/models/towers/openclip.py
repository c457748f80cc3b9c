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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import open_clip
import torch
from open_clip.model import set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from pipeline.config import require
from pipeline.errors import SettingError
from pipeline.loaders.cache import FileCache
from pipeline.loaders.images import ImageTransform
from pipeline.models.towers import (
    convnet,  # noqa: F401 - registers it with timm
    hugging_face_import,
)
from pipeline.models.towers.foreign import load_foreign, read_foreign
from pipeline.shards.storage import Folder

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
WEIGHTS = "model.safetensors"
MODEL_CARD = "open_clip_config.json"  # the file that open_clip.create_model("local-dir:FOLDER") reads
SCHEMES = ("local-dir:", "hf-hub:")

open_clip.add_model_config(CONFIGS)
logger = logging.getLogger(__name__)


def check_architecture(name: str) -> dict[str, Any]:
    """open_clip's model config of ``name``: one of its names or ours, ``local-dir:FOLDER`` or ``hf-hub:ORG/REPO``.

    Folder and repository have open_clip's files, or those of transformers' ``CLIPModel``.

    Raises:
        SettingError: unknown (similar names are listed), or a captioning model, which does not support a CLIP loss.
    """
    try:
        theirs = _hugging_face_file(name, hugging_face_import.CONFIG)
        if theirs is not None:
            return hugging_face_import.model_config(hugging_face_import.parse(theirs.read_text(), name), name)
        config = open_clip.get_model_config(name if ":" in name else plain_name(name))
    except SettingError:
        raise
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

    ``hf-hub:ORG/REPO`` and ``local-dir:FOLDER`` are architectures with their own weights. OpenAI's own names are known:
    ``ViT-B/32:openai`` is ``ViT-B-32-quickgelu:openai``.
    """
    architecture, colon, weights = address.partition(":")
    if architecture in ("hf-hub", "local-dir"):
        return address, None
    written = plain_name(architecture).replace("@336px", "-336")
    if "/" in architecture and written in open_clip.list_models():
        quick = f"{written}-quickgelu"
        architecture = quick if weights == "openai" and quick in open_clip.list_models() else written
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

    ``pretrained`` is a tag of the architecture, or a path or URI of a weights file or of a checkpoint folder. Files of
    other programs are read as ``pipeline.models.towers.foreign`` says.
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
    found = _find(architecture, config, pretrained) if load else _Found()
    towers = pretrained_towers and load and found.file is None
    sizes = {"image_size": image_size, "context_length": context_length, "patch_dropout": patch_dropout or None}
    model: Any
    try:
        with _quiet_root_logger():
            if _hugging_face_file(architecture, hugging_face_import.CONFIG):
                model = _instance(config, **sizes, **({} if logit_bias is None else {"init_logit_bias": logit_bias}))
                set_model_preprocess_cfg(model, {**preprocessing(model), **found.images, **(preprocess or {})})
            else:
                model = open_clip.create_model(
                    architecture,
                    pretrained=found.tag,
                    load_weights=load,
                    **{f"force_{name}": value for name, value in sizes.items()},
                    force_preprocess_cfg={**found.images, **(preprocess or {})},
                    pretrained_image=towers,
                    pretrained_text=towers,
                    **({} if logit_bias is None else {"init_logit_bias": logit_bias}),
                )
        if found.file is not None:
            _load(model, found.file, architecture, config, found.quick_gelu)
    except RuntimeError as error:
        problem = str(error).strip().splitlines()[0]
        raise SettingError(
            "pretrained", pretrained or architecture, f"weights that fit {architecture} ({problem})"
        ) from error
    drops = any(type(module).__name__.startswith("PatchDropout") for module in model.visual.modules())
    require(drops or not patch_dropout, "patch_dropout", patch_dropout, f"0, since {architecture} has no patches")
    return cast(nn.Module, model)


def tokenizer(architecture: str, context_length: int | None = None) -> Any:
    """The tokenizer of ``architecture``: texts to int64 [B, context length]; the architecture's by default."""
    if _hugging_face_file(architecture, hugging_face_import.CONFIG):
        length = context_length or check_architecture(architecture)["text_cfg"]["context_length"]
        return open_clip.SimpleTokenizer(context_length=length)
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


def brings_weights(architecture: str) -> bool:
    """Whether ``architecture`` is a folder or a repository that has weights."""
    scheme, _, place = architecture.partition(":")
    endings = (".safetensors", ".bin", ".pth")
    return scheme == "hf-hub" or (scheme == "local-dir" and any(p.suffix in endings for p in Path(place).iterdir()))


@dataclass(frozen=True)
class _Found:
    """Weights: a tag of open_clip, or a local file with the image settings of its training.

    ``quick_gelu`` says whether they were trained with QuickGELU; ``None`` if nothing beside the file says so.
    """

    tag: str | None = None
    file: Path | None = None
    images: Mapping[str, Any] = field(default_factory=dict)
    quick_gelu: bool | None = None


def _find(architecture: str, config: Mapping[str, Any], pretrained: str | None) -> _Found:
    """The weights ``pretrained``, or those of a folder or repository of transformers."""
    if not pretrained:
        if _hugging_face_file(architecture, hugging_face_import.CONFIG) is None:
            return _Found()
        files = [_hugging_face_file(architecture, name) for name in hugging_face_import.WEIGHTS]
        file = next((file for file in files if file is not None), None)
        allowed = f"a folder with one of {', '.join(hugging_face_import.WEIGHTS)}"
        require(file is not None, "architecture", architecture, allowed)
        images = _hugging_face_file(architecture, hugging_face_import.IMAGES)
        plain = hugging_face_import.parse(images.read_text(), architecture) if images else {}
        return _Found(None, file, hugging_face_import.image_settings(plain), bool(config["quick_gelu"]))
    place = _place(architecture, config, pretrained)
    if place is None:
        return _Found(pretrained)
    folder, name = place
    card = json.loads(folder.read_bytes(MODEL_CARD)) if folder.exists(MODEL_CARD) else {}
    settings = {key: value for key, value in card.get("preprocess_cfg", {}).items() if key != "size"}
    return _Found(None, FileCache().fetch(folder, name), settings, _activation_beside(folder))


def _load(model: nn.Module, file: Path, architecture: str, config: Mapping[str, Any], quick_gelu: bool | None) -> None:
    """Load the weights in ``file``; raises ``RuntimeError`` if they do not fit."""
    if file.suffix in (".npz", ".npy"):  # of big_vision
        open_clip.load_checkpoint(model, str(file))
        return
    found = read_foreign(file)
    if quick_gelu is None:
        _check_file_activation(architecture, config, file, found.quick_gelu)
    load_foreign(model, found.tensors)


def _instance(config: Mapping[str, Any], **changes: Any) -> nn.Module:
    """open_clip's ``CLIP`` for a config that open_clip has no name for."""
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    for part, key in ((vision, "image_size"), (text, "context_length"), (vision, "patch_dropout")):
        if (value := changes.pop(key)) is not None:
            part[key] = value
    model = open_clip.CLIP(**{**config, "vision_cfg": vision, "text_cfg": text, **changes})
    set_model_preprocess_cfg(model, {**asdict(PreprocessCfg()), "size": model.visual.image_size})
    return cast(nn.Module, model)


def _hugging_face_file(architecture: str, name: str) -> Path | None:
    """The file ``name`` of a folder or a repository of transformers; ``None`` if there is none, or with open_clip's."""
    if not architecture.startswith(SCHEMES) or _file_of(architecture, MODEL_CARD) is not None:
        return None
    return _file_of(architecture, name)


def _file_of(architecture: str, name: str) -> Path | None:
    scheme, _, place = architecture.partition(":")
    if scheme == "local-dir":
        path = Path(place) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(place, name))
    except EntryNotFoundError:
        return None


def _place(architecture: str, config: Mapping[str, Any], pretrained: str) -> tuple[Folder, str] | None:
    """Folder and name of the weights file; ``None`` if ``pretrained`` is a tag of open_clip."""
    if ":" not in architecture and open_clip.is_pretrained_cfg(plain_name(architecture), pretrained):
        architecture = plain_name(architecture)
        quick = bool(open_clip.get_pretrained_cfg(architecture, pretrained).get("quick_gelu", False))
        if quick != bool(config.get("quick_gelu", False)) and (right := _with_activation(architecture, quick)):
            raise SettingError("architecture", architecture, _trained_with(right, pretrained))
        return None
    if ":" in architecture:
        raise SettingError("pretrained", pretrained, f"nothing, since {architecture} has its own weights")
    parent, _, name = pretrained.rstrip("/").rpartition("/")
    folder = Folder(parent or ("/" if pretrained.startswith("/") else "."))
    inner = folder.folder(name)
    file = next((file for file in hugging_face_import.WEIGHTS if name and inner.exists(file)), None)
    if file is not None:
        needed = _activation_beside(inner)
        if needed is not None and needed != bool(config.get("quick_gelu", False)):
            right = _with_activation(plain_name(architecture), needed) or f"one whose config has quick_gelu {needed}"
            raise SettingError("architecture", architecture, _trained_with(right, pretrained))
        return inner, file
    if not name or not folder.exists(name) or folder.fs.isdir(f"{folder.path}/{name}"):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        allowed = f"a tag of {architecture} ({tags}), a weights file, or a checkpoint folder with {WEIGHTS}"
        raise SettingError("pretrained", pretrained, allowed)
    return folder, name


def _activation_beside(folder: Folder) -> bool | None:
    """Whether the configs in ``folder`` name QuickGELU; ``None`` without one."""
    for name, read in ((MODEL_CARD, _quick_of_card), (hugging_face_import.CONFIG, hugging_face_import.is_quick)):
        if folder.exists(name):
            found = read(hugging_face_import.parse(folder.read_text(name), folder.join(name)))
            if found is not None:
                return found
    return None


def _quick_of_card(card: Mapping[str, Any]) -> bool | None:
    config = card.get("model_cfg")
    return bool(config.get("quick_gelu", False)) if isinstance(config, Mapping) else None


def _check_file_activation(
    architecture: str, config: Mapping[str, Any], file: Path, weights_quick: bool | None
) -> None:
    """OpenAI's weights need QuickGELU; with the usual GELU they load without an error and perform worse."""
    model_quick = bool(config.get("quick_gelu", False))
    other = _with_activation(plain_name(architecture), not model_quick)
    if weights_quick is None:
        if other is not None:
            ours = "QuickGELU" if model_quick else "GELU"
            logger.warning("%s does not say with which activation it was trained; %s uses %s", file, architecture, ours)
            logger.warning("if these weights need the other one, the architecture is %s", other)
    elif weights_quick != model_quick:
        if other is not None:
            raise SettingError("architecture", architecture, _trained_with(other, str(file)))
        logger.warning("%s is of OpenAI's CLIP, which has QuickGELU; %s has GELU", file, architecture)


def _with_activation(architecture: str, quick: bool) -> str | None:
    """The name of this architecture with (or without) QuickGELU, if open_clip has one of another name."""
    plain = architecture.removesuffix("-quickgelu")
    name = f"{plain}-quickgelu" if quick else plain
    return name if name != architecture and name in open_clip.list_models() else None


def _trained_with(right: str, weights: str) -> str:
    return f"{right}, since the weights {weights} were trained with it"


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
