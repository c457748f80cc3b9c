"""Connect a job to Ray: to the cluster it was submitted to, or to a private local one."""

import json
import logging
import os
import secrets

from pipeline.config import require
from pipeline.errors import ClusterError

# Environment of every worker: no update checks, one thread per library (Ray counts the cores).
WORKER_ENVIRONMENT = {"NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}


def connect(num_cpus: int | None = None) -> None:
    """Connect to the cluster named by ``RAY_ADDRESS`` (set inside ``ray job submit``), else start a private one.

    Does not join another Ray on this machine without ``RAY_ADDRESS``. ``num_cpus`` is the size of the private cluster,
    all cores by default. Does nothing if this process is already connected.

    Raises:
        ClusterError: a private cluster does not start.
        SettingError: ``RAY_ADDRESS`` names a cluster that does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        # Ray listens on all addresses of the machine and requires a token. With a token set here, it does not write one
        # into the home folder.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
    import ray

    if ray.is_initialized():
        return
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    submitted = job_environment()
    runtime = {"env_vars": {name: value for name, value in WORKER_ENVIRONMENT.items() if name not in submitted}}
    if address is None:
        hook = f"{__name__}.{quiet_worker.__name__}"
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                runtime_env={**runtime, "worker_process_setup_hook": hook},
                logging_level=logging.ERROR,
            )
        except Exception as error:  # a plain one after 30 s
            reason = "the machine may lack memory or CPU time; run the same command again to continue"
            raise ClusterError(f"Ray did not start here ({error}): {reason}") from error
        return
    try:
        ray.init(address=address, runtime_env=runtime, logging_level=logging.ERROR)
    except ConnectionError as error:
        require(False, "RAY_ADDRESS", address, f"the address of a running cluster ({error})")


def job_environment() -> dict[str, str]:
    """The variables that ``ray job submit --runtime-env-json`` set for this job; empty outside of one.

    Ray gives them to every worker, and refuses a job that sets one of them again.
    """
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return dict((config.get("runtime_env") or {}).get("env_vars") or {})


def quiet_worker() -> None:
    """Run by Ray in each process of a private cluster, which has no dashboard.

    A helper of Ray Train polls the dashboard for its controller once a second, and warns each time.
    """
    name = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(name).setLevel(logging.ERROR)


def log_as_job() -> None:
    """Log like the jobs, in a worker: Ray has its own handlers on the root logger, and sends the lines to the job."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ours = logging.getLogger("pipeline")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
