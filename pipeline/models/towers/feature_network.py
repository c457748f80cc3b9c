"""A frozen network whose features say how alike images are: an image tower of CLIP, or a model of timm.

Addresses:

- ``ARCHITECTURE:WEIGHTS`` of a CLIP, as a teacher's; images are resized to its size;
- ``timm:NAME`` with timm's own weights, or ``timm:NAME:FILE`` with those of a file; images keep their size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import near, require
from pipeline.errors import SettingError
from pipeline.loaders.cache import FileCache
from pipeline.models import class_vectors
from pipeline.shards.storage import split_file

TIMM = "timm:"


class FeatureNetwork(nn.Module):
    """The network at an address, always in evaluation mode; its weights are part of no checkpoint.

    Raises:
        SettingError: no such network, or weights of another one; ``field`` is the name of the option.
        DataError: a damaged file.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, address: str, field: str = "network") -> None:
        super().__init__()
        self.size: tuple[int, int] | None = None
        self.body: Any
        if address.startswith(TIMM):
            self.body = _timm_model(address, field)
            mean, std = self.body.pretrained_cfg["mean"], self.body.pretrained_cfg["std"]
        else:
            clip = class_vectors.open_teacher(address, field)
            self.body, self.size = clip.model.visual, clip.transforms(train=False).size
            mean, std = clip.mean.flatten() / 255, clip.std.flatten() / 255
        self.address, self.field = address, field
        self.register_buffer("mean", torch.as_tensor(mean).float().view(1, 3, 1, 1).clone())
        self.register_buffer("std", torch.as_tensor(std).float().view(1, 3, 1, 1).clone())
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: Any = None, **settings: Any) -> Any:
        """Nothing."""
        return {} if destination is None else destination

    def module(self, name: str) -> nn.Module:
        """The part of the network with this name.

        Raises:
            SettingError: there is none.
        """
        known: dict[str, nn.Module] = dict(self.body.named_modules())
        if name not in known or not name:
            some = ", ".join(one for one in known if one and one.count(".") <= 1)[:300]
            allowed = f"modules of {self.address}, such as {some}{near(name, known)}"
            raise SettingError(f"{self.field}_layers", name, allowed)
        return known[name]

    def layers(self, images: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Outputs of the modules ``names`` for images float [N, 3, H, W] from 0 to 1: each float [N, C, ...].

        A vision transformer's tokens [N, L, C] become [N, C, L]. Gradients reach the images.
        """
        with recorded({name: self.module(name) for name in names}) as found:
            inputs = self._inputs(images)
            self.body(inputs) if self.size else self.body.forward_features(inputs)
        outputs = in_order(found, names, f"{self.field}_layers")
        return [one.mT if one.ndim == 3 else one for one in outputs]

    def vectors(self, images: Tensor) -> Tensor:
        """The last features of images float [N, 3, H, W] from 0 to 1: float32 [N, D].

        Those of a CLIP are in its embedding space, not normalised; those of timm are what its classifier reads.
        """
        inputs = self._inputs(images)
        if self.size:
            found = self.body(inputs)
        else:
            found = self.body.forward_head(self.body.forward_features(inputs), pre_logits=True)
        found = found[0] if isinstance(found, tuple) else found
        vectors: Tensor = found.float()
        return vectors

    def _inputs(self, images: Tensor) -> Tensor:
        if self.size and images.shape[-2:] != self.size:
            images = functional.interpolate(images, self.size, mode="bicubic", antialias=True)
        return (images - self.mean) / self.std


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """The outputs of modules by their names, filled while they run within the context; the last one of each."""
    found: dict[str, Any] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, __, out: found.update({name: out})

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def in_order(found: Mapping[str, Any], names: Sequence[str], field: str) -> list[Tensor]:
    """The recorded outputs of the layers ``names``, in this order.

    Raises:
        SettingError: a layer that did not run, or whose output is no tensor; ``field`` is the name of the option.
    """
    for name in names:
        require(isinstance(found.get(name), Tensor), field, name, "layers that run and have a tensor as their output")
    return [found[name] for name in names]


def check_address(address: str, field: str = "network") -> None:
    """Raise ``SettingError`` for an address of no network; builds and downloads nothing."""
    if not address.startswith(TIMM):
        class_vectors.check(address, field)
        return
    name, _, file = address.removeprefix(TIMM).partition(":")
    known = timm.list_models(name.partition(".")[0])
    require(bool(known), field, address, f"{TIMM}NAME or {TIMM}NAME:FILE with a model of timm")
    if file:
        folder, last = split_file(file)
        require(folder.exists(last), field, address, "a file that exists")


def _timm_model(address: str, field: str) -> nn.Module:
    check_address(address, field)
    name, _, file = address.removeprefix(TIMM).partition(":")
    # timm converts other layouts of the weights, such as torchvision's, by rules of each of its models.
    place: dict[str, Any] = {"pretrained_cfg_overlay": {"file": str(_fetched(file))}} if file else {}
    try:
        with torch.random.fork_rng():
            model: nn.Module = timm.create_model(name, pretrained=True, **place)
    except (RuntimeError, ValueError, KeyError, OSError, EOFError, UnpicklingError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise SettingError(field, address, f"weights of timm's {name} ({first})") from error
    return model


def _fetched(file: str) -> Path:
    folder, name = split_file(file)
    return FileCache().fetch(folder, name)
