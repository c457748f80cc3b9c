"""Point clouds of a report: values for its histograms, and views of examples."""

import base64

import numpy as np
import simplejpeg

from pipeline.errors import SampleError
from pipeline.shards.clouds import cloud_points, extent_of
from pipeline.shards.media import POINTS
from pipeline.shards.sample import Sample

EXAMPLE_SIZE = 96  # pixels of each view


def cloud_values(sample: Sample) -> dict[str, float] | None:
    """Number of points, largest distance from their mean, and bytes; None for an unreadable cloud."""
    body = sample.body(POINTS)
    if body is None:
        return {}
    try:
        points = cloud_points(body)
    except SampleError:
        return None
    return {
        "cloud_points": float(len(points)),
        "cloud_extent": extent_of(points),
        "cloud_bytes": float(len(body)),
    }


def example_cloud(body: bytes) -> tuple[str, int, int] | None:
    """Six views of a cloud, in two rows, as JPEG in base64, with width and height; None for an unreadable one."""
    import torch  # reports of other media do not need it

    from pipeline.codecs.point_views import depth_image

    try:
        points = cloud_points(body)
    except SampleError:
        return None
    pixels = depth_image(torch.from_numpy(np.array(points)), size=EXAMPLE_SIZE)
    rows = torch.cat(pixels.split(3 * EXAMPLE_SIZE, dim=2), dim=1).permute(1, 2, 0).contiguous().numpy()
    image = simplejpeg.encode_jpeg(rows, quality=85, colorspace="RGB")
    return base64.b64encode(image).decode(), rows.shape[1], rows.shape[0]
