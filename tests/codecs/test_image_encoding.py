"""Image transforms compared with img2dataset's own Resizer and with Pillow, and tested with hostile bytes."""

import io
import itertools
import json
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image, ImageOps

from pipeline.codecs import image_encoding as images
from pipeline.codecs.image_encoding import EncodedImage, ImageOptions, plan, transform
from pipeline.errors import SampleError, SettingError
from pipeline.shards.pixels import composite, jpeg_scans, read_header

Array = npt.NDArray[np.uint8]
MODES = ["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]


def photo(width: int, height: int, seed: int = 0) -> Array:
    """Red-green-blue pixels of a photograph (scikit-learn's two), scaled, with the noise of a sensor."""
    from sklearn.datasets import load_sample_images

    generator = np.random.default_rng(seed)
    scene = load_sample_images().images[seed % 2]
    scaled = cv2.resize(scene, (width, height), interpolation=cv2.INTER_CUBIC).astype(float)
    return (scaled + generator.normal(0, 2, (height, width, 1))).clip(0, 255).astype(np.uint8)


def drawing(width: int, height: int) -> Array:
    """Gradients, hard edges and text-like strokes."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 // max(1, height - 1), columns * 255 // max(1, width - 1), (rows + columns) % 256], 2)
    pixels = pixels.astype(np.uint8)
    for step in range(0, width, max(8, width // 12)):
        cv2.line(pixels, (step, 0), (width - step, height), (255, 255, 255), 2)
        cv2.circle(pixels, (step, height // 2), max(2, height // 9), (20, 40, 160), -1)
    return pixels


def encoded(pixels: npt.NDArray[Any], kind: str = "JPEG", mode: str | None = None, **options: Any) -> bytes:
    image = Image.fromarray(pixels)
    body = io.BytesIO()
    (image.convert(mode) if mode else image).save(body, kind, **options)
    return body.getvalue()


def decoded(data: bytes) -> Array:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def psnr(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    error = float(np.mean((one.astype(float) - other.astype(float)) ** 2))
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)


def failure(body: bytes, **options: Any) -> SampleError:
    with pytest.raises(SampleError) as caught:
        transform(body, ImageOptions(**options))
    assert caught.value.status == "failed_to_resize"
    return caught.value


@pytest.fixture(scope="module")
def theirs() -> Callable[..., tuple[Any, ...]]:
    """img2dataset's Resizer: (bytes, width, height, original width, original height, error)."""
    if sys.version_info >= (3, 13):
        pytest.skip("img2dataset does not import on Python 3.13")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resizer = pytest.importorskip("img2dataset.resizer")

    def resize(body: bytes, options: ImageOptions) -> tuple[Any, ...]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return resizer.Resizer(
                image_size=options.image_size,
                resize_mode=options.resize_mode,
                resize_only_if_bigger=options.resize_only_if_bigger,
                upscale_interpolation=options.upscale_interpolation,
                downscale_interpolation=options.downscale_interpolation,
                encode_quality=options.encode_quality,
                encode_format=options.encode_format,
                skip_reencode=options.skip_reencode,
                disable_all_reencoding=options.disable_all_reencoding,
                min_image_size=options.min_image_size,
                max_image_area=options.max_image_area,
                max_aspect_ratio=options.max_aspect_ratio,
            )(io.BytesIO(body))

    return resize


def sizes(image: EncodedImage) -> tuple[Any, ...]:
    return image.width, image.height, image.original_width, image.original_height


# Side by side with img2dataset


@pytest.mark.parametrize("bigger", [False, True], ids=["always", "only_if_bigger"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "size", [(640, 427), (333, 1001), (256, 256), (255, 257), (100, 31), (1, 1), (1, 300), (999, 64)]
)
def test_exact_mode_gives_img2datasets_own_bytes(theirs: Any, size: tuple[int, int], mode: Any, bigger: bool) -> None:
    pixels = drawing(*size)
    for kind, target in itertools.product(["JPEG", "PNG"], [256, 97]):
        body = encoded(pixels, kind)
        options = ImageOptions(resize_mode=mode, resize_only_if_bigger=bigger, image_size=target, exact=True)
        data, *expected, error = theirs(body, options)
        if error is not None:
            # The line of 1 x 300 becomes longer than JPEG can hold.
            assert failure(body, **vars(options)).error_class == "encode"
            continue
        image = transform(body, options)
        assert sizes(image) == tuple(expected)
        assert image.data == data
        assert Image.open(io.BytesIO(image.data)).size == (image.width, image.height)


@pytest.mark.parametrize(
    ("encode_format", "quality"),
    [("jpg", 0), ("jpg", 75), ("png", 0), ("png", 9), ("webp", 1), ("webp", 90), ("webp", 101)],
)
def test_formats_and_qualities_mean_the_same(theirs: Any, encode_format: Any, quality: int) -> None:
    options = ImageOptions(encode_format=encode_format, encode_quality=quality, image_size=64, exact=True)
    body = encoded(photo(200, 130))
    image = transform(body, options)
    assert image.data == theirs(body, options)[0]
    assert image.format == encode_format
    assert read_header(image.data).kind == {"jpg": "jpeg"}.get(encode_format, encode_format)


@pytest.mark.parametrize("name", ["nearest", "linear", "bilinear", "cubic", "bicubic", "area", "lanczos", "lanczos4"])
def test_interpolations_mean_the_same(theirs: Any, name: Any) -> None:
    body = encoded(photo(300, 200))
    for target in (64, 400):
        options = ImageOptions(image_size=target, downscale_interpolation=name, upscale_interpolation=name, exact=True)
        assert transform(body, options).data == theirs(body, options)[0]


def test_random_sizes_come_out_alike(theirs: Any) -> None:
    generator = np.random.default_rng(1)
    for _ in range(150):
        width, height, target = (int(value) for value in generator.integers(1, 90, 3))
        mode = MODES[int(generator.integers(len(MODES)))]
        bigger = bool(generator.integers(2))
        options = ImageOptions(image_size=target, resize_mode=mode, resize_only_if_bigger=bigger, encode_format="png",
                               encode_quality=1)  # type: ignore[arg-type]  # fmt: skip
        body = encoded(generator.integers(0, 256, (height, width, 3)).astype(np.uint8), "PNG")
        data, *expected, _ = theirs(body, options)
        image = transform(body, options)
        assert (sizes(image), image.data) == (tuple(expected), data), (width, height, options)


@pytest.mark.parametrize("size", [(1024, 768), (2047, 1365), (3000, 1001), (1601, 1067), (4032, 3024)])
@pytest.mark.parametrize("mode", MODES[1:])
def test_default_mode_has_the_same_geometry(theirs: Any, size: tuple[int, int], mode: Any) -> None:
    body = encoded(drawing(*size))
    options = ImageOptions(resize_mode=mode)
    image = transform(body, options)
    assert sizes(image) == theirs(body, options)[1:5]
    assert decoded(image.data).shape == (image.height, image.width, 3)


@pytest.mark.parametrize(
    ("size", "limits", "message", "error_class"),
    [
        ((99, 300), {"min_image_size": 100}, "image too small", "too_small"),
        ((300, 200), {"max_image_area": 59_999}, "image area too large", "too_large"),
        ((301, 100), {"max_aspect_ratio": 3.0}, "aspect ratio too large", "aspect_ratio"),
        ((10, 200), {"min_image_size": 11, "max_image_area": 5, "max_aspect_ratio": 2}, "image too small", "too_small"),
    ],
)
def test_limits_are_img2datasets(
    theirs: Any, size: tuple[int, int], limits: dict[str, Any], message: str, error_class: str
) -> None:
    body = encoded(drawing(*size))
    error = failure(body, **limits)
    assert (error.message, error.error_class) == (message, error_class)
    assert theirs(body, ImageOptions(**limits))[-1] == message


def test_limits_let_through_what_meets_them() -> None:
    transform(encoded(drawing(300, 100)), ImageOptions(min_image_size=100, max_image_area=30_000, max_aspect_ratio=3))


# Fidelity


PHOTOS = [(640, 427), (800, 600), (1024, 768), (1280, 853), (1601, 1067), (2047, 1365), (2560, 1707), (3000, 1001)]


def fidelity(theirs: Any, options: ImageOptions) -> list[float]:
    """PSNR against img2dataset's own output, of the image without its border, wherever the bytes differ."""
    found = []
    for (width, height), seed in itertools.product(PHOTOS, (0, 1)):
        body = encoded(photo(width, height, seed), quality=88)
        image, expected = transform(body, options), theirs(body, options)[0]
        if image.data == expected:
            continue
        inner = plan(width, height, options).resized
        left, top = (options.image_size - inner[0]) // 2, (options.image_size - inner[1]) // 2
        window = np.s_[max(0, top) : max(0, top) + inner[1], max(0, left) : max(0, left) + inner[0]]
        found.append(psnr(decoded(image.data)[window], decoded(expected)[window]))
    return found


@pytest.mark.parametrize("mode", ["border", "center_crop", "keep_ratio"])
def test_scaled_decoding_stays_close(theirs: Any, mode: Any) -> None:
    found = fidelity(theirs, ImageOptions(resize_mode=mode))
    assert len(found) >= 4, "the large ones are decoded at a fraction of their size"
    assert np.mean(found) >= 40
    assert min(found) >= 36


def test_exact_decoding_is_exact(theirs: Any) -> None:
    assert fidelity(theirs, ImageOptions(exact=True)) == []


@pytest.mark.parametrize(
    ("length", "wanted"), [(1001, 86), (1023, 256), (1067, 171), (2047, 256), (4001, 341), (513, 64)]
)
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_scaled_decode_does_not_move_pixels(length: int, wanted: int, factor: int) -> None:
    axis = images._axis(length, factor, wanted)
    if axis.shift > images._MAX_SHIFT or length < 2 * factor * wanted:
        return
    # Means of blocks stand for the decoder; the reference averages the line over exact fractions of pixels.
    line = np.cumsum(np.random.default_rng(0).normal(0, 3, length)) + 128
    blocks = np.add.reduceat(line, np.arange(0, length, factor))
    blocks /= np.append(np.full(len(blocks) - 1, factor), length - factor * (len(blocks) - 1))
    assert len(blocks) == axis.decoded
    padded = np.pad(blocks, (0, axis.padding), "edge").astype(np.float32)
    found = cv2.resize(padded[None], (axis.resized, 1), interpolation=cv2.INTER_AREA)[0, :wanted]
    sums = np.interp(np.linspace(0, length, wanted + 1), np.arange(length + 1), np.append(0, np.cumsum(line)))
    expected = np.diff(sums) * wanted / length
    assert np.abs(found - expected).mean() < 0.15 * np.abs(np.diff(expected)).mean()


@pytest.mark.parametrize("size", [(640, 480), (801, 599), (333, 250), (1000, 300)])
def test_the_fast_shrink_stays_by_the_area_filter_and_moves_nothing(size: tuple[int, int]) -> None:
    pixels = photo(*size)
    for shrink in (1.2, 1.5, 2.5, 3.1, 4.0, 5.0):
        wanted = round(size[0] / shrink), round(size[1] / shrink)
        found, expected = images._shrink(pixels, wanted), cv2.resize(pixels, wanted, interpolation=cv2.INTER_AREA)
        assert found.shape == expected.shape
        assert psnr(found, expected) >= 36
        mirrored = images._shrink(np.ascontiguousarray(pixels[::-1, ::-1]), wanted)[::-1, ::-1]
        assert np.abs(found.astype(int) - mirrored).max() <= 2


# Kinds of images. Four squares: red, green / blue, half grey


SQUARES = np.zeros((64, 96, 3), np.uint8)
SQUARES[:32, :48], SQUARES[:32, 48:] = (255, 0, 0), (0, 255, 0)
SQUARES[32:, :48], SQUARES[32:, 48:] = (0, 0, 255), (128, 128, 128)
CENTRES = [(16, 24), (16, 72), (48, 24), (48, 72)]
PLAIN = ImageOptions(resize_mode="no", encode_format="png", encode_quality=1)


def deep(values: npt.NDArray[Any]) -> bytes:
    return bytes(cv2.imencode(".png", (values.astype(np.uint16) * 257))[1].tobytes())


def cmyk_jpeg() -> bytes:
    """No black: the inks are what is missing to white."""
    inks = np.dstack([255 - SQUARES, np.zeros(SQUARES.shape[:2], np.uint8)])
    stream = io.BytesIO()
    Image.frombytes("CMYK", (96, 64), inks.tobytes()).save(stream, "JPEG", quality=95, subsampling=0)
    return stream.getvalue()


def palette_png(pixels: Array) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).quantize(16).save(stream, "PNG")
    return stream.getvalue()


COLOURED: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encoded(SQUARES, quality=98, subsampling=0),
    "progressive jpeg": lambda: encoded(SQUARES, progressive=True, quality=98, subsampling=0),
    "cmyk jpeg": cmyk_jpeg,
    "png": lambda: encoded(SQUARES, "PNG"),
    "palette png": lambda: palette_png(SQUARES),
    "16-bit png": lambda: deep(SQUARES[:, :, ::-1]),
    "webp": lambda: encoded(SQUARES, "WEBP", lossless=True),
    "lossy webp": lambda: encoded(SQUARES, "WEBP", quality=100),
    "gif": lambda: encoded(SQUARES, "GIF"),
    "bmp": lambda: encoded(SQUARES, "BMP"),
    "tiff": lambda: encoded(SQUARES, "TIFF"),
    "lzw tiff": lambda: encoded(SQUARES, "TIFF", compression="tiff_lzw"),
    "cmyk tiff": lambda: encoded(SQUARES, "TIFF", mode="CMYK"),
    "ppm": lambda: encoded(SQUARES, "PPM"),
    "jpeg 2000": lambda: encoded(SQUARES, "JPEG2000"),
    "avif": lambda: encoded(SQUARES, "AVIF", quality=100),
}


@pytest.mark.parametrize("kind", COLOURED)
def test_every_kind_keeps_its_colours(kind: str) -> None:
    image = transform(COLOURED[kind](), PLAIN)
    assert sizes(image) == (96, 64, 96, 64)
    assert not image.kept
    result = Image.open(io.BytesIO(image.data))
    assert result.mode == "RGB"
    for row, column in CENTRES:
        assert np.abs(np.asarray(result)[row, column].astype(int) - SQUARES[row, column]).max() <= 6, (row, column)


@pytest.mark.parametrize("marked", [True, False])
def test_cmyk_agrees_with_pillow(marked: bool) -> None:
    body = encoded(photo(160, 120), mode="CMYK", quality=98)
    if not marked:
        at = body.index(b"\xff\xee\x00\x0eAdobe")
        body = body[:at] + body[at + 16 :]
    expected = np.asarray(Image.open(io.BytesIO(body)).convert("RGB")).astype(int)
    assert np.abs(decoded(transform(body, PLAIN).data) - expected).max() <= 2


GREY: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encoded(SQUARES, mode="L", quality=98),
    "png": lambda: encoded(SQUARES, "PNG", mode="L"),
    "16-bit png": lambda: deep(np.asarray(Image.fromarray(SQUARES).convert("L"))),
    "gif": lambda: encoded(SQUARES, "GIF", mode="L"),
    "tiff": lambda: encoded(SQUARES, "TIFF", mode="L"),
    "16-bit tiff": lambda: encoded(np.asarray(Image.fromarray(SQUARES).convert("L")).astype(np.uint16) * 257, "TIFF"),
    "pgm": lambda: encoded(SQUARES, "PPM", mode="L"),
}


@pytest.mark.parametrize("kind", GREY)
def test_grey_stays_one_channel(kind: str) -> None:
    body = GREY[kind]()
    result = Image.open(io.BytesIO(transform(body, PLAIN).data))
    expected = np.asarray(Image.fromarray(SQUARES).convert("L")).astype(int)
    assert result.mode in ("L", "RGB")  # GIF has only palettes: Pillow calls some grey, others coloured
    assert result.mode == "L" or kind == "gif"
    assert np.abs(np.asarray(result.convert("L")).astype(int) - expected)[CENTRES[3]] <= 2
    small = transform(body, ImageOptions(image_size=48))
    assert Image.open(io.BytesIO(small.data)).mode == (
        "L" if kind != "gif" else Image.open(io.BytesIO(small.data)).mode
    )


def test_black_and_white_is_grey() -> None:
    for kind in ("PNG", "TIFF", "BMP"):
        result = Image.open(io.BytesIO(transform(encoded(SQUARES, kind, mode="1"), PLAIN).data))
        assert result.mode == "L"
        assert set(np.unique(np.asarray(result))) <= {0, 255}


def test_alpha_is_composited_to_the_nearest_value() -> None:
    values, alphas = np.meshgrid(np.arange(256), np.arange(256))
    pixels = np.stack([values, 255 - values, values // 2, alphas], 2).astype(np.uint8)
    for background in [(255, 255, 255), (0, 0, 0), (10, 200, 77)]:
        share = alphas[:, :, None] / 255
        expected = np.rint(share * pixels[:, :, :3] + (1 - share) * np.array(background[::-1]))
        assert np.array_equal(composite(pixels, background), expected)


TRANSPARENT = np.dstack([SQUARES, np.where(np.arange(96) < 48, 255, 0) * np.ones((64, 1), int)]).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF", "AVIF", "palette", "16-bit", "LA"])
def test_what_is_transparent_becomes_white(theirs: Any, kind: str) -> None:
    if kind == "palette":
        body = palette_png(TRANSPARENT)
    elif kind == "16-bit":
        body = deep(cv2.cvtColor(TRANSPARENT, cv2.COLOR_RGBA2BGRA))
    elif kind == "LA":
        body = encoded(TRANSPARENT, "PNG", mode="LA")
    else:
        body = encoded(TRANSPARENT, kind, **({"lossless": True} if kind == "WEBP" else {}))
    pixels = decoded(transform(body, PLAIN).data).astype(int)
    assert pixels[16, 72].min() >= 253 and pixels[48, 72].min() >= 253
    if kind != "LA":
        assert np.abs(pixels[16, 24] - (255, 0, 0)).max() <= 6
    if kind in ("PNG", "LA"):
        assert transform(body, PLAIN).data == theirs(body, PLAIN)[0]
    black = decoded(transform(body, ImageOptions(background=(0, 0, 0), encode_format="png", encode_quality=1)).data)
    assert black[200, 200].max() <= 2


def test_the_border_has_the_background_also_around_grey() -> None:
    options = ImageOptions(image_size=96, background=(200, 30, 10), encode_format="png", encode_quality=1)
    for body in (encoded(SQUARES), encoded(SQUARES, mode="L")):
        pixels = decoded(transform(body, options).data)
        assert tuple(pixels[0, 0]) == tuple(pixels[-1, -1]) == (200, 30, 10)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_of_an_animation_the_first_image_is_kept(kind: str) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    stream = io.BytesIO()
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
    for format_options in (
        {"encode_format": "png", "encode_quality": 1},
        {"encode_format": "webp", "skip_reencode": True},
    ):
        image = transform(stream.getvalue(), ImageOptions(resize_mode="no", **format_options))  # type: ignore[arg-type]
        assert not image.kept
        result = Image.open(io.BytesIO(image.data))
        assert getattr(result, "n_frames", 1) == 1
        assert np.abs(np.asarray(result.convert("RGB"))[15, 20].astype(int) - (255, 0, 0)).max() <= 8


def test_names_and_types_are_not_believed() -> None:
    """Names and content types are not used: a PNG with the name .jpg is a PNG."""
    assert read_header(encoded(SQUARES, "PNG")).kind == "png"
    assert transform(encoded(SQUARES, "PNG"), ImageOptions(resize_mode="no", skip_reencode=True)).kept is False


def test_nothing_is_said_on_stderr_about_odd_profiles(capfd: pytest.CaptureFixture[str]) -> None:
    body = encoded(SQUARES, "PNG")
    content = b"icc\0\0" + zlib.compress(b"no profile")
    chunk = struct.pack(">I", len(content)) + b"iCCP" + content + struct.pack(">I", zlib.crc32(b"iCCP" + content))
    transform(body[:33] + chunk + body[33:], PLAIN)
    assert capfd.readouterr() == ("", "")


# Bytes that are kept


@pytest.mark.parametrize(("encode_format", "kind"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_skip_reencode_keeps_what_needs_no_change(theirs: Any, encode_format: Any, kind: str) -> None:
    quality = 5 if encode_format == "png" else 80
    wanted = {"encode_format": encode_format, "encode_quality": quality, "skip_reencode": True}
    body, large = encoded(drawing(120, 90), kind), encoded(drawing(300, 200), kind)
    for changes in ({"resize_mode": "no"}, {"resize_only_if_bigger": True}):
        options = ImageOptions(**wanted, **changes)  # type: ignore[arg-type]
        image = transform(body, options)
        assert image.kept and image.data == body
        assert (image.data, *sizes(image)) == theirs(body, options)[:5]
    assert transform(encoded(drawing(256, 256), kind), ImageOptions(**wanted)).kept
    assert not transform(large, ImageOptions(**wanted, resize_only_if_bigger=True)).kept
    assert not transform(body, ImageOptions(**wanted)).kept
    other = encoded(drawing(120, 90), "BMP")
    assert not transform(other, ImageOptions(**wanted, resize_mode="no")).kept


@pytest.mark.parametrize("kind", ["cmyk", "transparent", "16-bit", "animated"])
def test_skip_reencode_does_not_keep_what_others_may_not_read(kind: str) -> None:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    frames[0].save(stream, "PNG", save_all=True, append_images=frames[1:])
    body = {
        "cmyk": cmyk_jpeg(),
        "transparent": encoded(TRANSPARENT, "PNG"),
        "16-bit": deep(SQUARES),
        "animated": stream.getvalue(),
    }[kind]
    wanted: Any = {"encode_format": "jpg"} if kind == "cmyk" else {"encode_format": "png", "encode_quality": 3}
    assert not transform(body, ImageOptions(resize_mode="no", skip_reencode=True, **wanted)).kept


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_skip_reencode_still_finds_damage(kind: str) -> None:
    body = encoded(photo(300, 200), kind)
    name: Any = {"JPEG": "jpg"}.get(kind, kind.lower())
    quality = 5 if kind == "PNG" else 95
    error = failure(
        body[: len(body) * 2 // 3], resize_mode="no", skip_reencode=True, encode_format=name, encode_quality=quality
    )
    assert error.error_class in ("truncated", "damaged")


KEPT = {
    **COLOURED,
    "transparent": lambda: encoded(TRANSPARENT, "PNG"),
    "transparent webp": lambda: encoded(TRANSPARENT, "WEBP", lossless=True),
    "16-bit grey png": GREY["16-bit png"],
    "16-bit tiff": GREY["16-bit tiff"],
    "pgm": GREY["pgm"],
}


@pytest.mark.parametrize("kind", KEPT)
def test_bytes_are_kept_with_the_ending_of_their_kind(kind: str) -> None:
    body = KEPT[kind]()
    image = transform(body, ImageOptions(resize_mode="no", keep_bytes=True))
    endings = {"jpeg": "jpg", "tiff": "tif", "pgm": "ppm", "jpeg 2000": "jp2", "transparent": "png"}
    assert image.kept and image.data == body
    assert image.format == endings.get(kind, endings.get(kind.split()[-1], kind.split()[-1]))


def test_kept_bytes_are_checked_and_changed_only_where_asked() -> None:
    keep = {"resize_mode": "no", "keep_bytes": True}
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        body = encoded(photo(300, 200), kind)
        assert failure(body[: len(body) * 2 // 3], **keep).error_class in ("truncated", "damaged")
    assert failure(encoded(SQUARES), **keep, max_image_area=100).error_class == "too_large"
    turned = transform(with_exif(6), ImageOptions(**keep, apply_exif_orientation=True))
    assert not turned.kept and turned.format == "jpg"
    resized = transform(encoded(SQUARES, "PNG"), ImageOptions(image_size=32, keep_bytes=True))
    assert not resized.kept and resized.format == "jpg"


def test_disable_all_reencoding_keeps_everything(theirs: Any) -> None:
    options = ImageOptions(disable_all_reencoding=True, min_image_size=10_000)
    for body in (encoded(drawing(300, 200)), encoded(drawing(30, 20), "PNG"), b"<html>", b""):
        image = transform(body, options)
        assert image.kept and image.data == body == theirs(body, options)[0]
        assert image.format == "jpg"
    assert sizes(transform(encoded(drawing(300, 200)), options)) == (300, 200, 300, 200)
    assert sizes(transform(b"<html>", options)) == (None, None, None, None)


# Hostile and damaged bytes


@pytest.mark.parametrize(
    ("body", "error_class"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not_a_picture"),
        (b"\xef\xbb\xbf\r\n <?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "not_a_picture"),
        (b'{"error": "not found"}', "not_a_picture"),
        (b"GIF8", "not_a_picture"),
        (b"\0" * 1000, "not_a_picture"),
        (b"%PDF-1.7", "not_a_picture"),
        (b"\xff\xd8\xff", "damaged"),
        (b"\xff\xd8\xff\xe0" + b"junk" * 100, "damaged"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (b"RIFF\x10\0\0\0WEBP", "truncated"),
        (b"RIFF\x10\0\0\0WEBPjunk" + bytes(30), "damaged"),
        (b"GIF89a", "damaged"),
        (b"BM" + bytes(60), "damaged"),
        (b"II*\0\x08\0\0\0", "damaged"),
    ],
)
def test_a_body_that_is_not_an_image_is_reported(body: bytes, error_class: str) -> None:
    error = failure(body)
    assert error.error_class == error_class
    assert error.message.startswith("Image decoding error")


ALL_KINDS: dict[str, bytes] = {}


def all_kinds() -> dict[str, bytes]:
    if not ALL_KINDS:
        pixels = photo(160, 120)
        ALL_KINDS.update({kind: encoded(pixels, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")})
        ALL_KINDS.update({"AVIF": encoded(pixels, "AVIF"), "JPEG2000": encoded(pixels, "JPEG2000")})
        ALL_KINDS["progressive"] = encoded(pixels, progressive=True)
        ALL_KINDS["grey"] = encoded(pixels, mode="L")
        ALL_KINDS["cmyk"] = encoded(pixels, mode="CMYK")
        ALL_KINDS["restarts"] = encoded(pixels, restart_marker_blocks=4)
    return ALL_KINDS


KINDS = [
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "AVIF",
    "JPEG2000",
    "progressive",
    "grey",
    "cmyk",
    "restarts",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_image_is_an_error_never_half_grey(kind: str) -> None:
    body = all_kinds()[kind]
    for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
        for options in (PLAIN, ImageOptions(image_size=20)):
            with pytest.raises(SampleError) as caught:
                transform(body[: int(len(body) * share)], options)
            assert caught.value.error_class in ("truncated", "damaged", "not_a_picture")


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "grey", "cmyk", "restarts"])
def test_a_truncated_jpeg_with_an_end_mark_is_an_error_too(kind: str) -> None:
    body = all_kinds()[kind]
    cut = body[: int(len(body) * 0.6)] + b"\xff\xd9"
    try:
        image = transform(cut, PLAIN)
    except SampleError as error:
        assert error.error_class in ("truncated", "damaged")
    else:
        # Only whole passes of a progressive image may be missing: then it is softer, nowhere grey.
        assert kind == "progressive"
        assert psnr(decoded(image.data), decoded(body)) > 25


def test_blemishes_that_leave_the_pixels_whole_pass() -> None:
    body = encoded(photo(160, 120))
    expected = transform(body, PLAIN).data
    for good in (body[:-2], body + b"trailing rubbish" * 9, body[:-2] + b"\0" * 5 + body[-2:], body + body):
        assert transform(good, PLAIN).data == expected
    jfif = body.index(b"JFIF\0")
    assert transform(body[: jfif + 5] + b"\x09" + body[jfif + 6 :], PLAIN).data == expected


def test_unusual_sampling_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    body = encoded(photo(160, 120))
    expected = decoded(transform(body, PLAIN).data)

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("Could not determine subsampling level of JPEG image")

    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", refuse)
    assert read_header(body).colour == ""
    assert psnr(decoded(transform(body, PLAIN).data), expected) > 40


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_never_escapes_as_another_exception(kind: str) -> None:
    generator = np.random.default_rng(zlib.crc32(kind.encode()))
    body = all_kinds()[kind]
    for trial in range(60):
        damaged = bytearray(body)
        reach = min(len(body), 200 if trial % 2 else len(body))
        for at in generator.integers(0, reach, int(generator.integers(1, 9))):
            damaged[at] = int(generator.integers(256))
        try:
            image = transform(bytes(damaged), ImageOptions(image_size=48, max_pixels=4_000_000))
        except SampleError as error:
            assert error.status == "failed_to_resize"
        else:
            assert (image.width, image.height) == (48, 48)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(10**6), 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg_of_size(width: int, height: int) -> bytes:
    body = encoded(SQUARES)
    at = body.index(b"\xff\xc0")
    return body[: at + 5] + struct.pack(">HH", height, width) + body[at + 9 :]


def webp_of_size(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + bytes(30)


BOMBS: dict[str, Callable[[], bytes]] = {
    "png": lambda: png_header(60_000, 60_000),
    "thin png": lambda: png_header(2**31 - 1, 1),
    "jpeg": lambda: jpeg_of_size(65_000, 65_000),
    "webp": lambda: webp_of_size(2**24, 2**24),
    "gif": lambda: b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + encoded(SQUARES, "GIF")[10:],
    "bmp": lambda: (lambda b: b[:18] + struct.pack("<ii", 50_000, 50_000) + b[26:])(encoded(SQUARES, "BMP")),
    "ppm": lambda: b"P6 60000 60000 255\n" + bytes(1000),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_huge_images_in_small_files_are_refused_before_decoding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = BOMBS[kind]()

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(cv2, "imdecode", forbidden)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", forbidden)
    monkeypatch.setattr(Image.Image, "load", forbidden)
    began = time.monotonic()
    error = failure(body)
    assert error.error_class == "too_many_pixels"
    assert error.message.startswith("Image decoding error: more") and "--max-pixels" in error.message
    assert time.monotonic() - began < 1


def test_the_cap_on_pixels_itself_passes() -> None:
    body = encoded(drawing(100, 50))
    transform(body, ImageOptions(max_pixels=5000, resize_mode="no"))
    assert failure(body, max_pixels=4999).error_class == "too_many_pixels"


def test_a_line_is_not_blown_up_to_gigapixels() -> None:
    body = encoded(np.zeros((1, 30_000, 3), np.uint8), "PNG")
    for mode in ("keep_ratio", "center_crop"):
        assert failure(body, resize_mode=mode).error_class == "too_many_pixels"
    assert transform(body, ImageOptions(resize_mode="border")).height == 256


def test_many_passes_over_many_pixels_are_refused() -> None:
    body = encoded(drawing(1000, 1000), progressive=True)
    at = body.rindex(b"\xff\xda")
    scan = body[at:-2]
    began = time.monotonic()
    assert failure(body[:-2] + scan[:12] * 3000 + b"\xff\xd9").error_class in ("too_many_pixels", "damaged")
    assert time.monotonic() - began < 1
    assert transform(body, ImageOptions()).width == 256


def test_passes_are_counted_unless_the_first_must_be_the_last() -> None:
    sequential, progressive = encoded(drawing(64, 64)), encoded(drawing(64, 64), progressive=True)
    decoy = b"\xff\xda\0\x02"
    assert jpeg_scans(sequential + decoy * 500) == 1
    assert jpeg_scans(progressive + decoy * 500) > 500
    # A whole sequential header in a comment, where a walk that believes a fill byte's "length" would look.
    hidden = sequential[2 : sequential.index(b"\xff\xda") + 14]
    disguised = b"\xff\xd8\xff\xff\xfe\0\x10" + bytes(14) + progressive[2:] + hidden
    assert jpeg_scans(disguised + decoy * 500) > 500
    for body in (sequential, progressive, b"\xff\xd8\xff", disguised):
        assert jpeg_scans(body) <= body.count(b"\xff\xda") or body is sequential


def test_an_image_too_large_for_the_format_is_reported() -> None:
    body = encoded(np.zeros((2, 20_000, 3), np.uint8), "PNG")
    error = failure(body, resize_mode="no", encode_format="webp")
    assert (error.error_class, error.message) == ("encode", "Image encoding error")


# EXIF


def with_exif(orientation: int = 1, kind: str = "JPEG", pixels: Array = SQUARES, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0112] = "Maker", "Model ü", orientation
    exif[0x011A] = 72.0
    inner = exif.get_ifd(0x8769)
    inner[0x829A], inner[0x8827], inner[0x9003] = (1, 60), 400, "2024:01:02 03:04:05"
    inner[0x927C] = b"\x01\x02maker note\xff" * 10
    exif.get_ifd(0x8825)[1] = "N"
    return encoded(pixels, kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_exif_is_told_as_json(kind: str) -> None:
    tags = json.loads(transform(with_exif(kind=kind), PLAIN).exif or "")
    assert tags["Image Make"] == "Maker"
    assert tags["EXIF ISOSpeedRatings"] == "400"
    assert tags["EXIF DateTimeOriginal"] == "2024:01:02 03:04:05"
    assert tags["GPS GPSLatitudeRef"] == "N"
    assert not any("MakerNote" in key for key in tags)


def test_exif_keys_are_img2datasets() -> None:
    exifread = pytest.importorskip("exifread")
    body = with_exif()
    mine = json.loads(transform(body, PLAIN).exif or "")
    their = {key: str(value) for key, value in exifread.process_file(io.BytesIO(body), details=False).items()}
    shared = set(mine) & set(their)
    assert {
        "Image Make",
        "Image Orientation",
        "EXIF ISOSpeedRatings",
        "EXIF ExposureTime",
        "Image XResolution",
    } <= shared
    for key in (
        "Image Make",
        "EXIF ISOSpeedRatings",
        "EXIF ExposureTime",
        "EXIF DateTimeOriginal",
        "Image XResolution",
    ):
        assert mine[key] == their[key]


def test_no_exif_is_an_empty_object_and_not_asked_for_is_none() -> None:
    assert transform(encoded(SQUARES), PLAIN).exif == "{}"
    assert transform(encoded(SQUARES, "GIF"), PLAIN).exif == "{}"
    assert transform(with_exif(), ImageOptions(extract_exif=False)).exif is None


def test_damaged_exif_does_not_cost_the_image() -> None:
    body, generator = with_exif(), np.random.default_rng(0)
    at = body.index(b"Exif\0\0") + 6
    for _ in range(200):
        damaged = bytearray(body)
        for offset in generator.integers(0, 150, 6):
            damaged[at + offset] = int(generator.integers(256))
        image = transform(bytes(damaged), PLAIN)
        assert image.width == 96
        assert image.exif is None or isinstance(json.loads(image.exif), dict)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_ignored_unless_asked_for(theirs: Any, orientation: int, kind: str) -> None:
    body = with_exif(orientation, kind, drawing(120, 80), **({"lossless": True} if kind == "WEBP" else {}))
    options = ImageOptions(image_size=64, exact=True, resize_mode="keep_ratio")
    assert transform(body, options).data == theirs(body, options)[0]
    asked = ImageOptions(resize_mode="no", encode_format="png", encode_quality=1, apply_exif_orientation=True)
    image = transform(body, asked)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(body)))
    assert upright is not None
    assert (image.width, image.height) == upright.size == (image.original_width, image.original_height)
    assert np.abs(decoded(image.data).astype(int) - np.asarray(upright.convert("RGB"))).max() <= 2
    again = Image.open(io.BytesIO(image.data))
    assert not again.getexif()


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_turned_image_is_not_kept_with_its_orientation(orientation: int) -> None:
    options = ImageOptions(resize_mode="no", skip_reencode=True, apply_exif_orientation=True)
    assert transform(with_exif(orientation), options).kept is (orientation == 1)


@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_turning_and_scaled_decoding_go_together(orientation: int) -> None:
    body = with_exif(orientation, pixels=photo(1601, 1067), quality=90)
    fast, exact = (ImageOptions(apply_exif_orientation=True, exact=exact) for exact in (False, True))
    assert psnr(decoded(transform(body, fast).data), decoded(transform(body, exact).data)) > 36


# The rest


def test_many_threads_give_the_same_bytes() -> None:
    bodies = [*all_kinds().values(), encoded(photo(1200, 900)), with_exif(6), encoded(TRANSPARENT, "PNG")] * 6
    options = ImageOptions(image_size=96)
    expected = [transform(body, options) for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda body: transform(body, options), bodies)) == expected


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"image_size": 0}, "image_size"),
        ({"image_size": -5}, "image_size"),
        ({"image_size": 10**6}, "image_size"),
        ({"resize_mode": "stretch"}, "resize_mode"),
        ({"upscale_interpolation": "magic"}, "upscale_interpolation"),
        ({"downscale_interpolation": "AREA"}, "downscale_interpolation"),
        ({"encode_format": "gif"}, "encode_format"),
        ({"keep_bytes": True, "disable_all_reencoding": True}, "keep_bytes"),
        ({"encode_quality": 101}, "encode_quality"),
        ({"encode_format": "png"}, "encode_quality"),
        ({"encode_format": "webp", "encode_quality": 0}, "encode_quality"),
        ({"min_image_size": -1}, "min_image_size"),
        ({"max_image_area": 0}, "max_image_area"),
        ({"max_aspect_ratio": 0.5}, "max_aspect_ratio"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"max_pixels": 2**31}, "max_pixels"),
        ({"background": (0, 0)}, "background"),
        ({"background": (0, 0, 256)}, "background"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=field):
        ImageOptions(**options)


def test_max_pixels_goes_beyond_pillows_own_limit() -> None:
    """A bitmap of 200 million pixels with nothing but its header."""
    header = (
        b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 20_000, 10_000, 1, 24, *[0] * 6)
    )
    with pytest.raises(SampleError) as refused:
        transform(header, ImageOptions(max_pixels=150_000_000))
    assert refused.value.error_class == "too_many_pixels" and "max-pixels" in refused.value.message
    assert read_header(header).width == 20_000
