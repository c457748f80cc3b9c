"""A model that turns stored pictures and captions into features: what ``stages/embeddings.py`` is handed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pipeline.evaluation.encoder import inference
from pipeline.evaluation.models import load_model
from pipeline.evaluation.suite import Evaluable
from pipeline.loaders.images import decode
from pipeline.loaders.samples import UnreadableSample
from pipeline.loaders.text import cut_text

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class LoadEmbedder:
    """Loads the model at ``checkpoint`` (see :func:`pipeline.evaluation.models.load_model`) where it is called."""

    checkpoint: str
    device: str = "auto"
    precision: Precision = "fp32"

    def __call__(self, threads: int) -> "ModelEmbedder":
        """``threads`` is the number of CPU threads for the model, where no GPU computes."""
        model = load_model(self.checkpoint, self.device)
        if not torch.cuda.is_available() or self.device == "cpu":
            torch.set_num_threads(threads)
        return ModelEmbedder(model, self.precision)


class ModelEmbedder:
    """A model with its own transform of evaluation and its own tokenizer."""

    def __init__(self, model: Evaluable, precision: Precision = "fp32") -> None:
        self._model, self._precision = model, precision
        self._transform = model.transforms(train=False)
        self.maker = digest_of(model, repr(self._transform), precision)

    def prepare(self, picture: bytes) -> Tensor | None:
        """The picture as uint8 [3, H, W]; ``None`` where it cannot be decoded."""
        try:
            return self._transform(decode(picture))
        except UnreadableSample:
            return None

    def encode_image(self, pictures: Sequence[Tensor]) -> NDArray[np.float32]:
        """uint8 B × [3, H, W] -> L2-normalised [B, D]."""
        with inference(self._model, self._precision) as device:
            return _normalised(self._model.encode_image(torch.stack(list(pictures)).to(device)))

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """B texts -> L2-normalised [B, D]."""
        tokens = cut_text(self._model.tokenizer(list(texts)), getattr(self._model, "end_of_text", None))
        with inference(self._model, self._precision) as device:
            return _normalised(self._model.encode_text(tokens.to(device)))


def digest_of(model: Evaluable, *settings: str) -> str:
    """SHA-256 hex of all weights and buffers by name, of the tokenizer's kind, and of ``settings``."""
    digest = hashlib.sha256(repr([type(model.tokenizer).__name__, *settings]).encode())
    state = model.state_dict() if isinstance(model, nn.Module) else {}
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(memoryview(plain))
    return digest.hexdigest()


def _normalised(features: Tensor) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = functional.normalize(features.float(), dim=-1).cpu().numpy()
    return unit
