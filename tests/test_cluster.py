"""cluster.yaml as Ray reads it: against Ray's own schema, on a simulated AWS, and its shell commands run here."""

import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture(scope="module")
def prepared(config) -> dict:
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(config)


def test_ray_accepts_it(prepared):
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


def test_ray_would_refuse_a_typo(prepared):
    """The schema is closed, so that the test above means something."""
    import jsonschema
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config({**prepared, "idle_timeout_minute": 5})


def test_no_command_of_rays_defaults_is_left(prepared):
    """The defaults install another Ray from the web into whatever Python there is."""
    commands = prepared["head_setup_commands"] + prepared["worker_setup_commands"]
    assert not [command for command in commands if "wheel" in command or "pip install -U" in command]
    assert "-r ~/requirements.lock" in " ".join(prepared["worker_setup_commands"])


@pytest.mark.slow
@pytest.mark.alone
def test_ray_finds_the_nodes_on_a_simulated_aws(prepared, tmp_path, monkeypatch):
    from moto import mock_aws

    # Ray makes a key pair in the home folder.
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    with mock_aws():
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        nodes = AWSNodeProvider.fillout_available_node_types_resources(bootstrap_aws(prepared))["available_node_types"]
    for name, node in nodes.items():
        # What the file says a node has is what AWS sells under that name.
        found, said = node["resources"], prepared["available_node_types"][name]["resources"]
        assert {key: found[key] for key in said} == said, name
    assert nodes["train"]["resources"]["accelerator_type:L4"] == 1


def test_the_instance_types_are_what_the_resources_say(config, monkeypatch):
    from moto import mock_aws

    nodes = config["available_node_types"]
    with mock_aws():
        import boto3

        for node in (nodes["data"], nodes["train"]):
            kind = node["node_config"]["InstanceType"]
            answer = boto3.client("ec2", region_name="us-east-1").describe_instance_types(InstanceTypes=[kind])
            facts = answer["InstanceTypes"][0]
            assert facts["VCpuInfo"]["DefaultVCpus"] == node["resources"]["CPU"]
            gpus = sum(gpu["Count"] for gpu in facts.get("GpuInfo", {}).get("Gpus", []))
            assert gpus == node["resources"].get("GPU", 0)


def test_the_jobs_ask_for_the_resources_that_the_nodes_have(config):
    from pipeline.stages.shard_tasks import DATA_RESOURCE
    from pipeline.training.run import Cluster

    train_resource = Cluster().train_resource

    nodes = config["available_node_types"]
    named = {
        resource
        for node in nodes.values()
        for resource in node["resources"]
        if resource not in ("CPU", "GPU", "memory")
    }
    assert named == {DATA_RESOURCE, train_resource}
    assert DATA_RESOURCE in nodes["data"]["resources"] and train_resource not in nodes["data"]["resources"]
    assert train_resource in nodes["train"]["resources"] and DATA_RESOURCE not in nodes["train"]["resources"]
    # On the head they are signs, not places: without CPUs nothing that works is put there.
    assert nodes["head"]["resources"] == {"CPU": 0, DATA_RESOURCE: 1, train_resource: 1}


def test_the_head_is_stable_and_the_data_nodes_are_cheap(config):
    nodes = config["available_node_types"]
    assert "InstanceMarketOptions" not in nodes["head"]["node_config"]
    assert nodes["data"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert nodes["data"]["min_workers"] == nodes["train"]["min_workers"] == 0


def test_every_node_has_the_token_and_asks_for_it(config):
    mounts = config["file_mounts"]
    assert mounts["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert (ROOT / mounts["/home/ubuntu/requirements.lock"]).is_file()
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert command.startswith(". ~/clipmill.env; "), "the environment holds RAY_AUTH_MODE"
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


@pytest.mark.parametrize("head_ip", ["", "10.0.0.7"])
def test_the_environment_file_can_be_made_and_read(config, tmp_path, head_ip):
    """As Ray runs a command: in brackets, quoted, in a login shell."""
    make = f"true && ({config['setup_commands'][0]})"
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", **({"RAY_HEAD_IP": head_ip} if head_ip else {})}
    subprocess.run(["bash", "-c", make], env=environment, check=True, timeout=20)
    read = 'set -e; . ~/clipmill.env; echo "$MLFLOW_TRACKING_URI|$RAY_AUTH_MODE|$CLIPMILL_BUCKET|$PATH"'
    shown = subprocess.run(["bash", "-c", read], env=environment, capture_output=True, text=True, timeout=20)
    uri, mode, bucket, path = shown.stdout.strip().split("|")
    assert shown.returncode == 0 and not shown.stderr
    assert uri == f"http://{head_ip}:5000" if head_ip else uri.startswith("http://") and uri.endswith(":5000")
    assert (mode, bucket) == ("token", "s3://CHANGE-ME") and path.startswith(f"{tmp_path}/clipmill/bin:")


def test_the_commands_are_well_formed_shell(prepared):
    commands = [
        command
        for kind in ("initialization", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        for command in prepared[f"{kind}_commands"]
    ]
    assert len(commands) > 10
    for command in commands:
        subprocess.run(["bash", "-n", "-c", f"true && ({command})"], check=True, timeout=20)


def test_mlflow_accepts_the_options_of_its_service(config):
    from click.testing import CliRunner
    from mlflow.cli import cli

    service = config["head_setup_commands"][0]
    options = {word.split("=")[0] for word in service.split() if word.startswith("--")}
    known = CliRunner().invoke(cli, ["server", "--help"]).output
    assert options >= {"--backend-store-uri", "--artifacts-destination", "--allowed-hosts"}
    assert not [option for option in options if option not in known]
