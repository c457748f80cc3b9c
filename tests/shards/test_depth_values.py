"""``depth.png``: values by Pillow, and files that are none."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.shards.depth_values import decode_depth, depth_values, encode_depth


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    return buffer.getvalue()


NOISE = png(np.random.default_rng(0).integers(0, 65_535, (30, 30), np.uint16))


def test_metres_become_millimetres_and_pillow_reads_them() -> None:
    metres = np.array([[1.2346, 0.0004], [65.535, 0.001]], np.float32)
    stored = np.asarray(Image.open(io.BytesIO(encode_depth(metres))))
    assert stored.tolist() == [[1235, 0], [65535, 1]]
    assert np.abs(decode_depth(encode_depth(metres)) - metres).max() <= 0.0005 + 1e-6
    assert decode_depth(encode_depth(metres)).dtype == np.float32


def test_what_is_no_distance_is_missing() -> None:
    metres = np.array([[np.nan, np.inf, -np.inf], [-1, 0, 2]], np.float32)
    assert decode_depth(encode_depth(metres)).tolist() == [[0, 0, 0], [0, 0, 2]]


def test_of_a_known_unit_distances_too_far_are_missing_unless_most_are() -> None:
    """Half of the known ones may be; missing ones do not count."""
    metres = np.array([[65.5354, 65.5356, 80.0], [3.0, np.nan, 0.0]])
    assert decode_depth(encode_depth(metres, unit_known=True)).round(3).tolist() == [
        [np.float32(65.535), 0, 0],
        [3, 0, 0],
    ]
    metres[0, 0] = 70
    with pytest.raises(DataError, match="3 of 4 distances are more than 65.535 m, the largest 80 m"):
        encode_depth(metres, unit_known=True)


def test_a_file_by_pillow_is_read_as_it_is() -> None:
    values = np.array([[0, 1, 256], [1000, 40_000, 65_535]], np.uint16)
    assert depth_values(png(values)).tolist() == values.tolist()
    assert decode_depth(png(values))[1, 0] == 1.0


def test_other_units_and_files_are_refused() -> None:
    with pytest.raises(DataError, match="a distance is more than 65.535 m, the largest 1234 m"):
        encode_depth(np.array([[1234.0, 2.0, 2.0]]))  # millimetres
    for values in (np.zeros((2, 2), np.uint8), np.zeros((2, 2), bool)):
        with pytest.raises(DataError, match="8 bits or fewer"):
            decode_depth(png(values))
    with pytest.raises(DataError, match="RGB"):
        decode_depth(png(np.zeros((2, 2, 3), np.uint8)))
    for broken in (b"", b"no image", NOISE[: len(NOISE) // 2]):
        with pytest.raises(DataError):
            decode_depth(broken)
    with pytest.raises(DataError, match="more than 3"):
        decode_depth(png(np.zeros((2, 2), np.uint16)), most_pixels=3)
