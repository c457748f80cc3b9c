"""Arrays of HDF5 files that other people wrote."""

from typing import Any


def own_array(file: Any, key: str) -> Any | None:
    """The array ``key`` of an open h5py file; None unless its content is in the file itself.

    Links, external storage and virtual arrays may name any other file of the machine.
    """
    import h5py  # a tenth of a second, and few sources need it

    if not isinstance(file.get(key, getlink=True), h5py.HardLink):
        return None
    found = file[key]
    own = isinstance(found, h5py.Dataset) and not found.is_virtual and not found.external
    return found if own else None
