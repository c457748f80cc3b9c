"""The codec of point clouds: a cloud or mesh is checked, reduced and stored as float32 [N, 3] in a ``.npy`` file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pipeline.codecs.codec import Codec, Encoded
from pipeline.config import require
from pipeline.shards.clouds import (
    MOST_POINTS,
    NPY,
    SURFACE,
    Points,
    bad_cloud,
    check_extent,
    cloud_points,
    extent_of,
    on_surface,
    random_of,
    read_cloud,
    subset,
    write_npy,
)
from pipeline.shards.media import POINTS
from pipeline.shards.segments import Segment

_FIELD = POINTS.endings[0]
_POINT = 512  # bytes: the columns of a point and of a face in float64, their coordinates in float32 and int64, copies


@dataclass(frozen=True, kw_only=True)
class PointsOptions:
    """Options of checking and encoding point clouds."""

    points_count: int = 0
    """Most points of a stored cloud, at most 4,000,000; of a larger one a random subset, chosen by its content, is
    stored. 0 keeps all points."""
    points_surface: int = SURFACE
    """Points on the faces of a mesh, 1 to 4,000,000: uniform by area, chosen by the content of the file."""
    points_min: int = 2
    """Fewest points of a cloud, 2 or more; smaller ones fail."""
    points_max: int = 1_000_000
    """Most points or faces of a cloud before it is reduced, at most 4,000,000; larger ones fail."""

    def __post_init__(self) -> None:
        require(0 <= self.points_count <= MOST_POINTS, "points_count", self.points_count, f"0 to {MOST_POINTS:,}")
        require(1 <= self.points_surface <= MOST_POINTS, "points_surface", self.points_surface, f"1 to {MOST_POINTS:,}")
        require(2 <= self.points_min <= MOST_POINTS, "points_min", self.points_min, f"2 to {MOST_POINTS:,}")
        require(
            self.points_min <= self.points_max <= MOST_POINTS,
            "points_max",
            self.points_max,
            f"points_min to {MOST_POINTS:,}",
        )


class PointsCodec(Codec[PointsOptions, Points]):
    """See :class:`~pipeline.codecs.codec.Codec`. Coordinates keep the units and the axes of the file."""

    medium: ClassVar[str] = "points"
    options: ClassVar[type] = PointsOptions
    limit: ClassVar[str] = "--points-max"
    columns: ClassVar[Mapping[str, type]] = {
        "points_count": int,
        "points_original_count": int,
        "points_faces": int,
        "points_extent": float,
    }

    def encode(self, body: bytes, options: PointsOptions, segment: Segment | None = None) -> Encoded:
        """One field, ``points.npy``; ``points_extent`` is the largest distance from the mean of the points.

        Error classes: those of :func:`~pipeline.shards.clouds.read_cloud`; too_few, too_many, no_extent.
        """
        cloud = read_cloud(body)
        count = len(cloud.points)
        if max(count, len(cloud.faces)) > options.points_max:
            bad_cloud("too_many", "more points or faces than --points-max")
        check_extent(cloud.points)
        bits = random_of(body)
        points = on_surface(cloud, options.points_surface, bits) if len(cloud.faces) else cloud.points
        if len(points) < options.points_min:
            bad_cloud("too_few", "fewer points than --points-min")
        points = subset(points, options.points_count or len(points), bits)
        check_extent(points)
        columns = {
            "points_count": len(points),
            "points_original_count": count,
            "points_faces": len(cloud.faces),
            "points_extent": extent_of(points),
        }
        return Encoded({_FIELD: write_npy(points)}, columns)

    def decode(self, body: bytes) -> Points:
        """float32 [N, 3]; of a mesh, points on its surface."""
        return cloud_points(body)

    def needs_care(self, body: bytes) -> bool:
        """PLY and OFF, whose texts and polygons take more memory and time than arrays."""
        return not body.startswith(NPY)

    def memory(self, options: PointsOptions) -> int:
        """The numbers of all points and faces, and the points on a surface."""
        return _POINT * options.points_max + 256 * options.points_surface + (64 << 20)
