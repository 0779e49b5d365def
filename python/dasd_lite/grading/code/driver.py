"""What the sandbox runs: set the limits, close the doors, run one program or call one function.

This file is not imported: its text is what Python executes inside, `python -c TEXT JOB REPORT`. JOB is a file with the
job, marshaled; REPORT is a pipe to the grader. It says `+` when the program is about to begin, so that a sandbox that
failed is told from a program that did, and then, for a function, the result as JSON. Expected outputs are not in here.

It imports little, because it runs once for every test, and works with every Python that may be found (3.9 and later).
"""

from __future__ import annotations

import builtins
import marshal
import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def main() -> None:
    """Do the job."""
    report = int(sys.argv[2])
    with open(int(sys.argv[1]), "rb") as file:
        job = marshal.load(file)
    sys.argv[1:] = []
    sys.path.remove("")
    sys.path += job["packages"]
    for name, value in job["limits"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    if job["landlock"] is not None:
        restrict(**job["landlock"])
    os.write(report, b"+")
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # what the module `site` would do
    sys.setrecursionlimit(50_000)
    if job["function"] is None:
        os.close(report)
        run(job["code"], "__main__", job["modules"])
    else:
        os.dup2(2, 1)  # what a function prints is not its result
        names = run(job["code"], "solution", job["modules"])
        answer(names, job["function"], job["arguments"], report)


def run(code: str, name: str, modules: list[str]) -> dict[str, Any]:
    """Execute `code` as the module `name`, with the names that programs are used to; return its names."""
    module = type(sys)(name)
    sys.modules[name] = module
    names = module.__dict__
    for each in modules:
        exec(f"from {each} import *", names)
    for each in modules:
        exec(f"import {each}", names)
    exec(compile(code, "program.py", "exec", dont_inherit=True), names)
    return names


def answer(names: dict[str, Any], function: str, arguments: list[str], report: int) -> None:
    """Call the function, or the method of the class `Solution`, and report its result."""
    import json

    owner: Any = names.get("Solution")
    called = getattr(owner(), function) if hasattr(owner, function) else names[function]
    result = json.dumps(called(*map(json.loads, arguments)), default=plain)
    with open(report, "wb") as file:
        file.write(result.encode())


def plain(value: Any) -> Any:
    """Return a number or array of numpy, a Decimal or a Fraction as what JSON has."""
    from numbers import Number

    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Number):
        return float(value)  # type: ignore[arg-type]  # a complex number raises
    raise TypeError(f"the result has a {type(value).__name__}, which is not JSON")


def restrict(parent: int, ruleset: bytes, rules: list[tuple[str, int]], seccomp: bytes) -> None:
    """Leave only the files of `rules` and the system calls of the filter, and die with the grader.

    Args:
        parent: Process id of the grader.
        ruleset: struct landlock_ruleset_attr.
        rules: Paths, and what may be done to them and all beneath.
        seccomp: The filter, struct sock_filter[].
    """
    import ctypes
    import struct

    kernel = ctypes.CDLL(None, use_errno=True)

    def call(function: Any, *arguments: Any) -> int:
        done = int(function(*(ctypes.c_ulong(each) if isinstance(each, int) else each for each in arguments)))
        if done < 0:
            raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())}: {arguments[:2]}")
        return done

    call(kernel.prctl, 1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() != parent:
        sys.exit("the grader has ended")
    created = call(kernel.syscall, 444, ruleset, len(ruleset), 0)  # landlock_create_ruleset
    for path, access in rules:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        beneath = struct.pack("=Qi", access, opened)
        call(kernel.syscall, 445, created, 1, beneath, 0)  # landlock_add_rule, LANDLOCK_RULE_PATH_BENEATH
        os.close(opened)
    call(kernel.prctl, 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call(kernel.syscall, 446, created, 0)  # landlock_restrict_self
    os.close(created)
    array = ctypes.create_string_buffer(seccomp, len(seccomp))
    program = struct.pack("@HP", len(seccomp) // 8, ctypes.addressof(array))  # struct sock_fprog
    call(kernel.prctl, 22, 2, program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


if __name__ == "__main__":
    main()
