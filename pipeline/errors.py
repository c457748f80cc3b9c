"""The errors of clipmill, and who should catch each.

ClipmillError
  SettingError     a setting is wrong; a job prints the sentence and exits with code 2
  DataError        stored data is broken, missing or stale; the sentence names the file
    SnapshotError  a snapshot cannot be read or published
    SidecarError   a sidecar is missing, or was made from other bytes
  StorageError     a disk or an object store refuses (disk full, no credentials); run again to resume
    ReadError      the same for reading
    LeaseLost      another job has taken over the folder of a suspended one, which must stop
  ClusterError     Ray did not start on this machine; run again, or with fewer workers
  GpuMemoryError   a step needs more memory than the GPU has (pipeline.training.devices); other options need less
  TooManyFailures  a job gave up because fewer rows became samples than the user's floor allows
  ImagesFailed     a drawing job gave up some images, whose losses are not finite; the others are finished
  SampleError      one sample is bad; caught at a stage's sample boundary and counted, never seen by a user
"""

from typing import Literal

Status = Literal["failed_to_download", "failed_to_resize"]


class ClipmillError(Exception):
    """Root of every error that clipmill raises on purpose."""


class SettingError(ClipmillError, ValueError):
    """An invalid setting, found before a cluster or a GPU is used.

    The sentence is "FIELD: got VALUE, expected ALLOWED". ``problem`` replaces "got VALUE"; an empty ``allowed`` leaves
    out the rest.
    """

    def __init__(self, field: str, value: object, allowed: str, problem: str = "") -> None:
        super().__init__(f"{field}: {problem or _got(value)}" + (f", expected {allowed}" if allowed else ""))
        self.field = field
        self.value = value
        self.allowed = allowed
        self.problem = problem

    def __reduce__(self) -> tuple[type["SettingError"], tuple[str, object, str, str]]:
        return SettingError, (self.field, self.value, self.allowed, self.problem)

    def within(self, place: str) -> "SettingError":
        """The same error with ``place`` before the field: the file, the key or the method that has the field."""
        return SettingError(f"{place}{self.field}", self.value, self.allowed, self.problem)


class DataError(ClipmillError):
    """Stored data that is broken, missing or stale."""


class SnapshotError(DataError):
    """A snapshot that cannot be read, or a folder that cannot become one."""


class SidecarError(DataError):
    """A sidecar that is missing, or that belongs to another tar."""


class StorageError(ClipmillError):
    """A disk or store that refuses; a failed write leaves no partial file under a final name."""


class ReadError(StorageError, OSError):
    """A disk or store that refuses to give a file that may exist; code that handles ``OSError`` handles it too."""


class LeaseLost(StorageError):
    """Another job has taken over the folder: this one, which was suspended, must write no more."""


class ClusterError(ClipmillError):
    """A private Ray cluster that did not start."""


class TooManyFailures(ClipmillError):
    """Fewer rows became samples than the user's floor allows; finished work is kept."""


class ImagesFailed(ClipmillError):
    """Images of a drawing job were given up; the others are finished, and the report has all."""


class SampleError(ClipmillError):
    """One bad sample.

    ``status`` is img2dataset's status of the row; ``error_class`` is the short reason by which counters group;
    ``message`` is the sentence stored in the parquet. ``attempts`` counts requests of a download.
    """

    def __init__(
        self,
        status: Status,
        error_class: str,
        message: str,
        http_status: int | None = None,
        attempts: int = 0,
    ) -> None:
        super().__init__(message)
        self.status: Status = status
        self.error_class = error_class
        self.message = message
        self.http_status = http_status
        self.attempts = attempts

    def __reduce__(
        self,
    ) -> tuple[type["SampleError"], tuple[Status, str, str, int | None, int]]:
        return SampleError, (
            self.status,
            self.error_class,
            self.message,
            self.http_status,
            self.attempts,
        )


def missing(field: str, place: str) -> SettingError:
    """The error for a setting that names a file or folder that does not exist."""
    return SettingError(field, place, "", f"no such file or folder: {_shorten(place)}")


def unreadable(field: str, place: str, allowed: str, error: Exception) -> SettingError:
    """The error for a setting that names a file that cannot be read, by the ``error`` of reading it."""
    if isinstance(error, FileNotFoundError):
        return missing(field, place)
    if isinstance(error, PermissionError):
        return SettingError(field, place, "", f"no permission to read {_shorten(place)}")
    if isinstance(error, IsADirectoryError):
        return SettingError(field, place, allowed, f"{_shorten(place)} is a folder")
    if isinstance(error, UnicodeDecodeError):
        return SettingError(field, place, allowed, f"{_shorten(place)} is not UTF-8 text")
    return SettingError(field, place, allowed, f"cannot read {_shorten(place)} ({' '.join(str(error).split())})")


def _got(value: object) -> str:
    return "nothing given" if value is None or value in ("", (), []) else f"got {_shorten(value)}"


def _shorten(value: object, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
