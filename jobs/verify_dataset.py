#!/usr/bin/env python
"""Re-hash and count a snapshot, and report the problems of each shard.

    ray job submit --working-dir . -- python jobs/verify_dataset.py snapshot s3://bucket/cc3m
    python jobs/verify_dataset.py snapshot data/cc3m@00002-5d1b2c3a4e5f --decode --json problems.json

Tars, parquet files, sidecars, selections and manifests are read once; --decode also decodes every image and sound.
Prints one line per shard with a problem. The exit code is 0 without problems, else 1.
"""

import getpass
import json
import tempfile
from dataclasses import dataclass, field

import tyro

from pipeline.codecs import codec_names, codec_of
from pipeline.config import run_job, writable_file
from pipeline.errors import DataError
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.media import medium_of
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder, split_file
from pipeline.shards.verify import Decode, Verification, folder_problems
from pipeline.stages.shard_tasks import Workers, run_tasks

SMOKE = f"{tempfile.gettempdir()}/clipmill-smoke-{getpass.getuser()}/verified"


@dataclass(frozen=True, kw_only=True)
class Verify:
    """A snapshot and its checks."""

    data: tyro.conf.Positional[str]
    """Folder of a snapshot (its latest) or FOLDER@ID; a path or any fsspec URI."""
    decode: bool = False
    """Also decode every image and sound."""
    json: str = ""
    """JSON file for the findings: a path or a URI."""
    workers: Workers = field(default_factory=Workers)


@dataclass(frozen=True, kw_only=True)
class Smoke(Verify):
    """The same job, on a snapshot that it draws first."""


PRESETS: dict[str, tuple[str, Verify]] = {
    "snapshot": ("The snapshot in a folder.", Verify(data=tyro.MISSING)),
    "smoke": (
        "A small drawn snapshot, in this process.",
        Smoke(data=SMOKE, decode=True, workers=Workers(processes_count=0)),
    ),
}


def main(run: Verify) -> None:
    """Wire snapshot, checks and workers."""
    output = writable_file("json", run.json) if run.json else ""
    if isinstance(run, Smoke):
        drawn_snapshot(Folder(run.data))
    snapshot = read_snapshot(run.data)
    checks = Verification(snapshot=snapshot, decode=decoders(snapshot.fields) if run.decode else {})
    wrong: dict[str, list[str]] = {}
    for number, text in run_tasks(checks.check, range(len(snapshot.shards)), run.workers):
        problems = json.loads(text)
        if problems:
            wrong[snapshot.shards[number].name] = problems
            print(f"{snapshot.shards[number].name}: {'; '.join(problems)}", flush=True)
    around = folder_problems(Folder(snapshot.folder), snapshot)
    for problem in around:
        print(problem)
    if output:
        found = {"snapshot": snapshot.uri, "shards": len(snapshot.shards), "problems": wrong, "folder": around}
        place, name = split_file(output)
        place.write_atomic(name, json.dumps(found, indent=2).encode())
    if wrong or around:
        shards = f"{len(wrong)} of {len(snapshot.shards)} shards are wrong"
        raise DataError(f"{snapshot.uri}: {shards}, and {len(around)} problems are outside of the shards")
    print(f"{snapshot.uri}: {snapshot.samples} samples in {len(snapshot.shards)} shards, all well")


def decoders(fields: tuple[str, ...]) -> dict[str, Decode]:
    """The decoders of the media that ``fields`` have, by medium."""
    found = {medium.name for name in fields if (medium := medium_of(name)) is not None}
    return {medium: codec_of(medium).decode for medium in codec_names() if medium in found}


if __name__ == "__main__":
    run_job(PRESETS, main)
