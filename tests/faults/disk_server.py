"""A process with its imports done that forks a command for every line of JSON on its stdin.

It is started with the shim preloaded (`disk.py`); a command's fault is armed after the fork. Its
exit code is the answer, a line each.
"""

import ctypes
import importlib
import json
import os
import runpy
import sys
import traceback
from typing import Any

import torch

IMPORTS = ("moe_emergence.train.work", "moe_emergence.analyze.work", "moe_emergence.suite.work",
           "moe_emergence.experiments.worker", "moe_emergence.verify.work", "datasets",
           "tensorboard.summary.writer.event_file_writer", "small_writers")  # fmt: skip


def main() -> None:
    shim = ctypes.CDLL(sys.argv[1])
    for name in IMPORTS:
        importlib.import_module(name)
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(command(shim, json.loads(line)))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def command(shim: ctypes.CDLL, task: dict[str, Any]) -> int:
    """In the child: its output to files, then the fault, then the module as the main program."""
    os.chdir(task["where"])
    for number, name in ((0, os.devnull), (1, task["stdout"]), (2, task["stderr"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC * (number > 0)), number)
    module, *flags = task["argv"]
    sys.argv = [module, *flags]
    sys.modules.pop(module, None)
    fault = task["fault"]
    if task["bytes"] and not mount_small(fault["below"], task["bytes"]):
        return 77
    shim.disk_arm(
        fault["below"].encode(), fault["kinds"], ctypes.c_long(fault["n"]), fault["error"],
        fault["how"], fault["trace"].encode(),
    )  # fmt: skip
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
        return code if isinstance(code, int) else int(code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def mount_small(folder: str, size: int) -> bool:
    """Mount a file system of `size` bytes for this process alone; False where nobody may."""
    libc = ctypes.CDLL(None)
    user, group = os.getuid(), os.getgid()
    new_mounts, new_users = 0x20000, 0x10000000
    if libc.unshare(new_mounts | new_users):
        return False
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {user} 1"),
        ("gid_map", f"0 {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return not libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={size}".encode())


if __name__ == "__main__":
    main()
