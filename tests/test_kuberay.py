"""The Kubernetes manifest of docs/operations.md against KubeRay's schema, and its job against our own options."""

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.config import from_plain
from pipeline.stages.scheduling.timetable import ScheduledJob, Timetable

ROOT = Path(__file__).resolve().parent.parent
TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}


def holds(required: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    """An object that has these fields and no other ones."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


TEXTS = {"type": "object", "additionalProperties": TEXT}
CONTAINER = holds(
    ("name", "image"),
    name=TEXT,
    image=TEXT,
    env=many(holds(("name",), name=TEXT, value=TEXT)),
    resources=holds(limits=TEXTS, requests=TEXTS),
)
POD = holds(spec=holds(("containers",), serviceAccountName=TEXT, containers=many(CONTAINER)))
CLUSTER = holds(
    ("headGroupSpec",),
    enableInTreeAutoscaling=FLAG,
    authOptions=holds(mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    headGroupSpec=holds(("template",), rayStartParams=TEXTS, template=POD),
    workerGroupSpecs=many(
        holds(
            ("groupName", "maxReplicas", "minReplicas", "template"),
            groupName=TEXT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=TEXTS,
            template=POD,
        )
    ),
)
# The part of KubeRay 1.7's RayCronJob that the manifest uses.
MANIFEST = holds(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCronJob"},
    metadata=holds(("name",), name=TEXT),
    spec=holds(
        ("jobTemplate", "schedule"),
        schedule=TEXT,
        timeZone={"type": "string", "minLength": 1},
        jobTemplate=holds(
            entrypoint=TEXT,
            runtimeEnvYAML=TEXT,
            backoffLimit=COUNT,
            activeDeadlineSeconds=COUNT,
            shutdownAfterJobFinishes=FLAG,
            ttlSecondsAfterFinished=COUNT,
            rayClusterSpec=CLUSTER,
        ),
    ),
)


def block(name: str) -> Any:
    """The YAML block of docs/operations.md whose first line is ``# name``."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"```yaml\n# {re.escape(name)}\n(.*?)```", text, re.DOTALL)
    return yaml.safe_load(found)


def closed(schema: Any) -> Any:
    """A CRD's schema that refuses unknown fields, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {name: closed(value) for name, value in schema.items() if not name.startswith("x-kubernetes")}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def test_the_manifest_fits_the_schema_written_down_here() -> None:
    jsonschema.validate(block("kuberay.yaml"), MANIFEST)


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder with KubeRay's CRDs")
def test_the_manifest_fits_kuberays_own_schema() -> None:
    definition = yaml.safe_load((Path(os.environ["KUBERAY_CRDS"]) / "ray.io_raycronjobs.yaml").read_text())
    (version,) = (one for one in definition["spec"]["versions"] if one["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(block("kuberay.yaml"), schema)
    wrong = block("kuberay.yaml")
    wrong["spec"]["jobTemplate"]["entryPoint"] = "x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def test_a_run_ends_before_the_next_begins() -> None:
    spec = block("kuberay.yaml")["spec"]
    assert spec["schedule"] == "0 3 * * *"
    # The shortest day of a year has 23 hours.
    assert spec["jobTemplate"]["activeDeadlineSeconds"] <= 23 * 3600


def test_nodes_offer_what_the_jobs_ask_for() -> None:
    cluster = block("kuberay.yaml")["spec"]["jobTemplate"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    # KubeRay puts the value behind `ray start --resources=` and leaves the rest to the shell.
    offered = [json.loads(shlex.split(group["rayStartParams"]["resources"])[0]) for group in groups]
    assert all("data_worker" in one for one in offered)


def test_the_example_timetable_is_one() -> None:
    timetable = from_plain(Timetable, block("schedule.yaml"))
    assert timetable.jobs[0].name == "refresh-mine" and isinstance(timetable.jobs[0], ScheduledJob)


@pytest.mark.parametrize("name", ["kuberay.yaml", "schedule.yaml"])
def test_the_commands_are_understood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import config

    document = block(name)
    command = document["spec"]["jobTemplate"]["entrypoint"] if "spec" in document else document["jobs"][0]["command"]
    program, script, *words = shlex.split(command)
    assert program == "python"
    understood: list[Any] = []
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *words])
    monkeypatch.setattr(config, "run_job", lambda presets, *_: understood.append(config._parse(presets, words)))
    run_path(ROOT / script)
    assert understood[0].output_folder == "$CLIPMILL_BUCKET/shards/mine"


def run_path(path: Path) -> None:
    """Run a job's file; tyro wants to find its source, so it is a module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("__main__", path)
    assert spec is not None and spec.loader is not None
    run: Callable[[Any], None] = spec.loader.exec_module
    module = importlib.util.module_from_spec(spec)
    before = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        run(module)
    finally:
        sys.modules["__main__"] = before
