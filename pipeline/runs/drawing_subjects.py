"""The prompts and images of a drawing job."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import unreadable
from pipeline.generation.prompts import parse_prompts
from pipeline.runs.drawings import SubjectSource
from pipeline.runs.drawn_data import read_image
from pipeline.shards.storage import split_file


def read_subjects(prompts: Sequence[str], images: Sequence[str], masks: Sequence[str]) -> list[SubjectSource]:
    """All subjects: ``prompts`` are texts or files ``.txt``, ``images`` and ``masks`` paths or URIs.

    Raises:
        SettingError: an empty prompt, a missing or empty file, doubles, or another number of masks than of images.
        DataError: an image that cannot be decoded.
    """
    texts = [text for one in prompts for text in (_lines(one) if one.endswith(".txt") else [one])]
    for text in texts:
        parse_prompts(text)
    require(len(masks) in (0, len(images)), "masks", tuple(masks), f"none, or one for each of {len(images)} images")
    photos = [_photo(place, masks[number] if masks else "") for number, place in enumerate(images)]
    names = [*texts, *images]
    doubled = next((name for name in names if names.count(name) > 1), None)
    require(doubled is None, "prompts", doubled, "each prompt and image once")
    return [*map(SubjectSource, texts), *map(SubjectSource, images, photos)]


def _lines(place: str) -> list[str]:
    """The lines of a file that are not blank."""
    folder, name = split_file(place)
    try:
        lines = [line.strip() for line in folder.read_text(name).splitlines()]
    except (OSError, ValueError) as error:
        raise unreadable("prompts", place, "a text file with a prompt in each line", error) from error
    found = [line for line in lines if line]
    require(bool(found), "prompts", place, "a text file with a prompt in each line")
    return found


def _photo(place: str, mask: str) -> NDArray[np.uint8]:
    """The image as a square on white: uint8 [S, S, 3]; where the ``mask`` is dark it is white, too."""
    pixels = read_image(place)
    if mask:
        kept = read_image(mask)
        require(
            kept.shape == pixels.shape, "masks", mask, f"the size of {place}, {pixels.shape[1]} x {pixels.shape[0]}"
        )
        pixels = np.where(kept.mean(axis=2, keepdims=True) > 127, pixels, 255).astype(np.uint8)
    height, width = pixels.shape[:2]
    side = max(height, width)
    square: NDArray[np.uint8] = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square
