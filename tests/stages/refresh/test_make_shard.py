"""What goes into a shard besides images."""

import json
from typing import Any

import pytest

from pipeline.stages.refresh.make_shard import _flat_json


@pytest.mark.parametrize(
    "record",
    [
        {"url": "http://a/b,\n    c", "caption": 'a "café" 🐈, {b}: [1,\n    2]', "width": 3, "exif": "{}"},
        {"caption": None, "score": 0.1, "nan": float("nan"), "big": 2**60, "ok": True, "1, 2": ", "},
    ],
)
def test_the_fast_json_is_the_indented_json(record: dict[str, Any]) -> None:
    finite = {name: None if value != value else value for name, value in record.items()}
    assert _flat_json(record) == json.dumps(finite, indent=4).encode()
