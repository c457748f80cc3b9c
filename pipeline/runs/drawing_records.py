"""Optimised images in MLflow: a parent run for a job, and a child run for every image that shows how it came to be."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.runs.child_runs import ChildRuns
from pipeline.runs.drawing_report import (
    SCORES,
    drawings_table,
    finished,
    gallery,
    metric_name,
    scores_parquet,
)
from pipeline.runs.drawing_sheet import sheet
from pipeline.runs.drawings import IMAGES, DrawingResult
from pipeline.shards.privacy import masked

logger = logging.getLogger(__name__)

GALLERY, TABLE, SHEET = "gallery.html", "table.md", "sheet.png"


@dataclass(frozen=True, kw_only=True)
class DrawingParameters:
    """The parameters of a child run, for comparison."""

    method: str
    subject: str
    seed: int


class DrawingRecord(ChildRuns):
    """The MLflow runs of one job, and the files about all its images."""

    def add(self, result: DrawingResult) -> None:
        """Create a child run for ``result``, unless it exists: curves, images of chosen steps, SVG and film.

        The run of a failed image has MLflow's status FAILED.
        """
        unit, key = result.unit, f"{result.unit.name} {result.settings}"
        parameters = DrawingParameters(method=masked(unit.method), subject=masked(unit.subject), seed=unit.seed)
        run = self._child(key, unit.name, parameters)
        if run is None:
            return
        images = self._folder.folder(IMAGES)
        with ExitStack() as after_an_error:
            child = after_an_error.enter_context(run)
            for entry in result.history:
                numbers = {f"drawing/{name}": value for name, value in entry.items() if name != "step"}
                child.log(numbers, int(entry["step"]))
            child.log({"perf/seconds": result.seconds, "drawing/retries": float(result.retries)}, result.steps)
            for file in result.files:
                folder = "steps" if "-step-" in file else "image"
                child.log_file(f"{folder}/{file}", images.read_bytes(file))
            after_an_error.pop_all()
        run.finish("FAILED" if result.status == "failed" else "FINISHED")
        self._remember(key, run.run_id)

    def conclude(
        self, results: Sequence[DrawingResult], facts: Mapping[str, str], photos: Mapping[str, NDArray[np.uint8]]
    ) -> str:
        """Store scores, gallery, sheet and table in the folder, and the last two in the parent run; returns the table.

        ``photos`` are the images, uint8 [H, W, 3], of subjects that are images.
        """
        table, page = drawings_table(results), gallery(results, facts)
        overview = sheet(results, self._folder, photos)
        self._folder.write_atomic(SCORES, scores_parquet(results))
        self._folder.write_atomic(GALLERY, page.encode())
        self._folder.write_atomic(TABLE, table.encode())
        self._folder.write_atomic(SHEET, overview)
        self._parent.describe(table)
        self._parent.log_text(TABLE, table)
        self._parent.log_file(SHEET, overview)
        logger.info("all images on one page: %s", self._folder.join(GALLERY))
        for method in dict.fromkeys(one.unit.method for one in results):
            some = [one.judge for one in finished(results) if one.unit.method == method]
            if some:
                self._parent.log({f"drawing/{metric_name(method)}/judge": sum(some) / len(some)}, 0)
        return table
