"""Loads the evaluated model by its address."""

import torch

from pipeline.config import require
from pipeline.evaluation.detection import as_detector
from pipeline.evaluation.encoder import Evaluable, as_encoder
from pipeline.evaluation.grounding import as_grounder
from pipeline.evaluation.segmentation import as_segmenter
from pipeline.models.class_vectors import UNTRAINED, untrained
from pipeline.models.detections import Detector, Grounder
from pipeline.models.method import Method
from pipeline.models.segments import Segmenter
from pipeline.training.checkpoint import checkpoint_folder, load_method, read_meta


def usable_device(wanted: str) -> str:
    """``cpu`` or ``cuda`` for ``wanted``; ``auto`` is a GPU if available.

    Raises:
        SettingError: ``cuda`` without a GPU.
    """
    some = torch.cuda.is_available()
    require(some or wanted != "cuda", "device", wanted, "cpu or auto: this machine has no GPU that torch can use")
    return ("cuda" if some else "cpu") if wanted == "auto" else wanted


def load_any(address: str, device: str = "auto") -> Method:
    """A method in evaluation mode on ``device`` (``auto``: a GPU if available).

    ``address`` is an address of :func:`pipeline.training.checkpoint.load_method` (a checkpoint's or a run's folder, or
    an open_clip ``ARCHITECTURE:WEIGHTS``), or ``ARCHITECTURE:untrained``: random weights of a fixed seed, the baseline
    of any training.

    Raises:
        SettingError: none of these, or no such device.
        DataError: a damaged checkpoint.
    """
    device = usable_device(device)
    if address.endswith(UNTRAINED):
        return untrained(address.removesuffix(UNTRAINED)).to(device).eval()
    return load_method(address, device)


def load_model(address: str, device: str = "auto") -> Evaluable:
    """:func:`load_any` of a method with image and text towers; ``SettingError`` for other methods."""
    return as_encoder(load_any(address, device), address)


def load_detector(address: str, device: str = "auto") -> Detector:
    """:func:`load_any` of a detector; ``SettingError`` for other methods."""
    return as_detector(load_any(address, device), address)


def load_grounder(address: str, device: str = "auto") -> Grounder:
    """:func:`load_any` of a method that grounds phrases; ``SettingError`` for other methods."""
    return as_grounder(load_any(address, device), address)


def load_segmenter(address: str, device: str = "auto") -> Segmenter:
    """:func:`load_any` of a segmenter or a CLIP with patches; ``SettingError`` for other methods."""
    return as_segmenter(load_any(address, device), address)


def trained_steps(address: str) -> int | None:
    """The step of the checkpoint at ``address``; ``None`` if it is not a checkpoint of ours."""
    folder = checkpoint_folder(address)
    meta = read_meta(folder) if folder else None
    return meta.step if meta else None
