"""Arrays of HDF5 files that other people wrote."""

from typing import Any

from pipeline.errors import DataError

MOST_INFLATED = 1100
"""Bytes of an array for each byte of the file. Deflate, the filter that packs most, makes up to 1,032 of one."""


def own_array(file: Any, key: str, where: str) -> Any | None:
    """The array ``key`` of an open h5py file, the one at ``where``; None unless its content is in the file itself.

    Links, external storage and virtual arrays may name any other file of the machine. An array without a shape (HDF5's
    null dataspace) is none.

    Raises:
        DataError: an array of which the file has too few bytes. HDF5 would fill it with zeros.
    """
    import h5py  # a tenth of a second, and few sources need it

    if not isinstance(file.get(key, getlink=True), h5py.HardLink):
        return None
    found = file[key]
    own = isinstance(found, h5py.Dataset) and not found.is_virtual and not found.external
    if not own or found.shape is None:
        return None
    stored = int(found.id.get_storage_size())
    if found.nbytes > MOST_INFLATED * stored:
        raise DataError(f"{where}: the array {key} has the shape {found.shape}, but only {stored:,} bytes in the file")
    return found
