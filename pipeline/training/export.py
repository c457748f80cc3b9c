"""A trained method as a folder for another library: open_clip, or transformers with its ``CLIPModel`` and others."""

import logging
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.config import require
from pipeline.models.method import Method
from pipeline.models.towers import hugging_face, openclip
from pipeline.models.towers.bert import BertTextTower
from pipeline.shards.storage import Folder, storage_errors
from pipeline.training.checkpoint import META

logger = logging.getLogger(__name__)

Format = Literal["open_clip", "hugging_face"]


def export(method: Method, folder: Folder, kind: Format) -> None:
    """Write ``method.model`` into ``folder``, the weights first; overwrites files of an earlier export.

    ``open_clip``: for ``open_clip.create_model("local-dir:FOLDER")``. ``hugging_face``: for ``from_pretrained`` of
    ``CLIPModel`` and ``CLIPProcessor``, or of the class of transformers that the method is built from.

    Raises:
        SettingError: not a model of open_clip or transformers, a model that ``CLIPModel`` cannot express, or a folder
            that holds a checkpoint, whose files would be lost.
        StorageError: the folder cannot be written.
    """
    require(not folder.exists(META), "output", folder.uri, "a folder that is not a checkpoint itself")
    tensors, texts = _files(method, kind)
    with folder.scratch_file(".safetensors") as path, storage_errors(folder.uri):
        save_file(tensors, path, metadata={"format": "pt"})  # transformers requires this entry
        folder.write_atomic(openclip.WEIGHTS, path)
    for name, text in texts.items():
        folder.write_atomic(name, text.encode())
    logger.info("%s for %s: %s", folder.uri, kind, ", ".join([openclip.WEIGHTS, *texts]))


def _files(method: Method, kind: Format) -> tuple[dict[str, Tensor], dict[str, str]]:
    model: Any = getattr(method, "model", None)
    theirs = method.transformers_files()
    if theirs is not None:
        require(kind == "hugging_face", "format", kind, f"hugging_face, the library of {type(method).__name__}'s model")
        return _copied(model), dict(theirs)
    texts = dict(method.description())
    require(openclip.MODEL_CARD in texts, "checkpoint", type(method).__name__, "a method around a model of open_clip")
    has_bert = isinstance(getattr(model, "text", None), BertTextTower)
    require(not has_bert, "format", kind, "none: a model with Chinese-CLIP's text tower is used from its checkpoint")
    if model.logit_bias is not None and kind == "hugging_face":
        logger.info("the bias of the sigmoid loss, %.3f, is in config.json only", model.logit_bias.item())
    if kind == "hugging_face":
        return hugging_face.convert(model, method.tokenizer)
    return _copied(model), texts


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
