"""open_clip's models: architectures, pretrained tags, local and remote checkpoints, and export to open_clip.

Nothing of open_clip is copied or changed. Our own architectures are open_clip model configs in
``pipeline/models/configs``. They are registered when this module is imported (with the tower that timm lacks), and are
named like any other.
"""

import difflib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any, cast

import open_clip
import torch
from open_clip.convert import convert_state_dict, load_big_vision_weights
from open_clip.model import (
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    resize_text_pos_embed,
    set_model_preprocess_cfg,
)
from open_clip.transform import PreprocessCfg
from open_clip.transformer import text_global_pool
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.config import require
from pipeline.errors import DataError, SettingError
from pipeline.loaders.cache import FileCache
from pipeline.loaders.images import ImageTransform
from pipeline.models.towers import (
    convnet,  # noqa: F401 - registers it with timm
    hugging_face_import,
)
from pipeline.models.towers.bert import BertTextTower, WordPieceTokenizer
from pipeline.models.towers.byte_pairs import byte_pair_tokenizer
from pipeline.models.towers.weights import is_numpy_archive, misfit, read_any_weights
from pipeline.shards.storage import Folder

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
WEIGHTS = "model.safetensors"
HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", WEIGHTS)
MODEL_CARD = "open_clip_config.json"  # the file that open_clip.create_model("local-dir:FOLDER") reads
LONGEST_PROBLEM = 400  # characters of open_clip's and torch's messages in ours
SCHEMES = ("local-dir:", "hf-hub:")
OPENAI = ("input_resolution", "context_length", "vocab_size")  # buffers that OpenAI's own class alone has
_FREE = {  # settings of a tower that do not change its features
    "vision_cfg": ("patch_dropout", "timm_model_pretrained", "timm_drop", "timm_drop_path", "output_tokens"),
    "text_cfg": ("hf_model_pretrained", "output_tokens", "word_pieces"),
}

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
            return hugging_face_import.model_config(
                hugging_face_import.parse(theirs.read_text(), name), name, _vocabulary(name)
            )
        config = open_clip.get_model_config(name if ":" in name else plain_name(name))
    except SettingError:
        raise
    except (OSError, ValueError, RecursionError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        if ":" not in name:  # no stranger's file
            raise
        raise SettingError("architecture", name, f"a model config that can be read ({error})") from error
    if config is None:
        known = open_clip.list_models()
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or ["ViT-B-32", "RN50"]
        allowed = f"one of open_clip's {len(known)} architectures, such as {', '.join(near)} (open_clip.list_models())"
        raise SettingError("architecture", name, allowed)
    towers = (config.get(one) for one in ("vision_cfg", "text_cfg")) if isinstance(config, Mapping) else (None,)
    described = all(isinstance(one, Mapping) for one in towers)
    require(described, "architecture", name, f"a {MODEL_CARD} whose model_cfg has objects vision_cfg and text_cfg")
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
            if hasattr(model.visual, "set_input_size"):  # timm's, as open_clip.create_model does
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
    is_theirs = _hugging_face_file(architecture, hugging_face_import.CONFIG) is not None
    files = [path] if path else _own_weights(architecture, is_theirs) if load else []
    is_numpy = path is not None and is_numpy_archive(path)
    allowed = f"weights of torch or safetensors: numpy's are SigLIP's, and {architecture} has no image tower of timm"
    require(not is_numpy or "timm_model_name" in config["vision_cfg"], "pretrained", pretrained, allowed)
    weights = _read_weights(files, architecture, config, place) if files and not is_numpy else None
    if weights and "logit_bias" in weights and logit_bias is None and "init_logit_bias" not in config:
        logit_bias = 0.0
    bias = {} if logit_bias is None else {"init_logit_bias": logit_bias}
    images = _card(place[0]).get("preprocess_cfg", {}) if place else _hugging_face_images(architecture)
    images = {**{key: value for key, value in images.items() if key != "size"}, **(preprocess or {})}
    by_open_clip = load and not files  # it fetches what a tag names
    model: Any
    with _weights_that_fit(architecture, pretrained), _quiet_root_logger():
        if is_theirs or "bert" in config["text_cfg"]:
            model = _instance({**config, **bias}, image_size, context_length, patch_dropout)
            set_model_preprocess_cfg(model, {**preprocessing(model), **images})
        else:
            model = open_clip.create_model(
                architecture,
                pretrained=pretrained if by_open_clip else None,
                load_weights=by_open_clip,
                force_image_size=image_size,
                force_context_length=context_length,
                force_patch_dropout=patch_dropout or None,
                force_preprocess_cfg=images,
                pretrained_image=pretrained_towers and by_open_clip,
                pretrained_text=pretrained_towers and by_open_clip,
                **bias,
            )
        if is_numpy:
            load_big_vision_weights(model, str(path))
    if weights is not None:
        problem = _load(model, weights)
        allowed = f"weights that fit {architecture}; these are {problem}"
        require(not problem, "pretrained", pretrained or architecture, allowed)
    drops = any(type(module).__name__.startswith("PatchDropout") for module in model.visual.modules())
    require(drops or not patch_dropout, "patch_dropout", patch_dropout, f"0, since {architecture} has no patches")
    return cast(nn.Module, model)


def _read_weights(
    files: Sequence[Path], architecture: str, config: Mapping[str, Any], place: tuple[Folder, str] | None
) -> dict[str, Tensor]:
    """The tensors of all ``files``, under open_clip's names."""
    name = place[0].join(place[1]) if place else ""
    found = {key: one for file in files for key, one in read_any_weights(file, name).items()}
    return _renamed(found, architecture, config, place)


@contextmanager
def _weights_that_fit(architecture: str, pretrained: str | None) -> Iterator[None]:
    """Convert what open_clip and torch raise for other weights to a ``SettingError``."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError, OSError, AttributeError, UnpicklingError, SafetensorError) as error:
        problem = " ".join((str(error).strip() or repr(error)).split())[:LONGEST_PROBLEM]
        allowed = f"weights that fit {architecture} ({problem})"
        raise SettingError("pretrained", pretrained or architecture, allowed) from error
    except (TypeError, ArithmeticError) as error:  # of a stranger's model config, but never of ours
        if ":" not in architecture:
            raise
        raise SettingError("architecture", architecture, f"a model config that describes a CLIP ({error})") from error


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
    text = check_architecture(architecture)["text_cfg"]
    length = context_length or text.get("context_length", 77)
    if "word_pieces" in text:
        return WordPieceTokenizer(text["word_pieces"], length, text["lower"])
    special = "hf_tokenizer_name" in text or "tokenizer_kwargs" in text or "siglip" in architecture.lower()
    if not special or _hugging_face_file(architecture, hugging_face_import.CONFIG) is not None:
        return byte_pair_tokenizer(length)
    with _quiet_root_logger():
        return open_clip.get_tokenizer(architecture, context_length=context_length)


def same_tokens(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two model configs name the same tokenizer; the context lengths may differ."""
    texts = one["text_cfg"], other["text_cfg"]
    return all(
        texts[0].get(key) == texts[1].get(key) for key in ("hf_tokenizer_name", "tokenizer_kwargs", "word_pieces")
    )


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


def _renamed(
    weights: dict[str, Tensor], architecture: str, config: Mapping[str, Any], place: tuple[Folder, str] | None
) -> dict[str, Tensor]:
    """Weights of OpenAI's class or of transformers under open_clip's names; ``place`` is a file's, if one was given.

    A file by itself does not show its activation, unless it is OpenAI's; then a warning names the other architecture.

    Raises:
        SettingError: OpenAI's weights for an architecture that open_clip has with QuickGELU, too.
    """
    is_openai = all(name in weights for name in OPENAI)
    if place is not None and _activation_beside(place[0]) is None:
        _check_file_activation(architecture, config, place[0].join(place[1]), True if is_openai else None)
    if is_openai:
        weights = {name: tensor for name, tensor in weights.items() if name not in OPENAI}
    return hugging_face_import.to_open_clip(weights) if hugging_face_import.has_names_of(weights) else weights


def _instance(
    config: Mapping[str, Any], image_size: int | None, context_length: int | None, patch_dropout: float
) -> nn.Module:
    """open_clip's ``CLIP`` for a config that open_clip has no name for, or its towers with a BERT for texts."""
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    vision |= {"image_size": image_size or vision["image_size"], "patch_dropout": patch_dropout}
    text |= {"context_length": context_length or text["context_length"]}
    model: Any
    if "bert" in text:
        longest = text["bert"]["max_position_embeddings"]
        fits = text["context_length"] <= longest
        require(fits, "context_length", text["context_length"], f"at most {longest}, the positions of this text tower")
        small = {"width": 8, "heads": 1, "layers": 1, "vocab_size": 8}  # replaced
        model = open_clip.CustomTextCLIP(**{**config, "vision_cfg": vision, "text_cfg": small})
        model.text = BertTextTower(text["bert"], config["embed_dim"], text["context_length"])
        model.context_length, model.vocab_size = model.text.context_length, model.text.vocab_size
    else:
        model = open_clip.CLIP(**{**config, "vision_cfg": vision, "text_cfg": text})
    set_model_preprocess_cfg(model, {**asdict(PreprocessCfg()), "size": model.visual.image_size})
    return cast(nn.Module, model)


def _hugging_face_file(architecture: str, name: str) -> Path | None:
    """The file ``name`` of a folder or a repository of transformers; ``None`` if there is none, or with open_clip's."""
    if not architecture.startswith(SCHEMES) or file_of(architecture, MODEL_CARD) is not None:
        return None
    return file_of(architecture, name)


def _own_weights(architecture: str, is_theirs: bool) -> list[Path]:
    """The files with the weights of a folder of transformers, or of any repository; open_clip reads its own folders.

    open_clip gives a repository whose weights it does not find random ones.
    """
    if is_theirs:
        return _hugging_face_weights(architecture)
    if not architecture.startswith("hf-hub:"):
        return []
    found = next((file for name in HUB_WEIGHTS if (file := file_of(architecture, name)) is not None), None)
    if found is None:
        raise SettingError("architecture", architecture, f"a repository with {', '.join(HUB_WEIGHTS)}")
    return [found]


def _hugging_face_weights(architecture: str) -> list[Path]:
    """The files with the weights of a folder or a repository of transformers, which may be in parts."""
    for name in hugging_face_import.WEIGHTS:
        file = _hugging_face_file(architecture, name)
        if file is not None:
            return [file]
    index = _hugging_face_file(architecture, hugging_face_import.INDEX)
    parts = hugging_face_import.parts_of(index.read_text(), architecture) if index else []
    files = [file for part in parts if (file := _hugging_face_file(architecture, part)) is not None]
    allowed = f"a folder with {' or '.join(hugging_face_import.WEIGHTS)}, or all parts of {hugging_face_import.INDEX}"
    require(bool(files) and len(files) == len(parts), "architecture", architecture, allowed)
    return files


def _vocabulary(architecture: str) -> hugging_face_import.WordPieces | None:
    names = hugging_face_import.VOCABULARY, hugging_face_import.TOKENIZER, hugging_face_import.TOKENIZER_CONFIG
    files = (_hugging_face_file(architecture, name) for name in names)
    words, pieces, config = (file.read_text("utf-8") if file else None for file in files)
    return hugging_face_import.read_vocabulary(words, pieces, config, architecture)


def _hugging_face_images(architecture: str) -> Mapping[str, Any]:
    file = _hugging_face_file(architecture, hugging_face_import.IMAGES)
    return hugging_face_import.image_settings(hugging_face_import.parse(file.read_text(), architecture)) if file else {}


def file_of(architecture: str, name: str) -> Path | None:
    """The file ``name`` of ``local-dir:FOLDER``, or downloaded from ``hf-hub:REPO``; ``None`` if there is none.

    Raises:
        SettingError: a repository that cannot be read.
    """
    scheme, _, place = architecture.partition(":")
    if scheme == "local-dir":
        path = Path(place) / name
        return path if path.is_file() else None
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(place, name))
    except EntryNotFoundError as error:
        # The hub did not answer, which does not mean that it has no such file; offline the cache is all there is.
        if isinstance(error, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE:
            raise _unreadable_repository(architecture, error) from error
        return None
    except (OSError, ValueError) as error:
        raise _unreadable_repository(architecture, error) from error


def _unreadable_repository(architecture: str, error: Exception) -> SettingError:
    said = " ".join(str(error).split())[:LONGEST_PROBLEM]
    return SettingError("architecture", architecture, f"a repository of the hub that can be read ({said})")


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
    if ":" not in architecture and open_clip.is_pretrained_cfg(plain_name(architecture), pretrained):
        tag = open_clip.get_pretrained_cfg(plain_name(architecture), pretrained)
        _check_activation(plain_name(architecture), config, bool(tag.get("quick_gelu", False)), pretrained)
        return None
    if ":" in architecture:
        raise SettingError("pretrained", pretrained, f"nothing, since {architecture} has its own weights")
    parent, _, name = pretrained.rstrip("/").rpartition("/")
    folder = Folder(parent or ("/" if pretrained.startswith("/") else "."))
    file = next((file for file in hugging_face_import.WEIGHTS if folder.exists(f"{name}/{file}")), None)
    if file is not None:
        folder, name = folder.folder(name), file
        quick = _activation_beside(folder)
        if quick is not None:
            _check_activation(plain_name(architecture), config, quick, pretrained)
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


def _activation_beside(folder: Folder) -> bool | None:
    """Whether the model's description in ``folder`` names QuickGELU; ``None`` without one."""
    if card := _card(folder):
        return bool(card["model_cfg"].get("quick_gelu", False))
    if not folder.exists(hugging_face_import.CONFIG):
        return None
    name = folder.join(hugging_face_import.CONFIG)
    return hugging_face_import.is_quick(hugging_face_import.parse(folder.read_text(hugging_face_import.CONFIG), name))


def _check_activation(architecture: str, config: Mapping[str, Any], weights_quick: bool, pretrained: str) -> None:
    """OpenAI's weights need QuickGELU; with the usual GELU they load without an error and perform worse.

    Where open_clip has no such architecture with the weights' activation, the config of the architecture decides.
    """
    right = _with_activation(architecture, weights_quick)
    if weights_quick != bool(config.get("quick_gelu", False)) and right is not None:
        raise SettingError(
            "architecture", architecture, f"{right}, since the weights {pretrained} were trained with it"
        )


def _check_file_activation(architecture: str, config: Mapping[str, Any], file: str, weights_quick: bool | None) -> None:
    """As :func:`_check_activation`; warns where a file does not show its activation, or no name has it."""
    model_quick = bool(config.get("quick_gelu", False))
    other = _with_activation(plain_name(architecture), not model_quick)
    if weights_quick is not None:
        _check_activation(plain_name(architecture), config, weights_quick, file)
        if weights_quick != model_quick:
            logger.warning("%s is of OpenAI's CLIP, which has QuickGELU; %s has GELU", file, architecture)
    elif other is not None:
        ours = "QuickGELU" if model_quick else "GELU"
        text = "%s does not show its activation: it is used with %s, that of %s; the other one is %s"
        logger.warning(text, file, ours, architecture, other)


def _with_activation(architecture: str, quick: bool) -> str | None:
    """The name of this architecture with (or without) QuickGELU, if open_clip has one of another name."""
    plain = architecture.removesuffix("-quickgelu")
    name = f"{plain}-quickgelu" if quick else plain
    return name if name != architecture and name in open_clip.list_models() else None


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
