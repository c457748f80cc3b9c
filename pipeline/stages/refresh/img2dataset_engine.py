"""The second engine: the package img2dataset on the same Ray cluster, published as a snapshot.

Its files are not changed. img2dataset fetches any address in a url table, including ``file://`` and private networks,
so its requests go through an opener that applies clipmill's address policy.
"""

import http.client
import logging
import os
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

from pipeline.codecs.image_encoding import ImageOptions
from pipeline.config import flatten, require
from pipeline.errors import StorageError
from pipeline.shards.adopt import describe, read_mark
from pipeline.shards.lease import lease
from pipeline.shards.snapshot import Snapshot, publish
from pipeline.shards.storage import Folder
from pipeline.shards.writer import STATS, ShardStats
from pipeline.sources.urls import UrlTable
from pipeline.stages.crawl.addresses import AddressPolicy, AddressRefused
from pipeline.stages.crawl.download import DownloadOptions
from pipeline.stages.ray_session import connect
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.settings import shaping_options
from pipeline.stages.shard_tasks import Workers

logger = logging.getLogger(__name__)


def refresh_with_img2dataset(
    source: UrlTable, folder: Folder, options: ShardOptions, workers: Workers, card: str | None = None
) -> Snapshot:
    """As :func:`pipeline.stages.refresh.refresh.refresh`, with the package img2dataset.

    Raises:
        SettingError: the package is not installed (it does not import on Python 3.13), or lacks an option.
        StorageError: some shards were not finished.
    """
    _refuse_what_it_lacks(source, options.downloads, options.media.image)
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        # The package rebinds its name `main` to a function, so plain attribute access does not reach the module.
        package: Any = import_module("img2dataset.main")
    except ImportError as error:
        require(False, "engine", "img2dataset", f"native, where the package img2dataset does not import ({error})")
    with lease(folder, "a refresh") as held:
        return _refreshed(package, source, held.folder, options, workers, card)


def _refreshed(
    package: Any, source: UrlTable, folder: Folder, options: ShardOptions, workers: Workers, card: str | None
) -> Snapshot:
    planned = sum(1 for _ in source.slices(options.number_sample_per_shard, folder.folder("_plan")))
    if workers.processes_count != 0:
        connect(workers.processes_count)
    package.Downloader = _guarded_downloader(options.downloads)
    package.download(**_arguments(source, folder, options, workers))
    stats = list(_finished(folder))
    if len(stats) < planned:
        raise StorageError(f"{folder.uri}: img2dataset left {planned - len(stats)} of {planned} shards undone")
    shaping = {"engine": "img2dataset", **shaping_options(options, ("image",))}
    return publish(folder, stats, card=card, options={"source": flatten(source), **shaping})


def _arguments(source: UrlTable, folder: Folder, options: ShardOptions, workers: Workers) -> dict[str, Any]:
    images, downloads = options.media.image, options.downloads
    return {
        "url_list": source.url_list,
        "url_col": source.url_col,
        "caption_col": source.caption_col,
        "save_additional_columns": list(source.save_additional_columns) or None,
        "input_format": source.format_of(source.files()[0]),
        "output_folder": folder.uri,
        "output_format": "webdataset",
        "distributor": "ray" if workers.processes_count != 0 else "multiprocessing",
        "processes_count": workers.processes_count or 1,
        "number_sample_per_shard": options.number_sample_per_shard,
        "thread_count": downloads.thread_count,
        "timeout": max(1, round(downloads.timeout)),
        "retries": downloads.retries,
        "user_agent_token": downloads.user_agent_token,
        "disallowed_header_directives": list(downloads.disallowed_header_directives),
        "compute_hash": downloads.compute_hash,
        "verify_hash": source.verify_hash.rsplit(":", 1) if source.verify_hash else None,
        "extract_exif": images.extract_exif,
        "image_size": images.image_size,
        "resize_mode": images.resize_mode,
        "resize_only_if_bigger": images.resize_only_if_bigger,
        "upscale_interpolation": images.upscale_interpolation,
        "downscale_interpolation": images.downscale_interpolation,
        "encode_format": images.encode_format,
        "encode_quality": images.encode_quality,
        "skip_reencode": images.skip_reencode,
        "disable_all_reencoding": images.disable_all_reencoding,
        "min_image_size": images.min_image_size,
        "max_image_area": images.max_image_area,
        "max_aspect_ratio": images.max_aspect_ratio,
    }


def _refuse_what_it_lacks(source: UrlTable, downloads: DownloadOptions, images: ImageOptions) -> None:
    """Options for robots, stores and bytes must not be ignored silently."""
    require(not images.keep_bytes, "keep_bytes", True, "the engine native; img2dataset has skip_reencode only")
    same = source.verify_hash is None or source.verify_hash.rpartition(":")[2] == downloads.compute_hash
    require(
        same, "verify_hash", source.verify_hash, f"img2dataset's: of the kind of compute_hash {downloads.compute_hash}"
    )
    plain = DownloadOptions()
    for name in ("robots_txt", "host_pause", "allow_stores", "allow_local_root"):
        value = getattr(downloads, name)
        require(value == getattr(plain, name), name, value, "the engine native; img2dataset has no such option")


def _guarded_downloader(rules: DownloadOptions) -> Any:
    from img2dataset.downloader import Downloader

    return partial(_Guarded, Downloader, rules)


class _Guarded:
    """img2dataset's downloader; installs the address policy in its worker process."""

    def __init__(self, kind: Any, rules: DownloadOptions, **arguments: Any) -> None:
        self._inner, self._rules = kind(**arguments), rules

    def __call__(self, shard: Any) -> Any:
        urllib.request.install_opener(guarded_opener(self._rules))
        return self._inner(shard)


def guarded_opener(rules: DownloadOptions) -> urllib.request.OpenerDirector:
    """An opener for http and https only that rejects private addresses, also after redirects."""

    policy = AddressPolicy(rules.allow_hosts)

    def connect(address: tuple[str, int], *rest: Any, **named: Any) -> socket.socket:
        host, port = address
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        numbers = [str(entry[4][0]) for entry in found]
        if not policy.allows_name(host, port):
            numbers = [number for number in numbers if policy.allows_address(number, port)]
        if not numbers:
            raise AddressRefused(f"refused: {host} is not a public address")
        # Connect to the checked address, so that a second DNS look-up cannot return another one.
        return socket.create_connection((numbers[0], port), *rest, **named)

    class Http(http.client.HTTPConnection):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._create_connection = connect

    class Https(http.client.HTTPSConnection):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._create_connection = connect

    class HttpHandler(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(Http, request)

    class HttpsHandler(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(Https, request)

    opener = urllib.request.OpenerDirector()
    redirects, errors = urllib.request.HTTPRedirectHandler(), urllib.request.HTTPDefaultErrorHandler()
    for handler in (HttpHandler(), HttpsHandler(), redirects, errors, urllib.request.HTTPErrorProcessor()):
        opener.add_handler(handler)
    return opener


def _finished(folder: Folder) -> Iterator[ShardStats]:
    """img2dataset's counts, with the digest and the fields of the tars it wrote."""
    for file in folder.names(STATS):
        name = file.removesuffix(STATS)
        yield replace(describe(folder, name), status_dict=read_mark(folder, name).status_dict)
