"""The model that is evaluated, by its address."""

import torch

from pipeline.evaluation.detection import as_detector
from pipeline.evaluation.encoder import Evaluable, as_encoder
from pipeline.models.class_vectors import UNTRAINED, untrained
from pipeline.models.detections import Detector
from pipeline.models.method import Method
from pipeline.training.checkpoint import checkpoint_folder, load_method, read_meta


def load_any(address: str, device: str = "auto") -> Method:
    """A method in evaluation mode on ``device`` (``auto``: a GPU where there is one).

    ``address`` is what :func:`pipeline.training.checkpoint.load_method` takes (a checkpoint's or a run's folder, or an
    open_clip ``ARCHITECTURE:WEIGHTS``), or ``ARCHITECTURE:untrained``: random weights, always the same ones, the
    baseline that any training has to beat.

    Raises:
        SettingError: none of these.
        DataError: a damaged checkpoint.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if address.endswith(UNTRAINED):
        return untrained(address.removesuffix(UNTRAINED)).to(device).eval()
    return load_method(address, device)


def load_model(address: str, device: str = "auto") -> Evaluable:
    """:func:`load_any` of a method with towers for images and texts; ``SettingError`` for one without."""
    return as_encoder(load_any(address, device), address)


def load_detector(address: str, device: str = "auto") -> Detector:
    """:func:`load_any` of a method that finds things in images; ``SettingError`` for another."""
    return as_detector(load_any(address, device), address)


def trained_steps(address: str) -> int | None:
    """The step at which the checkpoint at ``address`` was made; ``None`` for what is no checkpoint of ours."""
    folder = checkpoint_folder(address)
    meta = read_meta(folder) if folder else None
    return meta.step if meta else None
