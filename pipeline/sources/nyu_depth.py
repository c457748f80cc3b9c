"""NYU Depth v2 as published: ``nyu_depth_v2_labeled.mat`` with its official split.

Silberman, Hoiem, Kohli, Fergus, 2012, "Indoor segmentation and support inference from RGBD images"

    jobs/refresh_dataset.py nyu-depth --file nyu_depth_v2_labeled.mat --splits splits.mat --output-folder data/nyu

The file is HDF5 (MATLAB 7.3), whose arrays are read with reversed dimensions:

    images       uint8 [1449, 3, 640, 480]
    depths       float32 [1449, 640, 480], metres, with holes filled in
    rawDepths    float32 [1449, 640, 480], metres, 0 where the sensor measured nothing
    sceneTypes   references to the names of the 27 classes of scenes, as uint16 codes of letters

``splits.mat`` is a file of MATLAB 5 with ``trainNdxs`` (795) and ``testNdxs`` (654), counted from 1.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import DataError, SampleError, missing, unreadable
from pipeline.shards.depth_values import DEPTH_FIELD, encode_depth
from pipeline.shards.storage import Folder, file_stamp, split_file
from pipeline.sources.hdf5_arrays import own_array
from pipeline.sources.matlab5 import LARGEST, whole_numbers
from pipeline.sources.record_slices import json_digest, record_slices, slice_records
from pipeline.sources.source import UNCHANGED, Part, Row, Slice

IMAGES = "images"
SCENES = "sceneTypes"
READ_ERRORS = (OSError, KeyError, ValueError, RuntimeError)  # h5py's, by the kind of damage
LONGEST_SCENE = 100  # letters
MOST_PIXELS = 1 << 26
"""Pixels of an image."""
PARTS = {"train": "trainNdxs", "test": "testNdxs"}


@dataclass(frozen=True, kw_only=True)
class NyuDepth:
    """The images of ``split``, in the order of the file; each as a lossless PNG beside its depth map."""

    kind: ClassVar[str] = "nyu-depth"
    summary: ClassVar[str] = "NYU Depth v2: nyu_depth_v2_labeled.mat with splits.mat."
    image_options: ClassVar[Mapping[str, Any]] = UNCHANGED
    has_captions: ClassVar[bool] = False

    file: str
    """nyu_depth_v2_labeled.mat: a path or fsspec URI that every worker can read."""
    splits: str = ""
    """splits.mat; empty with `split` all."""
    split: Literal["train", "test", "all"] = "test"
    """Images to read: the official train or test split, or all."""
    depths: Literal["depths", "rawDepths"] = "depths"
    """Depth maps: depths (holes filled in) or rawDepths (holes are missing)."""

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers sizes and times of both files.

        Raises:
            SettingError: a missing file, or one of another layout.
        """
        with self._opened() as arrays:
            numbers = self._numbers(_checked(arrays, self.file, self.depths))
        stamps = [_stamp(place) for place in (self.file, self.splits) if place]
        yield from record_slices(
            numbers, rows_per_shard, scratch, "nyu-depth", digest=lambda part: json_digest([stamps, self.depths, part])
        )

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; a damaged part of the file is a row with a problem."""
        with self._opened() as arrays:
            for number in slice_records(piece):
                yield self._row(arrays, number)

    def schema(self) -> Mapping[str, type]:
        """``scene``: class of the scene, such as kitchen; empty where the file has none."""
        return {"scene": str}

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        import h5py  # a tenth of a second, and few sources need it

        place, name = split_file(self.file)
        try:
            with place.open(name) as stream, h5py.File(stream, "r") as arrays:
                yield arrays
        except FileNotFoundError as error:
            raise missing("file", self.file) from error
        except OSError as error:
            raise unreadable("file", self.file, "an HDF5 file (MATLAB 7.3)", error) from error

    def _numbers(self, count: int) -> list[int]:
        """The positions of the split's images, from 0."""
        if self.split == "all":
            return list(range(count))
        require(bool(self.splits), "splits", self.splits, "the file splits.mat, or split all")
        numbers = _read_split(self.splits, PARTS[self.split])
        inside = bool(numbers) and 0 <= min(numbers) and max(numbers) < count
        require(inside, "splits", self.splits, f"numbers from 1 to {count}, the images of {self.file}")
        return numbers

    def _row(self, arrays: Any, number: int) -> Row:
        url = f"{self.file}#{number + 1}"
        try:
            pixels = np.asarray(arrays[IMAGES][number]).transpose(2, 1, 0)
            metres = np.asarray(arrays[self.depths][number]).T
            depth = encode_depth(metres)
        except READ_ERRORS as error:
            problem = SampleError("failed_to_resize", "damaged", f"cannot read image {number + 1}: {error}")
            return Row(url=url, columns={"scene": ""}, problem=problem)
        except DataError as error:
            problem = SampleError("failed_to_resize", "bad_depth", f"depth of image {number + 1}: {error}")
            return Row(url=url, columns={"scene": ""}, problem=problem)
        return Row(
            url=url,
            parts=(Part("image", _png(pixels)),),
            members={DEPTH_FIELD: depth},
            columns={"scene": self._scene(arrays, number)},
        )

    def _scene(self, arrays: Any, number: int) -> str:
        """The scene's class of an image; empty without a readable one."""
        try:
            return _scene_name(arrays, number, self.file)
        except (*READ_ERRORS, DataError):
            return ""


def _checked(arrays: Any, file: str, depths: str) -> int:
    """The number of images; requires arrays of the published layout."""
    found = {one: own_array(arrays, one, file) for one in (IMAGES, depths)}
    shapes: dict[str, tuple[int, ...]] = {name: getattr(one, "shape", ()) for name, one in found.items()}
    images, maps = shapes[IMAGES], shapes[depths]
    fits = len(images) == 4 and len(maps) == 3 and images[1] == 3 and (images[0], *images[2:]) == maps
    allowed = f"a file with images [N, 3, W, H] and {depths} [N, W, H]; these are {shapes}"
    require(fits and min(images) > 0, "file", file, allowed)
    require(images[2] * images[3] <= MOST_PIXELS, "file", file, f"images of up to {MOST_PIXELS:,} pixels")
    require(arrays[IMAGES].dtype == np.uint8, "file", file, "images of uint8")
    require(arrays[depths].dtype.kind in "fiu", "file", file, f"{depths} that are numbers")
    return int(images[0])


def _read_split(place: str, name: str) -> list[int]:
    folder, file = split_file(place)
    try:
        with folder.open(file) as stream:
            return [value - 1 for value in whole_numbers(stream.read(LARGEST + 1), name)]
    except (OSError, ValueError) as error:
        raise unreadable("splits", place, f"a file of MATLAB 5 with {name}", error) from error


def _scene_name(arrays: Any, number: int, file: str) -> str:
    """The scene's class of an image: a reference to the codes of its letters; empty without any."""
    scenes = own_array(arrays, SCENES, file)
    if scenes is None or scenes.ndim != 2 or number >= scenes.shape[1]:
        return ""
    reference = scenes[0, number]
    if not isinstance(reference, type(scenes.ref)) or not reference:
        return ""
    letters = own_array(arrays, arrays[reference].name or "", file)
    if letters is None or letters.size > LONGEST_SCENE or letters.dtype.kind != "u":
        return ""
    return "".join(map(chr, np.asarray(letters).ravel())).strip()


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """uint8 [H, W, 3] as PNG, lightly compressed."""
    done, content = cv2.imencode(".png", np.ascontiguousarray(pixels[:, :, ::-1]), (cv2.IMWRITE_PNG_COMPRESSION, 1))
    assert done, "PNG has no limit that these images could pass"
    return content.tobytes()


def _stamp(file: str) -> str:
    folder, name = split_file(file)
    return file_stamp(folder.info(name))
