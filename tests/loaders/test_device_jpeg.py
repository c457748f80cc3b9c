"""Decoding on the training's device, tried on the CPU: the same samples and crops as the loader's, similar pixels."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import DataError, SettingError
from pipeline.loaders import batches as batches_module
from pipeline.loaders import device_jpeg
from pipeline.loaders.batches import Batch, LoaderConfig, SamplePosition, training_batches
from pipeline.loaders.device_jpeg import EncodedImageReader, jpeg_size
from pipeline.loaders.images import ImageTransform
from pipeline.loaders.order import Order
from pipeline.loaders.readers import ImageReader, TextReader
from pipeline.loaders.resample import resize_each
from pipeline.models.towers.openclip import tokenizer
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot
from tests.loaders.test_images import encoded, photo, signal_to_noise

CPU = torch.device("cpu")
TRANSFORM = ImageTransform(size=(48, 64), crop="resized", scale=(0.3, 1.0), flip=0.5)
SIZES = [(300, 200), (60, 90), (64, 64), (129, 67), (40, 31), (33, 500)]


def samples() -> list[Sample]:
    """Photographs as JPEGs of several sizes, then what nvJPEG is not given: PNG, grey, CMYK, a large and a cut one."""
    images = [Image.fromarray(photo(*size, seed=number)) for number, size in enumerate(SIZES)]
    contents = [encoded(image, "JPEG", quality=95) for image in images]
    contents += [encoded(images[0], "PNG"), encoded(images[1].convert("L"), "JPEG")]
    contents += [encoded(images[2].convert("CMYK"), "JPEG"), encoded(images[0].resize((2049, 20)), "JPEG")]
    contents.append(contents[0] + b"\0\0")  # readable, though it does not end as a JPEG does
    return [Sample(f"{number}", {"jpg": content}) for number, content in enumerate(contents)]


def test_images_are_those_of_the_loader_up_to_rounding() -> None:
    usual, device = ImageReader(transform=TRANSFORM, seed=3), ImageReader(transform=TRANSFORM, seed=3).on_device()
    given = samples()
    places = [SamplePosition(1, number) for number in range(len(given))]
    expected = usual.collate([usual.read(*one) for one in zip(given, places, strict=True)])["image"]
    batch = device.collate([device.read(*one) for one in zip(given, places, strict=True)])
    assert len(batch["image.lengths"]) == len(SIZES) and len(batch["image.decoded"]) == len(given) - len(SIZES)
    found = device.finish({**batch, "text": torch.ones(1)}, CPU)
    assert set(found) == {"image", "text"} and found["image"].dtype == torch.uint8
    assert found["image"].shape == expected.shape
    for number, (one, other) in enumerate(zip(found["image"].numpy(), expected.numpy(), strict=True)):
        assert signal_to_noise(one, other) > 33, number
        if number >= len(SIZES):
            assert (one == other).all()


def test_a_batch_that_the_device_or_the_loader_decodes_alone() -> None:
    reader = EncodedImageReader(transform=TRANSFORM)
    given = samples()
    for part in (given[:3], given[-3:]):
        rows = [reader.read(sample, SamplePosition(0, number)) for number, sample in enumerate(part)]
        assert reader.finish(reader.collate(rows), CPU)["image"].shape == (3, 3, 48, 64)


def test_resizing_by_products_is_pillows_bicubic() -> None:
    photos = [photo(*size, seed=number) for number, size in enumerate(SIZES)]
    tensors = [torch.from_numpy(image).permute(2, 0, 1) for image in photos]
    sizes = torch.tensor(SIZES)
    found = resize_each(device_jpeg.padded(tensors), sizes[:, 0], sizes[:, 1], (48, 64))
    for image, one in zip(photos, found, strict=True):
        exact = np.asarray(Image.fromarray(image).resize((64, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        apart = np.abs(one.numpy().astype(int) - exact)
        assert apart.max() <= 2 and apart.mean() < 0.5


def test_groups_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = EncodedImageReader(transform=TRANSFORM)
    rows = [reader.read(sample, SamplePosition(0, number)) for number, sample in enumerate(samples())]
    together = reader.finish(reader.collate(rows), CPU)["image"]
    monkeypatch.setattr(device_jpeg, "AT_ONCE", 2)
    assert torch.equal(reader.finish(reader.collate(rows), CPU)["image"], together)


def test_what_the_gpu_is_given() -> None:
    image = Image.fromarray(photo(30, 40))
    jpeg = encoded(image, "JPEG")
    assert jpeg_size(jpeg) == (30, 40)
    for other in (jpeg[:-10], b"", b"\xff\xd8\xff\xd9", encoded(image, "PNG"), encoded(image.convert("L"), "JPEG")):
        assert jpeg_size(other) is None


def test_a_damaged_jpeg_ends_the_run_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = BytesIO()
    Image.fromarray(photo(64, 64)).save(buffer, "JPEG")
    content = buffer.getvalue()
    broken = content[:200] + b"\xff\xd9"  # the tables are cut off, the header and the end are there
    assert jpeg_size(broken) == (64, 64) or jpeg_size(broken) is None
    reader = EncodedImageReader(transform=TRANSFORM)
    rows = [{"image": device_jpeg.EncodedCrop(broken, (0, 0, 64, 64), False)}]
    with pytest.raises(DataError, match="cannot be decoded on cpu .*; --image-decoder cpu replaces unreadable images"):
        reader.finish(reader.collate(rows), CPU)

    def without_nvjpeg(*_: object, **__: object) -> None:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr(device_jpeg, "decode_jpeg", without_nvjpeg)
    with pytest.raises(SettingError, match="image_decoder: got .*, expected cpu with this torchvision"):
        reader.finish(reader.collate(rows), CPU)


def read(snapshot: Snapshot, readers: list[object], **options: object) -> list[Batch]:
    order = Order([shard.samples for shard in snapshot.shards], seed=0, batch_size=4, lanes=2)
    config = LoaderConfig(loader_workers=1, **options)  # type: ignore[arg-type]
    return list(training_batches(snapshot, readers, order, steps=range(5), config=config))  # type: ignore[arg-type]


def test_the_option_gives_the_same_batches(
    make_snapshot: Callable[..., Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "decoding_device", lambda: CPU)
    snapshot = make_snapshot(spoil={3: {"jpg": b"no image", "txt": b"broken"}})
    readers = [ImageReader(transform=TRANSFORM), TextReader(tokenizer=tokenizer("clipmill-tiny"))]
    expected, found = read(snapshot, readers), read(snapshot, readers, image_decoder="cuda")
    for one, other in zip(found, expected, strict=True):
        assert set(one) == set(other) and torch.equal(one["text"], other["text"])
        assert torch.equal(one["replaced"], other["replaced"])
        assert signal_to_noise(one["image"].numpy(), other["image"].numpy()) > 33
    assert sum(int(batch["replaced"]) for batch in found) == 1


def test_who_cannot_decode_on_the_gpu_is_told_before_the_first_batch(
    make_snapshot: Callable[..., Snapshot], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snapshot, reader = make_snapshot(), ImageReader(transform=TRANSFORM)
    with pytest.raises(SettingError, match="image_decoder: got 'cuda', expected cpu, since torch finds no GPU here"):
        read(snapshot, [reader], image_decoder="cuda")
    monkeypatch.setattr(batches_module, "decoding_device", lambda: CPU)
    with pytest.raises(SettingError, match="image_decoder.*own readers decode its images"):
        read(snapshot, [TextReader(tokenizer=tokenizer("clipmill-tiny"))], image_decoder="cuda")
    for transform in (
        None,
        ImageTransform(size=(48, 64)),
        ImageTransform(size=(8, 8), crop="square", interpolation="bilinear"),
    ):
        with pytest.raises(SettingError, match="image_decoder.*not random crops, resized bicubically"):
            read(snapshot, [ImageReader(transform=transform)], image_decoder="cuda")
