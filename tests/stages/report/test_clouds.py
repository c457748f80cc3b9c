"""Point clouds in a report: their values, views of examples, and clouds that cannot be read."""

import base64
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.codecs.point_views import depth_image
from pipeline.loaders.images import decode
from pipeline.shards.clouds import write_npy
from pipeline.shards.sample import Sample
from pipeline.shards.storage import Folder
from pipeline.sources.drawn.source import Drawn
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.report.clouds import EXAMPLE_SIZE, cloud_values, example_cloud
from pipeline.stages.report.dataset_report import make_report, report_page
from pipeline.stages.report.dataset_statistics import ReportLimits, measure
from pipeline.stages.shard_tasks import Workers

HERE = Workers(processes_count=0)
CLOUD = np.array([[0, 0, 0], [0, 0, 2], [0, 0, 4], [3, 0, 2], [-3, 0, 2]], np.float32)


def test_values() -> None:
    body = write_npy(CLOUD)
    found = cloud_values(Sample("a", {"points.npy": body}))
    assert found == {"cloud_points": 5.0, "cloud_extent": pytest.approx(3.0), "cloud_bytes": float(len(body))}
    assert cloud_values(Sample("a", {})) == {} and cloud_values(Sample("a", {"npy": body})) == {}
    assert cloud_values(Sample("a", {"points.npy": body[:-1]})) is None


def test_an_example_shows_six_views_in_two_rows() -> None:
    points = np.random.default_rng(0).normal(0, 9, (4_000, 3)).astype(np.float32)
    made = example_cloud(write_npy(points))
    assert made is not None
    pixels = decode(base64.b64decode(made[0]))
    assert pixels.shape == (2 * EXAMPLE_SIZE, 3 * EXAMPLE_SIZE, 3) and made[1:] == (3 * EXAMPLE_SIZE, 2 * EXAMPLE_SIZE)
    row = depth_image(torch.from_numpy(points), size=EXAMPLE_SIZE)[0].float()
    wanted = torch.cat(row.split(3 * EXAMPLE_SIZE, dim=1))
    shown = torch.from_numpy(pixels[..., 0].astype(np.float32))
    assert float(torch.corrcoef(torch.stack([wanted.flatten(), shown.flatten()]))[0, 1]) > 0.98
    assert example_cloud(b"broken") is None


def test_a_page_of_clouds(tmp_path: Path) -> None:
    source = Drawn(points=True, split="solids", samples=8, cloud_points=64)
    snapshot = refresh(source, Folder(tmp_path / "solids"), ShardOptions(), HERE, card="drawn_solids")
    options = ReportLimits()
    page = report_page(make_report(snapshot, measure(snapshot, options, HERE), options))
    assert "Points per cloud" in page and "Extent of clouds" in page and "point clouds" in page
    assert page.count("data:image/jpeg;base64") >= 8
