"""The GPU command on a CPU: its lines, its clock, its parts' failures, and the wheels it asks for."""

import json
import subprocess
import sys
import time
import warnings
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from pipeline.models.method import method_names
from tests.gpu import child, correctness, device, figures, wheels
from tests.gpu.plan import DEVICE, FIGURES, Part, Setting, all_parts, chosen
from tests.gpu.run import Lines, Runner, _reason, find_device, run_all

ROOT = Path(__file__).resolve().parent.parent.parent
CPU = torch.device("cpu")
DRY = Setting(dry=True, folder="")


def command(*arguments: str, output: Path) -> tuple[int, list[dict[str, Any]], str]:
    """The exit code, the lines, and the standard error of the command as a user types it."""
    typed = [sys.executable, str(ROOT / "tests" / "gpu" / "run.py"), *arguments, "--output", str(output)]
    done = subprocess.run(typed, capture_output=True, text=True, timeout=850)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        assert [json.loads(line) for line in output.read_text().splitlines()] == lines
    return done.returncode, lines, done.stderr


def ends(lines: list[dict[str, Any]]) -> dict[str, str]:
    return {line["part"]: line["status"] for line in lines if "status" in line}


def test_two_parts_of_a_dry_run(tmp_path: Path) -> None:
    """Without Ray, MLflow and a network: importing the first two fails."""
    for name in ("ray", "mlflow"):
        (tmp_path / "without" / name).mkdir(parents=True)
        (tmp_path / "without" / name / "__init__.py").write_text("raise ImportError('not installed')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "without"))
        parts = ("correctness:clip", "pixel_text")
        code, lines, errors = command("--dry", "--packages", "--parts", *parts, output=tmp_path / "a.jsonl")
    assert code == 0, errors
    assert ends(lines) == {"device": "passed", "correctness:clip": "passed", "pixel_text": "passed"}
    assert lines[0]["methods"] == method_names() and lines[0]["device"] == "cpu"
    checks = {line["check"]: line for line in lines if "check" in line}
    assert list(checks) == list(correctness.NAMES) and all(line["passed"] for line in checks.values())
    assert checks["fp32"]["losses"] == checks["recomputed"]["losses"] != checks["bf16"]["losses"]
    assert {line["name"] for line in lines if "name" in line} == {
        "pixel_text_loss/strips/plain/seconds",
        "pixel_text_loss/strips/plain/memory",
    }
    needed = {name for line in lines for name in line.get("packages", ())}
    assert {"torch", "open-clip-torch", "ftfy", "wcwidth", "numpy", "pyarrow"} <= needed
    assert not {"clipmill", "wandb", "ruff", "ray", "mlflow"} & needed and needed - {"torch"} <= set(wheels.locked())
    assert lines[-1]["part"] == "all" and lines[-1]["dry"] and not lines[-1]["failed"]


@pytest.mark.slow
@pytest.mark.alone
def test_all_parts_of_a_dry_run(tmp_path: Path) -> None:
    code, lines, errors = command("--dry", "--seconds", "800", output=tmp_path / "gpu.jsonl")
    assert code == 0, errors
    assert ends(lines) == {part.name: "passed" for part in (DEVICE, *all_parts(method_names()))}
    for part in FIGURES:
        assert any(line["part"] == part.name and "name" in line for line in lines), part.name
    assert (tmp_path / "trace_b16.json.gz").exists()


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    code, lines, _ = command("--seconds", "800", output=tmp_path / "gpu.jsonl")
    assert code == 2 and {line["part"] for line in lines} == {"device"} and lines[-1]["status"] == "failed"
    assert lines[-2]["error"].endswith("; --dry tries the script on a CPU") and not lines[-2]["forked"]
    assert any(words in lines[-2]["error"] for words in ("driver", "no GPU is visible", "built without CUDA"))


@pytest.mark.parametrize("problem", ["no GPU is visible", "CUDA does not start: Cannot re-initialize CUDA in forked"])
def test_without_a_gpu_a_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(device, "cuda_problem", lambda: problem)
    with pytest.raises(SystemExit):
        device.describe(Setting(dry=False, folder=""), lines.append)
    error = f"{problem}; --dry tries the script on a CPU"
    assert lines == [{"error": error, "forked": "forked" in problem}]


@pytest.mark.parametrize("works", ["forkserver", "spawn", "none"])
def test_parts_import_anew_where_cuda_does_not_survive_a_fork(monkeypatch: pytest.MonkeyPatch, works: str) -> None:
    runner = Runner(DRY, None, 0.0)  # type: ignore[arg-type]

    def run(self: Runner, parts: list[Part]) -> dict[str, Any]:
        passed = self.start_method == works
        self.results[DEVICE.name] = "passed" if passed else "failed"
        return {"methods": []} if passed else {"error": "", "forked": self.start_method == "forkserver"}

    monkeypatch.setattr(Runner, "run", run)
    assert bool(find_device(runner)) == (works != "none")
    assert runner.start_method == ("forkserver" if works == "forkserver" else "spawn")


def test_figures_need_bfloat16(tmp_path: Path) -> None:
    with closing(Lines(tmp_path / "gpu.jsonl")) as lines:
        runner = Runner(DRY, lines, time.monotonic() + 60)
        assert run_all(runner, FIGURES[:2], False, time.monotonic()) == 0
    assert runner.results == {"train_b16": "skipped", "train_b32": "skipped"}
    assert "only emulates" in (tmp_path / "gpu.jsonl").read_text()


def test_names_of_parts() -> None:
    every = all_parts(["a", "b"])
    assert chosen(every, []) == every and [part.name for part in every[:3]] == [
        "correctness:a",
        "correctness:b",
        "train_b16",
    ]
    assert [part.name for part in chosen(every, ["correctness"])] == ["correctness:a", "correctness:b"]
    assert [part.name for part in chosen(every, ["vild", "correctness:b"])] == ["correctness:b", "vild"]
    with pytest.raises(ValueError, match=r"--parts: got vildd, expected device, correctness, or some of .*, vild, "):
        chosen(every, ["vildd"])
    assert all(callable(getattr(figures, part.name)) for part in FIGURES)


def run_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, works: dict[str, Any], seconds: float = 60.0, limit: float = 20.0
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Parts that do what ``works`` says, in processes of their own."""
    monkeypatch.setattr(child, "_run", lambda name, setting, emit: works[name](emit))
    monkeypatch.setattr("tests.gpu.run.SLOWER", 1)
    with closing(Lines(tmp_path / "gpu.jsonl")) as lines:
        runner = Runner(DRY, lines, time.monotonic() + seconds, start_method="fork")
        runner.run([Part(name, limit if name != "late" else 1.0) for name in works])
    return [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()], runner.results


def test_what_a_part_has_written_counts_whatever_happens_to_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def late(emit: child.Emit) -> None:
        emit({"name": "first"})
        helper = subprocess.Popen(["sleep", "60"])  # of the part's session, so it ends with it
        emit({"helper": helper.pid})
        time.sleep(60)

    def fail(emit: child.Emit) -> None:
        emit({"name": "second"})
        raise ValueError("no such\nthing")

    def die(emit: child.Emit) -> None:
        emit({"name": "third"})
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    def full(emit: child.Emit) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def well(emit: child.Emit) -> None:
        print('{"name": "printed"}')

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 16 * 2**30))
    began = time.monotonic()
    works = {"late": late, "fail": fail, "die": die, "full": full, "well": well}
    lines, results = run_parts(monkeypatch, tmp_path, works)
    assert time.monotonic() - began < 30
    assert results == {"late": "out of time", "fail": "failed", "die": "failed", "full": "failed", "well": "passed"}
    assert [line["name"] for line in lines if "name" in line] == ["first", "second", "third", "printed"]
    errors = {line["part"]: line["error"] for line in lines if "error" in line}
    assert errors["fail"].startswith("ValueError: no such (test_run.py:")
    assert errors["full"].startswith("the GPU's 16 GiB are too small for this part's sizes")
    assert next(line["reason"] for line in lines if line["part"] == "die" and "status" in line) == "signal 9"
    helper = next(line["helper"] for line in lines if "helper" in line)
    state = Path(f"/proc/{helper}/stat")
    assert not state.exists() or state.read_text().split(")")[1].split()[0] == "Z"


def test_an_end_that_a_part_cannot_explain_has_a_reason() -> None:
    assert _reason(-9, None) == {"reason": "signal 9"} and _reason(1, None) == _reason(0, None) == {}
    assert _reason(-9, 2.04) == {"limit": 2.0} and "run this part again" in _reason(255, None)["reason"]


def test_parts_after_the_deadline_are_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    works = {name: lambda emit: time.sleep(30) for name in ("one", "two")}
    lines, results = run_parts(monkeypatch, tmp_path, works, seconds=6.0)
    assert results == {"one": "out of time", "two": "skipped"}
    assert lines[-1]["reason"] == "the time of the whole run is over"


def test_parts_that_measure_run_alone() -> None:
    checks, figure = [Part(name, 1.0, measures=False) for name in "ab"], Part("c", 1.0)
    runner = Runner(Setting(dry=False, folder=""), None, 0.0)  # type: ignore[arg-type]
    running: Any = [SimpleNamespace(part=checks[0])]
    assert runner._fits(checks[1], running, 4) and not runner._fits(checks[1], running, 1)
    assert not runner._fits(figure, running, 4) and runner._fits(figure, [], 4)
    assert not runner._fits(checks[0], [SimpleNamespace(part=figure)], 4)  # type: ignore[list-item]


def test_losses_are_compared_with_stated_tolerances() -> None:
    assert correctness.compared([2.0, 2.0], [2.001, 2.03], 1e-3, 2e-2)["passed"]
    assert not correctness.compared([2.0, 2.0], [2.01, 2.0], 1e-3, 2e-2)["passed"]  # the first step
    assert not correctness.compared([2.0, 2.0], [2.0, 2.1], 1e-3, 2e-2)["passed"]  # a later one
    assert not correctness.compared([float("nan"), 2.0], [2.0, 2.0], 1e-3, 2e-2)["passed"]
    assert not correctness.compared([2.0, float("nan")], [2.0, 2.0], 1e-3, 2e-2)["passed"]


def test_a_check_that_fails_or_raises_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(self: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(correctness.Checks, "bf16", raises)
    monkeypatch.setattr(correctness.Checks, "compiled", lambda self: {"passed": True})
    monkeypatch.setattr(correctness, "DRIFT", -1.0)
    lines: list[dict[str, Any]] = []
    with pytest.raises(SystemExit):
        correctness.check_method("classifier", DRY, lines.append)
    assert {line["check"]: line["passed"] for line in lines} == {
        "fp32": False,
        "bf16": False,
        "checkpoint": True,
        "recomputed": False,
        "compiled": True,
    }
    assert next(line["error"] for line in lines if "error" in line).startswith("RuntimeError: no kernel")


def test_operations_that_wait_are_counted_by_place() -> None:
    """torch gives a warning for each; here it is given by hand, below a line of the package."""
    waits: Counter[str] = Counter()
    with correctness.watched(CPU, waits):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert waits == {"the step itself": 1}
    code = compile(
        "import warnings\nwarnings.warn('x: called a synchronizing CUDA operation')",
        ROOT / "pipeline/models/clip.py",
        "exec",
    )
    with correctness.watched(CPU, waits):
        exec(code)
    assert waits["pipeline/models/clip.py:2"] == 1
    with pytest.warns(UserWarning, match="afterwards"):
        warnings.warn("afterwards", stacklevel=1)


def fake_gpu(monkeypatch: pytest.MonkeyPatch, free: float, bf16: bool, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 2**30), 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_what_limits_a_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[dict[str, Any]] = []
    fake_gpu(monkeypatch, 40, False, (7, 5))
    facts = device._gpu(torch.device("cuda", 0), lines.append)
    assert [line["warning"].split(":")[0] for line in lines] == [
        "other processes hold 40 of 80 GiB",
        "Tesla T4 only emulates bfloat16",
    ]
    assert not facts["bf16"] and "fp8 needs a GPU such as H100" in facts["fp8"]
    fake_gpu(monkeypatch, 79, True, (9, 0))
    lines.clear()
    assert device._gpu(torch.device("cuda", 0), lines.append)["fp8"] is True and not lines


def test_a_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    lines: list[dict[str, Any]] = []
    with pytest.raises(SystemExit):
        device.describe(DRY, lines.append)
    assert lines == [{"error": "torch 2.10.1+cu128 is too old: install 2.11 or newer"}]


def test_a_figure_is_held_against_what_is_asked() -> None:
    assert figures.asked({"ratio": 1.5}, "ratio", 1.5)["met"] and not figures.asked({"ratio": 1.4}, "ratio", 1.5)["met"]
    assert figures.asked({"ratio": None}, "ratio", 1.5)["met"] is None
    results = {"ours": {"seconds": 2.0, "memory": 10.0}, "peer": {}}
    assert [line["ratio"] for line in figures.compare("x", results, "ours", "peer", DRY)] == [None, None]
    results["peer"] = {"seconds": 3.0, "memory": 5.0}
    assert [line["ratio"] for line in figures.compare("x", results, "ours", "peer", DRY)] == [1.5, 0.5]


def test_sides_take_turns_and_one_may_run_out_of_memory() -> None:
    calls = []

    def measure(name: str) -> dict[str, float]:
        calls.append(name)
        if name == "large":
            raise torch.OutOfMemoryError
        return {"seconds": float(len(calls))}

    assert figures.in_turns(["small", "large", "other"], 3, measure) == {
        "small": {"seconds": 4.0},
        "large": {},
        "other": {"seconds": 5.0},
    }
    assert calls == ["small", "large", "other", "small", "other", "small", "other"]


def test_packages_of_another_machine() -> None:
    there = wheels.packages_there("Torch==2.11.0+cu130\nopen_clip_torch\nnumpy==1.26\nlocal @ file:///x\n\n")
    assert there == {"torch": "2.11.0+cu130", "open-clip-torch": "", "numpy": "1.26", "local": ""}
    bounds = {"numpy": Requirement("numpy>=2"), "torch": Requirement("torch>=2.9")}
    needed = ["ftfy", "numpy", "open-clip-torch", "torch"]
    assert wheels.missing(needed, there, bounds) == ["ftfy", "numpy"]
    with pytest.raises(SystemExit, match="torch must be installed there first"):
        wheels.missing(needed, {"numpy": ""}, bounds)
    with pytest.raises(SystemExit, match="--there: got 'pip 24 is out', expected lines NAME==VERSION"):
        wheels.packages_there("pip 24 is out")


def test_imports_versions_and_bounds_are_read() -> None:
    found = wheels.top_level_imports("import a.b\ndef f():\n    from c.d import e\nfrom . import g\n")
    assert found == {"a", "c"}
    assert {"ftfy", "wcwidth"} <= wheels.with_requirements(["ftfy"]) and not wheels.with_requirements(["no-such-one"])
    assert {"torch", "torchao", "simplejpeg"} <= set(wheels.bounds()) and wheels.locked()["wcwidth"]


def test_wheels_beyond_the_limit_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in (("a", 3_000_000), ("b", 1_000_000)):
        (tmp_path / f"{name}.whl").write_bytes(b"\0" * size)
    wheels.check_size(tmp_path, 4.0)
    assert capsys.readouterr().out == "2 wheels, 4.0 MB\n"
    with pytest.raises(SystemExit, match=r"more than 3 MB: .* such as a.whl \(3.0 MB\), b.whl"):
        wheels.check_size(tmp_path, 3.0)


def test_listing_downloads_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wheels, "needed_by_a_dry_run", lambda: ["ftfy", "torch", "numpy"])
    monkeypatch.setattr(wheels, "download", lambda names, folder: pytest.fail("nothing is asked for"))
    (tmp_path / "there.txt").write_text("torch==2.11.0\nnumpy==2.5.2\n")
    wheels.main(["--there", str(tmp_path / "there.txt")])
    assert capsys.readouterr().out == f"ftfy=={wheels.locked()['ftfy']}\n"
    monkeypatch.setattr(wheels, "download", lambda names, folder: (folder / "ftfy.whl").write_bytes(b"\0" * 1000))
    wheels.main(["--there", str(tmp_path / "there.txt"), "--into", str(tmp_path / "wheels")])
    assert "1 wheels, 0.0 MB" in capsys.readouterr().out
