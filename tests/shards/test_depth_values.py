"""``depth.png``: values by Pillow, and files that are none."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.shards.depth_values import decode_depth, depth_size, depth_values, encode_depth


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    return buffer.getvalue()


def made_png(width: int, height: int, body: bytes) -> bytes:
    """A grey PNG of 16 bits with these compressed rows."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


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


def test_sizes_are_read_from_the_header() -> None:
    assert depth_size(made_png(70_000, 3, b"")) == (3, 70_000)
    jpeg = io.BytesIO()
    Image.new("L", (2, 2)).save(jpeg, format="JPEG")
    for other in (b"", b"no image", jpeg.getvalue()):
        with pytest.raises(DataError, match="not a PNG"):
            depth_size(other)


def test_a_small_file_of_many_pixels_is_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """64,008,000 black pixels are 125 kB, and decoded would be 128 MB; a header may claim any size."""
    packer = zlib.compressobj(1)
    band = bytes(1 + 2 * 8000) * 127
    bomb = made_png(8000, 8001, b"".join(packer.compress(band) for _ in range(63)) + packer.flush())
    assert len(bomb) < 1_000_000
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
        for content, size in ((bomb, "8000 x 8001"), (made_png(32_768, 32_768, b""), "32768 x 32768")):
            with pytest.raises(DataError, match=f"{size} pixels, more than 64000000"):
                decode_depth(content)
    with pytest.raises(DataError):
        decode_depth(made_png(2**31 - 1, 2**31 - 1, b""))
    assert decode_depth(made_png(3, 2, zlib.compress(bytes(14)))).tolist() == [[0, 0, 0], [0, 0, 0]]
