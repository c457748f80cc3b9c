#!/usr/bin/env python
"""Submit jobs to Ray at set times: each fire once, one run per job at a time, history in MLflow.

    python jobs/schedule.py run schedule.yaml --address http://127.0.0.1:8265
    python jobs/schedule.py show schedule.yaml

The file lists the jobs:

    jobs:
      - name: refresh-cc3m
        cron: "0 3 * * *"
        timezone: Europe/Berlin
        command: python jobs/refresh_dataset.py urls --url-list s3://bucket/list.parquet --output-folder
        s3://bucket/cc3m misfire_grace_minutes: 120
        retries: 2
        environment_from: [AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY]

A fire's submission id is its name and time (refresh-cc3m-20261122T0200Z), so a restarted scheduler, or a second one,
knows what was submitted. --once submits what is due now and ends, for cron and systemd timers.
"""

import logging
import os
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

import tyro

from pipeline.config import from_yaml, require, run_job
from pipeline.stages.scheduling.ray_jobs import RayJobs
from pipeline.stages.scheduling.scheduler import Scheduler
from pipeline.stages.scheduling.timetable import ScheduledJob, Timetable, fires_after
from pipeline.tracking.fires import MlflowHistory
from pipeline.tracking.runs import Tracking

logger = logging.getLogger("jobs.schedule")

EXAMPLE = Timetable(
    jobs=(
        ScheduledJob(
            name="refresh-drawn",
            cron="30 2 * * sun",
            timezone="Europe/Berlin",
            command="python jobs/refresh_dataset.py smoke",
        ),
    )
)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The timetable, and the cluster."""

    file: tyro.conf.Positional[str]
    """YAML file with the jobs."""
    address: str = field(default_factory=lambda: os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"))
    """URL of Ray's job server; by default $RAY_API_SERVER_ADDRESS."""
    once: bool = False
    """Submit the due jobs and end, instead of waiting for the next fire."""
    poll_seconds: float = 15.0
    """Seconds between checks of the jobs and the clock, 0.1 to 60."""
    show: int = 0
    """Print this number of next fires per job instead of submitting jobs; 0 disables."""
    tracking: Tracking = field(
        default_factory=lambda: Tracking(
            experiment="clipmill-schedule", primary_metric="schedule/duration_seconds", system_metrics=False
        )
    )

    def __post_init__(self) -> None:
        require(0.1 <= self.poll_seconds <= 60, "poll_seconds", self.poll_seconds, "0.1 to 60 seconds")
        require(self.show >= 0, "show", self.show, "0 or more")


PRESETS = {
    "run": ("Submit the jobs of a file when they are due, until stopped.", Schedule(file=tyro.MISSING)),
    "show": ("Print the next fires of a file's jobs.", Schedule(file=tyro.MISSING, show=5)),
    "smoke": ("Print the next fires of a built-in example.", Schedule(file="", show=3)),
}


def main(run: Schedule) -> None:
    """Wire timetable, cluster and history."""
    timetable = from_yaml(Timetable, run.file) if run.file else EXAMPLE
    if run.show:
        print(table(timetable, run.show))
        return
    require(bool(run.file), "file", run.file, "a YAML file")
    scheduler = Scheduler(timetable, RayJobs(run.address), MlflowHistory(run.tracking))
    logger.info("%d jobs\n%s", len(timetable.jobs), table(timetable, 1))
    scheduler.tick()
    while not run.once:
        time.sleep(run.poll_seconds)
        scheduler.tick()


def table(timetable: Timetable, count: int) -> str:
    """The next fires of each job, in its time zone and in UTC."""
    now = datetime.now(UTC)
    rows = [
        f"{job.name:30} {local:%a %Y-%m-%d %H:%M %Z}  {local.astimezone(UTC):%Y-%m-%dT%H:%MZ}"
        for job in timetable.jobs
        for local in fires_after(job, now, count)
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    run_job(PRESETS, main)
