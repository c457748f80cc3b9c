"""The history of scheduled jobs as MLflow has it."""

import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from pipeline.errors import SettingError
from pipeline.stages.scheduling.scheduler import Fire
from pipeline.tracking.fires import MlflowHistory
from pipeline.tracking.runs import Tracking

NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
FIRE = Fire(job="a", time=NOON, attempt=0, id="a-20261122T1200Z", state="waiting", command="x --token abc")


@pytest.fixture
def settings(store: str) -> Tracking:
    return Tracking(tracking_uri=store, experiment=f"schedule-{uuid.uuid4().hex}")


def recorded(settings: Tracking) -> list[Run]:
    client = MlflowClient(settings.tracking_uri)
    return list(client.search_runs([client.get_experiment_by_name(settings.experiment).experiment_id]))


def test_a_fire_is_one_run_from_waiting_to_its_end(settings: Tracking) -> None:
    history = MlflowHistory(settings)
    history.save(FIRE)
    running = replace(FIRE, state="running", submitted=NOON + timedelta(seconds=4))
    history.save(running)
    ended = replace(
        running, state="succeeded", ended=NOON + timedelta(seconds=64), exit_code=0, snapshot="s3://me:pw@b/x@00000-ab"
    )
    MlflowHistory(settings).fires("a")
    history.save(ended)
    (run,) = recorded(settings)
    assert run.info.run_name == FIRE.id and run.info.status == "FINISHED"
    assert run.data.metrics == {"schedule/delay_seconds": 4, "schedule/duration_seconds": 60}
    assert run.info.end_time == int((NOON + timedelta(seconds=64)).timestamp() * 1000)
    assert run.data.tags["schedule.snapshot"] == "s3://***@b/x@00000-ab"
    assert run.data.tags["schedule.command"] == "x --token ***"
    (read,) = MlflowHistory(settings).fires("a")
    assert read == replace(ended, command="x --token ***", snapshot="s3://***@b/x@00000-ab")
    assert MlflowHistory(settings).fires("b") == []


@pytest.mark.parametrize(
    ("state", "status"),
    [("waiting", "SCHEDULED"), ("failed", "FAILED"), ("lost", "FAILED"), ("stopped", "KILLED"), ("skipped", "KILLED")],
)
def test_states_have_a_status(state: str, status: str, settings: Tracking) -> None:
    history = MlflowHistory(settings)
    history.save(replace(FIRE, state=state, ended=None if state == "waiting" else NOON))
    (run,) = recorded(settings)
    assert run.info.status == status


def test_what_mlflow_does_not_take_is_said_again(
    settings: Tracking, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    history = MlflowHistory(settings)
    with monkeypatch.context() as patch:
        patch.setattr(history._client, "create_run", lambda *_, **__: (_ for _ in ()).throw(MlflowException("away")))
        history.save(FIRE)
    assert "sent again later" in caplog.text and MlflowHistory(settings).fires("a") == []
    history.save(replace(FIRE, id="a-20261122T1300Z", time=NOON + timedelta(hours=1)))
    assert [fire.id for fire in MlflowHistory(settings).fires("a")] == ["a-20261122T1300Z", "a-20261122T1200Z"]


def test_a_server_that_does_not_answer_is_told_at_the_start() -> None:
    with pytest.raises(SettingError, match="tracking_uri"):
        MlflowHistory(Tracking(tracking_uri="http://127.0.0.1:9"))
