"""Codecs: bytes of a medium -> fields of a sample and columns of its row; one file for each medium, found by name."""

import pkgutil
from functools import cache
from importlib import import_module
from typing import cast

from pipeline.codecs.codec import AnyCodec
from pipeline.config import require
from pipeline.shards.media import MEDIA


@cache
def codec_of(medium: str) -> AnyCodec:
    """The codec of a medium. Imports only its own module.

    Raises:
        SettingError: an unknown medium.
    """
    require(medium in codec_names(), "medium", medium, "one of " + ", ".join(codec_names()))
    name = f"{__name__}.{medium}"
    found = (value for value in vars(import_module(name)).values() if isinstance(value, type))
    made = next(value for value in found if value.__module__ == name and getattr(value, "medium", None) == medium)
    return cast(AnyCodec, made())


@cache
def codec_names() -> tuple[str, ...]:
    """The media with a codec, in the order of :data:`pipeline.shards.media.MEDIA`."""
    modules = {module.name for module in pkgutil.iter_modules(__path__)}
    return tuple(medium for medium in MEDIA if medium in modules)
