"""Opt-out lists: images to remove from the dataset.

One entry per line (blank lines and lines that begin with # are skipped), or the first string column of a parquet file:

* a url, ``https://example.com/a.jpg``: that image, by http or https;
* a prefix, ``https://example.com/people/`` or ``example.com/img*``: all urls below it;
* a host, ``example.com``: all urls of the host and its subdomains;
* the hex digest of a downloaded file (the column of ``--compute-hash``), or a sample's key.

In doubt an entry matches: hiding one image too many is better than keeping an opted-out one.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import ReadError, unreadable
from pipeline.shards.storage import split_file

# NumPy drops trailing zeros of such strings, on both sides of a comparison.
DIGEST = np.dtype("S16")
_PARTS = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.\-]*://)?(?:[^/@?#]*@)?(\[[^\]/]*\]|[^/:?#]*)(.*)", re.DOTALL)
_HOST = re.compile(r"[a-z0-9_\-]+(\.[a-z0-9_\-]+)+")


class OptOut:
    """A list in memory: 16 bytes per entry; prefixes and hosts as text."""

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self._hosts: set[str] = set()
        self._prefixes: defaultdict[str, list[str]] = defaultdict(list)
        digests = bytearray()
        for entry in entries:
            digests += self._add(entry)
        self._exact = np.unique(np.frombuffer(bytes(digests), DIGEST))

    def __len__(self) -> int:
        return len(self._exact)

    def matches(self, urls: Sequence[str], *others: Sequence[str | None]) -> NDArray[np.bool_]:
        """Whether each row is on the list, bool [rows]: by its url, or by one of the ``others`` (keys, digests)."""
        found = np.zeros(len(urls), np.bool_)
        if not len(self):
            return found
        for names in ([_plain(url) for url in urls], *others):
            wanted = np.frombuffer(b"".join(_digest(name or "") for name in names), DIGEST)
            at = np.minimum(np.searchsorted(self._exact, wanted), len(self._exact) - 1)
            found |= self._exact[at] == wanted
        if self._hosts or self._prefixes:
            found |= np.fromiter(map(self._below, urls), np.bool_, len(urls))
        return found

    def _add(self, entry: str) -> bytes:
        plain = _plain(entry)
        if plain.endswith(("/", "*")):
            plain = plain.rstrip("*")
            self._prefixes[_host(plain)].append(plain)
        elif _HOST.fullmatch(plain):
            self._hosts.add(plain)
        return _digest(plain)

    def _below(self, url: str) -> bool:
        plain = _plain(url)
        host = _host(plain)
        labels = host.split(".")
        if any(".".join(labels[start:]) in self._hosts for start in range(len(labels))):
            return True
        return any(plain.startswith(prefix) for prefix in self._prefixes.get(host, ()))


def read_opt_out(uri: str | None) -> OptOut:
    """The list at ``uri`` (a path or any fsspec URI, ``.txt`` or ``.parquet``); an empty one for ``None``.

    Raises:
        SettingError: no such file, or not such a list.
        ReadError: the store refuses.
    """
    if uri is None:
        return OptOut()
    try:
        folder, name = split_file(uri)
        with folder.open(name) as file:
            return OptOut(_parquet_entries(file) if uri.endswith(".parquet") else _text_entries(file))
    except ReadError:
        raise
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        allowed = "a .txt with one entry a line, or a .parquet with a text column"
        raise unreadable("opt_out", uri, allowed, error) from error


def _text_entries(file: Iterable[bytes]) -> Iterator[str]:
    for line in file:
        entry = line.decode("utf-8-sig").strip()
        if entry and not entry.startswith("#"):
            yield entry


def _parquet_entries(file: Any) -> Iterator[str]:
    table = pq.ParquetFile(file)
    names = [field.name for field in table.schema_arrow if pa.types.is_string(field.type)]
    names += [field.name for field in table.schema_arrow if pa.types.is_large_string(field.type)]
    if not names:
        raise pa.ArrowInvalid("no text column")
    for batch in table.iter_batches(columns=names[:1]):
        yield from (entry.strip() for entry in batch.column(0).to_pylist() if entry and entry.strip())


def _plain(url: str) -> str:
    """The url without scheme, user and fragment, with the host in lower case; other text is unchanged."""
    text = url.strip()
    match = _PARTS.fullmatch(text)
    if match is None:
        return text
    host, rest = match.groups()
    return host.lower() + str(rest).partition("#")[0]


def _host(plain: str) -> str:
    return re.split(r"[/:?]", plain, maxsplit=1)[0] if not plain.startswith("[") else plain.partition("]")[0] + "]"


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST.itemsize).digest()
