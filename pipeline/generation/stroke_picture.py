"""Images made of strokes, as parameters of an optimisation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import require
from pipeline.generation.curves import Strokes
from pipeline.generation.loop import Picture
from pipeline.generation.strokes import render
from pipeline.generation.svg import write_svg


@dataclass(frozen=True, kw_only=True)
class StrokeRates:
    """Learning rates of Adam; 0 fixes what it is for."""

    points: float = 1.0
    """Rate of control points, in pixels."""
    widths: float = 0.0
    """Rate of widths, in pixels."""
    colours: float = 0.0
    """Rate of red, green, blue and alpha, which are 0 to 1."""

    def __post_init__(self) -> None:
        for name in ("points", "widths", "colours"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        require(max(self.points, self.widths, self.colours) > 0, "rates", 0, "one rate above 0")


class StrokePicture(Picture):
    """N images of S strokes each on a white square."""

    def __init__(
        self,
        start: Strokes,
        side: int,
        rates: StrokeRates,
        widths: tuple[float, float] = (1.0, 50.0),
        falls: Sequence[tuple[float, float]] = (),
    ) -> None:
        """``widths`` are the limits of trained widths; ``falls`` pairs of a part of the steps, and the factor of the
        points' rate from there on."""
        super().__init__()
        self.side, self.limits, self.falls, self.trained = side, widths, falls, rates
        self.points = nn.Parameter(start.points, requires_grad=rates.points > 0)
        self.widths = nn.Parameter(start.widths, requires_grad=rates.widths > 0)
        self.colours = nn.Parameter(start.colours, requires_grad=rates.colours > 0)
        self.register_buffer("segments", start.counts())

    def strokes(self) -> Strokes:
        """The scene as it is."""
        segments: Any = self.segments
        return Strokes(points=self.points, widths=self.widths, colours=self.colours, segments=segments)

    def render(self) -> Tensor:
        """Over white."""
        return render(self.strokes(), self.side, self.side)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Those with a rate."""
        named = {name: getattr(self.trained, name) for name in ("points", "widths", "colours")}
        return [{"params": [getattr(self, name)], "lr": rate} for name, rate in named.items() if rate > 0]

    def rates(self, progress: float) -> Sequence[float]:
        """The points' rate falls."""
        factor = next((factor for since, factor in reversed(self.falls) if progress >= since), 1.0)
        is_points = [group["params"][0] is self.points for group in self.parameter_groups()]
        return [factor if points else 1.0 for points in is_points]

    @torch.no_grad()
    def after_step(self) -> None:
        """Widths within their limits, colours within 0 and 1."""
        self.widths.clamp_(*self.limits) if self.trained.widths else None
        self.colours.clamp_(0, 1) if self.trained.colours else None

    def drawings(self) -> list[str]:
        """One SVG for each image."""
        return write_svg(self.strokes(), self.side, self.side)
