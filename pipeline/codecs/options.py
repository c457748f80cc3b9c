"""The options of all codecs, as one dataclass with a field for each medium."""

from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any

from pipeline.codecs import codec_names, codec_of
from pipeline.config import require


@dataclass(frozen=True, kw_only=True)
class EveryMedium:
    """What :class:`MediaOptions` has besides its fields."""

    def of(self, medium: str) -> Any:
        """The options of the codec of ``medium``.

        Raises:
            SettingError: there is no such codec.
        """
        require(medium in vars(self), "medium", medium, "one of " + ", ".join(vars(self)))
        return vars(self)[medium]


def media_options_class() -> type[EveryMedium]:
    """:class:`MediaOptions`, made of the codecs that exist."""
    kinds = {medium: codec_of(medium).options for medium in codec_names()}
    fields: list[tuple[str, Any, Any]] = [(name, kind, field(default_factory=kind)) for name, kind in kinds.items()]
    made = make_dataclass("MediaOptions", fields, bases=(EveryMedium,), frozen=True, kw_only=True)
    made.__module__, made.__doc__ = __name__, "Options of all codecs, by medium."
    return made


if TYPE_CHECKING:

    class MediaOptions(EveryMedium):
        """Options of all codecs, by medium: :func:`media_options_class`."""

        def __init__(self, **options: Any) -> None: ...

        def __getattr__(self, medium: str) -> Any: ...

else:
    MediaOptions = media_options_class()
