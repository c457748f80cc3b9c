"""Every check and every figure of a GPU in one command of at most eight minutes, most important first.

    python tests/gpu/run.py                          # all parts, on the first GPU
    python tests/gpu/run.py --parts correctness train_b16
    python tests/gpu/run.py --dry                    # the same parts on a CPU, with tiny sizes
    python tests/gpu/run.py --list

It needs this checkout, Python 3.11 or newer, torch 2.11 or newer with its torchvision, and the packages that
``tests/gpu/wheels.py`` lists; neither Ray, nor a network, nor data. Every part is a process of its own with its own
time limit. Results are lines of JSON, written at once to the standard output and to ``--output``, so that what is
finished counts if the command is cut off:

- ``{"part": ..., "check": ..., "passed": ...}``: a check of a method;
- ``{"part": ..., "name": ..., "ours": ..., "peer": ..., "ratio": ...}``: a figure, with ``asked`` and ``met`` where a
  limit was set for it;
- ``{"part": ..., "status": "passed" | "failed" | "out of time" | "skipped", "seconds": ...}``: the end of a part;
- ``{"part": "all", ...}``: the summary.

The exit code is 1 if a part failed or ran out of time, and 2 if no GPU can be used or a part is not known. A figure
below what is asked fails nothing.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent.parent
if "tests" not in sys.modules:  # before a package of that name which some wheel has installed
    sys.modules["tests"] = ModuleType("tests")
    sys.modules["tests"].__path__ = [str(ROOT / "tests")]
PATHS = [str(ROOT), str(ROOT / "tests" / "benchmarks"), str(ROOT / "tests" / "gpu")]
sys.path += [path for path in PATHS if path not in sys.path]

from tests.gpu.child import run_part  # noqa: E402
from tests.gpu.plan import CHECK, DEVICE, FIGURES, Part, Setting, all_parts, chosen  # noqa: E402

SECONDS = 480.0
LEAST = 5.0  # seconds left under which no part is started
SLOWER = 5  # times the limits of a part in a dry run: busy cores are no fault
AT_ONCE = 4  # checks, which measure no time
STATUSES = ("passed", "failed", "out of time", "skipped")
UNUSABLE = 2


class Lines:
    """JSON lines on the standard output and in a file, each flushed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.files: list[TextIO] = [sys.stdout, open(path, "w", encoding="utf-8")]

    def write(self, line: dict[str, Any]) -> None:
        """One line."""
        for file in self.files:
            print(json.dumps(line), file=file, flush=True)

    def close(self) -> None:
        """Close the file."""
        self.files[1].close()


@dataclass
class Running:
    """A part that has started; ``last`` is the last line that it sent."""

    part: Part
    process: Any
    connection: Connection
    began: float
    limit: float
    last: dict[str, Any] = field(default_factory=dict)
    used: dict[str, Any] = field(default_factory=dict)


@dataclass
class Runner:
    """Starts parts, passes on their lines, ends those that exceed their time."""

    setting: Setting
    lines: Lines
    deadline: float
    start_method: str = "forkserver"
    results: dict[str, str] = field(default_factory=dict)

    def run(self, parts: Sequence[Part], at_once: int = 1) -> dict[str, Any]:
        """All parts, up to ``at_once`` of those that measure no time together; returns the last one's last line."""
        waiting, running, last = list(parts), [], {}
        try:
            while waiting or running:
                while waiting and self._fits(waiting[0], running, at_once):
                    running += self._start(waiting.pop(0))
                self._listen(running)
                ended = [one for one in running if self._has_ended(one)]
                running = [one for one in running if one not in ended]
                last = ended[-1].last if ended else last
        finally:
            for one in running:
                self._kill(one)
        return last

    def skip(self, part: Part, reason: str) -> None:
        """Report a part that is not started."""
        self._report(part, "skipped", 0.0, {"reason": reason})

    def _fits(self, part: Part, running: Sequence[Running], at_once: int) -> bool:
        """Whether ``part`` may start beside those that run; in a dry run no part measures anything."""
        alone = not self.setting.dry and any(one.measures for one in (part, *(other.part for other in running)))
        return len(running) < (1 if alone else at_once)

    def _start(self, part: Part) -> list[Running]:
        left = self.deadline - time.monotonic()
        if left < LEAST:
            self.skip(part, "the time of the whole run is over")
            return []
        context: Any = multiprocessing.get_context(self.start_method)
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=run_part, args=(part.name, self.setting, sending))
        process.start()
        sending.close()
        limit = part.seconds * (SLOWER if self.setting.dry else 1)
        return [Running(part, process, receiving, time.monotonic(), min(limit, left))]

    def _listen(self, running: Sequence[Running]) -> None:
        """Pass on what arrives, until something has arrived, a part has ended or a limit is reached."""
        if not running:
            return
        left = min(one.began + one.limit for one in running) - time.monotonic()
        open_ones = [one.connection for one in running if not one.connection.closed]
        ready = wait([*open_ones, *(one.process.sentinel for one in running)], max(left, 0.0))
        for one in running:
            if one.connection in ready:
                self._receive(one)

    def _receive(self, one: Running) -> None:
        """One line of a part, or its end."""
        try:
            line = json.loads(one.connection.recv_bytes())
        except (EOFError, OSError):
            one.connection.close()
            return
        if "cpu_seconds" in line:
            one.used = line
            return
        one.last = one.last if "packages" in line else line
        self.lines.write({"part": one.part.name, **line})

    def _has_ended(self, one: Running) -> bool:
        """Whether a part is over: by itself, or ended here for its time. Reports its end."""
        seconds = time.monotonic() - one.began
        late = one.process.is_alive()
        if late and seconds < one.limit:
            return False
        if late:
            self._kill(one)
        while not one.connection.closed and one.connection.poll():
            self._receive(one)
        one.process.join()
        code = one.process.exitcode
        status = "out of time" if late else "failed" if code else "passed"
        reason = {"limit": round(one.limit, 1)} if late else {"reason": f"signal {-code}"} if code < 0 else {}
        self._report(one.part, status, seconds, one.used | reason)
        return True

    def _report(self, part: Part, status: str, seconds: float, more: dict[str, Any]) -> None:
        self.results[part.name] = status
        self.lines.write({"part": part.name, "status": status, "seconds": round(seconds, 1), **more})

    def _kill(self, one: Running) -> None:
        """End a part with what it has started: it leads a session of its own, unless it has only just begun."""
        for end in (os.killpg, os.kill):
            try:
                end(one.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        one.process.join()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=[], help=f"parts to run; {CHECK} stands for all methods")
    parser.add_argument("--dry", action="store_true", help="run on a CPU with tiny sizes, to try the script")
    parser.add_argument("--list", action="store_true", help="print the parts and their limits, and run none")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of the whole run (default 480)")
    parser.add_argument("--output", type=Path, help="file of the results (default: gpu.jsonl in $OUT, or in runs/gpu)")
    parser.add_argument("--packages", action="store_true", help="also report the packages that each part imports")
    options = parser.parse_args(arguments)
    if options.seconds <= 0:
        parser.error(f"--seconds: got {options.seconds}, expected more than 0")
    options.output = options.output or Path(os.environ.get("OUT") or ROOT / "runs" / "gpu") / "gpu.jsonl"
    return options


def prepare_processes() -> None:
    """Set the environment of the parts, and the module that their parent imports."""
    os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # torch.cuda.is_available() must not start CUDA before a fork
    os.environ["HF_HUB_OFFLINE"] = "1"
    multiprocessing.get_context("forkserver").set_forkserver_preload(["preload"])


def find_device(runner: Runner) -> dict[str, Any]:
    """The facts of the device; empty if it cannot be used."""
    found = runner.run([DEVICE])
    if runner.results[DEVICE.name] != "passed" and found.get("forked"):
        runner.start_method = "spawn"  # something that was imported has started CUDA: import it anew in every part
        found = runner.run([DEVICE])
    return found if runner.results[DEVICE.name] == "passed" else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; the exit code."""
    began = time.monotonic()
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    prepare_processes()
    setting = Setting(options.dry or options.list, str(options.output.parent.resolve()), options.packages)
    with closing(Lines(Path(os.devnull) if options.list else options.output)) as lines:
        runner = Runner(setting, lines, began + options.seconds)
        found = find_device(runner)
        if not found:
            return UNUSABLE
        every = all_parts(found["methods"])
        try:
            parts = chosen([DEVICE, *every], options.parts)
        except ValueError as error:
            print(error, file=sys.stderr)
            return UNUSABLE
        if options.list:
            print("\n".join(f"{part.name}: at most {part.seconds:.0f} s" for part in every))
            return 0
        return run_all(runner, [part for part in parts if part != DEVICE], found["bf16"], began)


def run_all(runner: Runner, parts: Sequence[Part], bf16: bool, began: float) -> int:
    """The checks, then the figures, for which the GPU needs bfloat16, then the summary; the exit code."""
    figures = [part for part in parts if part in FIGURES]
    try:
        runner.run([part for part in parts if part not in figures], AT_ONCE)
        runner.run(figures if bf16 else [], AT_ONCE)
        for part in [] if bf16 else figures:
            runner.skip(part, "figures are in bfloat16, which this GPU only emulates")
    finally:
        by_status = {status: [name for name, got in runner.results.items() if got == status] for status in STATUSES}
        seconds = round(time.monotonic() - began, 1)
        runner.lines.write({"part": "all", "seconds": seconds, "dry": runner.setting.dry, **by_status})
    return 1 if by_status["failed"] or by_status["out of time"] else 0


if __name__ == "__main__":
    sys.exit(main())
