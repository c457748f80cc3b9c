#!/usr/bin/env python
"""Write a report of a snapshot: dropped samples and reasons, sizes, captions, samples, duplicates, changes, hosts.

    ray job submit --working-dir . -- python jobs/report_dataset.py snapshot --data s3://bucket/cc3m \
        --output s3://bucket/cc3m/report.html
    python jobs/report_dataset.py snapshot --data data/drawn --processes-count 0

The report is one HTML file that needs no network. It is also stored as an artifact of an MLflow run with the snapshot
as its input; --no-track disables this.
"""

import getpass
import logging
import tempfile
from dataclasses import dataclass, field

import tyro

from pipeline.config import require, run_job, writable_folder
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder, split_file
from pipeline.stages.refresh.make_shard import AS_IT_IS
from pipeline.stages.report.dataset_report import make_report, report_page
from pipeline.stages.report.dataset_statistics import ReportLimits, measure
from pipeline.stages.shard_tasks import Workers
from pipeline.tracking.runs import Tracking, open_tracker

logger = logging.getLogger("jobs.report_dataset")

ARTIFACT = "report.html"
SMOKE_FOLDER = f"{tempfile.gettempdir()}/clipmill-smoke-{getpass.getuser()}/report"


@dataclass(frozen=True, kw_only=True)
class ReportDataset:
    """The snapshot, how much of it to read, and the output file."""

    data: str
    """Folder of the data set (path or URI) for its latest snapshot, or FOLDER@SNAPSHOT_ID."""
    output: str = "report.html"
    """HTML file: a path or any fsspec URI; empty for MLflow only."""
    draw: int = 0
    """Number of samples of the embedded world to draw into the folder first."""
    measuring: ReportLimits = field(default_factory=ReportLimits)
    workers: Workers = field(default_factory=Workers)
    track: bool = True
    """Store the report in MLflow."""
    tracking: Tracking = field(
        default_factory=lambda: Tracking(
            experiment="clipmill-data", primary_metric="data/samples", system_metrics=False
        )
    )

    def __post_init__(self) -> None:
        require(self.output == "" or self.output.endswith(".html"), "output", self.output, "a file that ends in .html")
        require(bool(self.output) or self.track, "output", self.output, "a file, where --no-track is given")
        require(self.draw >= 0, "draw", self.draw, "0 or more")


PRESETS = {
    "snapshot": ("A report of a snapshot.", ReportDataset(data=tyro.MISSING)),
    "smoke": (
        "A report of sixty-four drawn samples in the temporary folder, in this process.",
        ReportDataset(
            data=SMOKE_FOLDER,
            output=f"{SMOKE_FOLDER}.html",
            draw=64,
            workers=Workers(processes_count=0),
            track=False,
        ),
    ),
}


def main(run: ReportDataset) -> None:
    """Wire snapshot, statistics, report and tracker."""
    output = writable_folder("output", run.output) if run.output else ""
    if run.draw:
        drawn_snapshot(Folder(run.data), run.draw, AS_IT_IS.number_sample_per_shard, run.workers)
    snapshot = read_snapshot(run.data)
    with open_tracker(run.tracking, run, new=run.track) as tracker:
        statistics = measure(snapshot, run.measuring, run.workers)
        page = report_page(make_report(snapshot, statistics, run.measuring))
        tracker.log_dataset(snapshot, "report")
        tracker.log_text(ARTIFACT, page)
        tracker.log({"data/samples": statistics.visible, "data/rows": snapshot.rows}, step=0)
    if output:
        folder, name = split_file(output)
        folder.write_atomic(name, page.encode())
        logger.info("%s: %d samples, %.1f MB", output, statistics.visible, len(page) / 1e6)


if __name__ == "__main__":
    run_job(PRESETS, main)
