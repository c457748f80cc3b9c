"""The shared fixtures do what the other tests rely on."""

import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pipeline.shards.storage import Folder


def test_the_session_cluster_has_the_resources_of_cluster_yaml(ray_cluster, s3):
    import ray

    @ray.remote(num_cpus=1, resources={"data_worker": 1})
    def write(uri: str) -> str:
        Folder(uri).write_atomic("made/by-a-worker", b"x")
        return os.environ["AWS_ENDPOINT_URL"]

    assert ray.get(write.remote(s3)) == os.environ["AWS_ENDPOINT_URL"]
    assert Folder(s3).read_bytes("made/by-a-worker") == b"x"
    assert {"data_worker", "train_worker"} <= set(ray.cluster_resources())


def test_temporary_files_of_all_processes_lie_in_pytests_folder(ray_cluster, tmp_path_factory):
    """So that what a killed worker leaves does not stay in the folder of the system."""
    import ray

    folder = ray.get(ray.remote(tempfile.gettempdir).remote())
    assert folder == tempfile.gettempdir() and tmp_path_factory.getbasetemp() in Path(folder).parents


def test_no_token_is_written_into_the_home_folder(ray_cluster):
    token = Path.home() / ".ray" / "auth_token"
    assert not token.exists() or token.stat().st_mtime < Path(f"/proc/{os.getpid()}").stat().st_mtime


def test_buckets_are_fresh(s3):
    folder = Folder(s3)
    assert folder.names() == []
    folder.write_atomic("a.bin", b"12345")
    assert folder.names() == ["a.bin"] and folder.read_bytes("a.bin") == b"12345"


def test_the_web_server_answers_as_told(serve):
    server = serve({"a.jpg": b"image", "often": lambda before: b"%d" % before})
    assert urllib.request.urlopen(server.url + "/a.jpg").read() == b"image"
    assert [urllib.request.urlopen(server.url + "/often").read() for _ in range(2)] == [b"0", b"1"]
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        urllib.request.urlopen(server.url + "/missing")
    caught.value.close()
    assert server.requests == ["/a.jpg", "/often", "/often", "/missing"]


def test_groups_reach_the_scheduler(tmp_path: Path) -> None:
    """pytest-xdist 3.8 puts a group's name behind the name of a test, which pytest 9.2 ignores."""
    (tmp_path / "test_x.py").write_text(
        "import pytest\n"
        "@pytest.mark.xdist_group('one')\n"
        "@pytest.mark.parametrize('number', range(6))\n"
        "def test_x(number, worker_id):\n"
        "    print('AT', worker_id)\n"
    )
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-rP", "-p", "no:cacheprovider"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stdout
    assert len({line for line in found.stdout.splitlines() if line.startswith("AT ")}) == 1
