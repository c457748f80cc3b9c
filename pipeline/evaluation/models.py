"""The model that is evaluated, by its address."""

from typing import cast

import torch

from pipeline.config import require
from pipeline.evaluation.suite import Evaluable
from pipeline.models.class_vectors import UNTRAINED, untrained
from pipeline.models.method import Method
from pipeline.training.checkpoint import checkpoint_folder, load_method, read_meta


def load_model(address: str, device: str = "auto") -> Evaluable:
    """A method in evaluation mode on ``device`` (``auto``: a GPU where there is one).

    ``address`` is what :func:`pipeline.training.checkpoint.load_method` takes (a checkpoint's or a run's folder, or an
    open_clip ``ARCHITECTURE:WEIGHTS``), or ``ARCHITECTURE:untrained``: random weights, always the same ones, the
    baseline that any training has to beat.

    Raises:
        SettingError: none of these, or a model without towers for pictures and texts.
        DataError: a damaged checkpoint.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if address.endswith(UNTRAINED):
        method: Method = untrained(address.removesuffix(UNTRAINED)).to(device).eval()
    else:
        method = load_method(address, device)
    both = all(callable(getattr(method, name, None)) for name in ("encode_image", "encode_text"))
    require(both, "checkpoint", address, "a model that encodes pictures and texts")
    return cast(Evaluable, method)


def trained_steps(address: str) -> int | None:
    """The step at which the checkpoint at ``address`` was made; ``None`` for what is no checkpoint of ours."""
    folder = checkpoint_folder(address)
    meta = read_meta(folder) if folder else None
    return meta.step if meta else None
