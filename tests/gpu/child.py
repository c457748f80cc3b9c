"""One part in a process of its own. Imports nothing that takes time before it runs."""

import contextlib
import io
import json
import multiprocessing
import os
import resource
import sys
import traceback
from collections.abc import Callable
from typing import Any

from tests.gpu.plan import CHECK, DEVICE, Setting

Emit = Callable[[dict[str, Any]], None]


class JsonLines(io.TextIOBase):
    """A standard output whose lines of JSON objects are passed on; other lines go to the standard error."""

    def __init__(self, emit: Emit) -> None:
        self.emit, self.rest = emit, ""

    def write(self, text: str) -> int:
        """Pass on the lines that are complete."""
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if isinstance(found, dict):
                self.emit(found)
            else:
                print(line, file=sys.stderr)
        return len(text)


def run_part(name: str, setting: Setting, connection: Any) -> None:
    """Run a part and send its lines as JSON; exits with 1 after one that says why it failed."""

    def send(line: dict[str, Any]) -> None:
        connection.send_bytes(json.dumps(line, default=str).encode())

    os.setsid()  # so that a part that exceeds its time ends with all that it has started
    multiprocessing.set_start_method("fork", force=True)  # for loaders: this process's own method starts slowly
    try:
        with contextlib.redirect_stdout(JsonLines(send)):
            _run(name, setting, send)
    except SystemExit:  # the part has said why
        connection.close()
        raise
    except BaseException as error:
        traceback.print_exc()
        send({"error": explained(error)})
        connection.close()
        sys.exit(1)
    if setting.packages:
        from tests.gpu.wheels import needed_here

        send({"packages": needed_here()})
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    send({"cpu_seconds": round(sum(one.ru_utime + one.ru_stime for one in used), 1)})
    connection.close()


def _run(name: str, setting: Setting, emit: Emit) -> None:
    if name == DEVICE.name:
        from tests.gpu import device

        device.describe(setting, emit)
        return
    import torch

    torch.manual_seed(0)
    kind, _, method = name.partition(":")
    if kind == CHECK:
        from tests.gpu import correctness

        correctness.check_method(method, setting, emit)
        return
    from tests.gpu import figures

    getattr(figures, name)(setting, emit)


def explained(error: BaseException) -> str:
    """The error in one sentence, with its place."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        total = torch.cuda.mem_get_info()[1] / 2**30
        return f"the GPU's {total:.0f} GiB are too small for this part's sizes; the other parts are not affected"
    place = traceback.extract_tb(error.__traceback__)[-1]
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else ''} ({os.path.basename(place.filename)}:{place.lineno})"
