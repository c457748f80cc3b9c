"""Image formats by first bytes, compared with the header reader on the whole body."""

import io

import pytest
from PIL import Image

from pipeline.errors import SampleError
from pipeline.shards.media import ENOUGH, IMAGE
from pipeline.shards.pixels import read_header
from pipeline.stages.crawl.failure import Failure
from pipeline.stages.crawl.sniff import refuse_other_media

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"]


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_images_are_known_by_their_first_bytes(kind: str) -> None:
    body = encoded(kind)
    assert read_header(body)
    assert IMAGE.starts(body[:ENOUGH])
    refuse_other_media(body[:ENOUGH], IMAGE, 200)


OTHERS = [
    b"<!doctype html><html></html>",
    b"\xef\xbb\xbf  <html>aaaaaaaaaaaaaaa",
    b'{"error": "not found", "code": 7}',
    b"RIFF\0\0\0\0WAVEfmt aaaaaaaaa",
    b"%PDF-1.7 aaaaaaaaaaaaaaa",
    b"\0\0\0\x20ftypmp42aaaaaaaaaaaa",
    b"PK\3\4aaaaaaaaaaaaaaaa",
    b"P7 aaaaaaaaaaaaaaaaaaaa",
    b"no such image on this server",
    bytes(64),
]


@pytest.mark.parametrize("body", OTHERS)
def test_other_things_get_the_class_and_words_of_the_decoder(body: bytes) -> None:
    with pytest.raises(SampleError) as theirs:
        read_header(body)
    with pytest.raises(Failure) as ours:
        refuse_other_media(body[:ENOUGH], IMAGE, 200)
    assert (ours.value.error_class, ours.value.message) == (theirs.value.error_class, theirs.value.message)
    assert ours.value.status == theirs.value.status and not ours.value.may_pass
