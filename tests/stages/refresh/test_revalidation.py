"""Revalidation of stored images: servers with ETags, without ETags, with robots rules, and failing ones."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pandas
import pytest

from pipeline.codecs.image_encoding import ImageOptions
from pipeline.codecs.options import MediaOptions
from pipeline.errors import SettingError
from pipeline.shards.selection import read_samples
from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.sources.urls import UrlTable
from pipeline.stages.crawl.download import DownloadOptions
from pipeline.stages.refresh import revalidation
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.refresh.settings import Renewal
from pipeline.stages.shard_tasks import Workers
from tests.conftest import image

HERE = Workers(processes_count=0)
KNOWN, ALL = (Renewal(parent="latest", revalidate=which) for which in ("known", "all"))  # type: ignore[arg-type]


class Site:
    """Images 0 to 9; the even ones have an ETag. ``version`` is the one that an image has now."""

    def __init__(self, tmp_path: Path, serve: Any) -> None:
        self.version: Counter[int] = Counter()
        self.status: dict[int, int] = {}
        self.tag: dict[int, str] = {}
        self._reply = serve.Reply
        self.server = serve({f"{number}.jpg": self._answer(number) for number in range(12)})
        self.out, self.list = tmp_path / "out", tmp_path / "list.parquet"

    def body(self, number: int) -> bytes:
        return image(number + 100 * self.version[number])

    def _answer(self, number: int) -> Any:
        def answer(_: int) -> Any:
            body = self.body(number)
            headers = {} if number % 2 else {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}
            headers |= {"X-Robots-Tag": self.tag[number]} if number in self.tag else {}
            return self._reply(body, status=self.status.get(number, 200), headers=headers)

        return answer

    def refresh(
        self, renewal: Renewal, workers: Workers = HERE, hashes: dict[int, str] | None = None, **more: Any
    ) -> Snapshot:
        urls = [f"{self.server.url}/{number}.jpg" for number in range(10)]
        rows = {"url": urls, "caption": [f"number {number}" for number in range(10)]}
        source: dict[str, Any] = {}
        if hashes is not None:
            rows["sha256"] = [hashes.get(number, hashlib.sha256(self.body(number)).hexdigest()) for number in range(10)]
            source["verify_hash"] = "sha256:sha256"
        pandas.DataFrame(rows).to_parquet(self.list)
        downloads = DownloadOptions(allow_hosts=("127.0.0.1",), retries=0, **more)
        options = ShardOptions(
            media=MediaOptions(image=ImageOptions(disable_all_reencoding=True)),
            downloads=downloads,
            number_sample_per_shard=4,
        )
        table = UrlTable(url_list=str(self.list), caption_col="caption", **source)
        self.server.requests.clear()
        self.server.statuses.clear()
        return refresh(table, Folder(self.out), options, workers, renewal=renewal)

    def stored(self, snapshot: Snapshot) -> dict[int, bytes]:
        """The visible images by number."""
        folder = Folder(snapshot.folder)
        samples = [sample for shard in snapshot.shards for sample in read_samples(folder, shard)]
        return {int(sample.fields["txt"].split()[-1]): sample.fields["jpg"] for sample in samples}

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.out.rglob("*") if path.is_file()}


@pytest.fixture
def site(tmp_path: Path, serve: Any) -> Site:
    return Site(tmp_path, serve)


def test_nothing_has_changed(site: Site) -> None:
    first = site.refresh(Renewal(parent="latest"))
    before = site.files()
    assert site.refresh(KNOWN) == first
    assert Counter(site.server.statuses) == {304: 5}
    assert site.refresh(ALL) == first
    assert Counter(site.server.statuses) == {304: 5, 200: 5}
    assert site.files() == before


@pytest.mark.parametrize("processes", [0, 2])
def test_changed_images_take_the_place_of_stored_ones(site: Site, processes: int, ray_cluster: Any) -> None:
    first = site.refresh(Renewal(parent="latest"))
    tars = {path.name: path.read_bytes() for path in site.out.glob("*.tar")}
    site.version.update([2, 3, 6])
    second = site.refresh(KNOWN, Workers(processes_count=processes))
    assert second.parent == first.id
    assert {name: second.changes[name] for name in ("changed", "kept", "added", "removed")} == {
        "changed": 2,
        "kept": 8,
        "added": 0,
        "removed": 0,
    }
    expected = {number: site.body(number) for number in range(10)} | {3: image(3)}  # it has no validator
    assert site.stored(second) == expected
    assert all((site.out / name).read_bytes() == content for name, content in tars.items())
    third = site.refresh(ALL)
    assert third.changes["changed"] == 1 and site.stored(third)[3] == site.body(3)
    assert site.refresh(ALL) == third
    assert site.stored(site.refresh(Renewal(parent="latest"))) == {number: site.body(number) for number in range(10)}


def test_a_purge_forgets_what_was_replaced(site: Site) -> None:
    site.refresh(Renewal(parent="latest"))
    site.version.update([0, 6])
    second = site.refresh(Renewal(parent="latest", revalidate="known", purge=True))
    assert site.stored(second) == {number: site.body(number) for number in range(10)}
    listed = pandas.concat([pandas.read_parquet(path) for path in site.out.glob("*.parquet")])
    assert len(listed) == 10 and set(listed["status"]) == {"success"}
    assert site.refresh(KNOWN) == second


def test_what_cannot_be_had_stays_and_what_is_forbidden_goes(site: Site) -> None:
    first = site.refresh(Renewal(parent="latest"))
    site.status |= {0: 404, 1: 503, 2: 410}
    assert site.refresh(ALL) == first
    site.tag[4] = "noai"
    second = site.refresh(KNOWN)
    assert sorted(site.stored(second)) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert second.dropped == {"optout": 1} and second.changes["changed"] == 1
    assert site.refresh(KNOWN) == second
    del site.tag[4]
    assert site.refresh(Renewal(parent="latest", retry_failed=True)) == second  # it was forbidden, not out of order


def test_opted_out_images_are_not_asked_for(site: Site, tmp_path: Path) -> None:
    site.refresh(Renewal(parent="latest"))
    (tmp_path / "out.txt").write_text(f"{site.server.url}/2.jpg\n")
    renewal = Renewal(parent="latest", revalidate="all", opt_out=str(tmp_path / "out.txt"))
    snapshot = site.refresh(renewal)
    assert "/2.jpg" not in site.server.requests and len(site.server.requests) == 9
    assert 2 not in site.stored(snapshot)


def test_a_killed_job_asks_for_no_picture_twice(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.refresh(Renewal(parent="latest"))
    site.version.update([0, 9])
    asked = revalidation.Revalidation._ask
    calls: list[str] = []

    def dies(self: Any, shard: Any) -> Any:
        calls.append(shard.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return asked(self, shard)

    monkeypatch.setattr(revalidation.Revalidation, "_ask", dies)
    with pytest.raises(KeyboardInterrupt):
        site.refresh(ALL)
    snapshot = site.refresh(ALL)
    assert calls == ["00000", "00001", "00002", "00002"]
    assert Counter(site.server.requests) == {"/8.jpg": 1, "/9.jpg": 2, "/0.jpg": 1}
    assert snapshot.changes["changed"] == 2
    assert site.stored(snapshot) == {number: site.body(number) for number in range(10)}


def test_images_without_a_digest_cannot_be_compared(site: Site) -> None:
    site.refresh(Renewal(parent="latest"), compute_hash=None)
    with pytest.raises(SettingError, match="compute_hash: nothing given"):
        site.refresh(ALL, compute_hash=None)


def test_another_expected_digest_is_a_change(site: Site) -> None:
    first = site.refresh(Renewal(parent="latest"), hashes={})
    assert site.refresh(Renewal(parent="latest"), hashes={}) == first and site.server.requests == []
    site.version.update([5])
    second = site.refresh(Renewal(parent="latest"), hashes={})
    assert site.server.requests == ["/5.jpg"] and second.changes["changed"] == 1
    assert read_snapshot(str(site.out)) == second and site.stored(second)[5] == site.body(5)
