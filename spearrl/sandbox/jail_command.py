"""The bubblewrap command line: which parts of the machine a jail contains, and as whom it runs."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from spearrl.errors import ConfigError

NOBODY = 65534
PROGRAM = Path(__file__).with_name("jail_program.py")
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the order of a printed set is the same in every run
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
NAME = re.compile(r"[A-Za-z0-9._-]+")
COVERED = ("/tmp", "/dev/shm")  # every run mounts its own there
WAYS_OUT = (
    "one of: (1) apt-get install bubblewrap; (2) where it is installed, allow user namespaces: "
    "sysctl kernel.unprivileged_userns_clone=1 (Ubuntu: kernel.apparmor_restrict_unprivileged_userns=0; "
    "Docker: --security-opt seccomp=unconfined --security-opt systempaths=unconfined); "
    "(3) a SandboxFusion server: sandbox.kind=fusion sandbox.url=http://HOST:8080. "
    "Last resort, for code you trust: sandbox.kind=none sandbox.unsandboxed=true --i-know-tools-are-unsandboxed"
)


def interpreter() -> Path:
    """The Python below the virtual environment, if this is one."""
    return Path(os.path.realpath(sys.executable))


def path_in_jail(path: Path) -> Path:
    """Where a jail has a path of this machine: at the same place, unless a run covers that.

    A run covers /tmp, so a virtual environment below /tmp is found below /outside.
    """
    return Path("/outside", *path.parts[1:]) if any(path.is_relative_to(folder) for folder in COVERED) else path


def package_paths(distributions: tuple[str, ...]) -> tuple[list[Path], list[str]]:
    """(files and folders of distributions and of what they require, modules to load ahead).

    Raises:
        ConfigError: one of `distributions` is not installed.
    """
    paths: dict[Path, None] = {}
    modules, todo, done = [], list(distributions), set[str]()
    while todo:
        name = todo.pop()
        if (key := re.sub(r"[-_.]+", "-", name).lower()) in done:
            continue
        done.add(key)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError as error:
            if name not in distributions:  # needed by another Python or another system
                continue
            hint = f"pip install {name}, or leave it out of packages"
            raise ConfigError(f"package {name!r} is not installed", where="sandbox.packages", hint=hint) from error
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__", "/")}
        root = Path(str(distribution.locate_file("")))
        paths |= dict.fromkeys(root / top for top in sorted(tops) if (root / top).exists())
        modules += [top for top in sorted(tops) if name in distributions and (root / top / "__init__.py").exists()]
        required = [NAME.match(line) for line in distribution.requires or () if "extra ==" not in line]
        todo += [match[0] for match in required if match]
    return list(paths), modules


def jail_command(packages: list[Path], tmp_mib: int) -> list[str]:
    """Everything in front of the interpreter's own arguments. Raises ConfigError where bubblewrap is not installed."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise ConfigError("bubblewrap (the program bwrap) is not installed", where="sandbox", hint=WAYS_OUT)
    base, bound, sites = _interpreter_paths(), [*packages, PROGRAM], _sites_to_hide()
    command = [bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    command += ["--clearenv"]
    for name, value in ENVIRONMENT.items():
        command += ["--setenv", name, value]
    command += [*_system_folders(), "--proc", "/proc", "--dev", "/dev"]
    # Runs mount a /tmp and /dev/shm of their own over these; where they cannot, and before bubblewrap 0.7, there is
    # no --size.
    sized = "--size" in subprocess.run([bwrap, "--help"], capture_output=True, text=True, timeout=60).stdout
    for folder, mib in (("/dev/shm", 8), ("/tmp", tmp_mib)):
        command += [*(["--size", str(mib << 20)] if sized else []), "--tmpfs", folder]
    command += ["--remount-ro", "/dev", *_bind(base)]
    for site in sites:
        command += ["--tmpfs", str(path_in_jail(site))]
    command += _bind(bound)
    for site in sites:
        command += ["--remount-ro", str(path_in_jail(site))]
    command += ["--remount-ro", "/", "--chdir", "/tmp", "--"]
    return command if os.geteuid() else [*_readable(bwrap, [*base, *bound]), *_as_nobody(), *command]


def _bind(paths: list[Path]) -> list[str]:
    return [word for path in paths for word in ("--ro-bind", str(path), str(path_in_jail(path)))]


def _interpreter_paths() -> list[Path]:
    """The interpreter and its library, where they are not below /usr."""
    paths = [Path("/usr")]
    for path in (Path(sys.base_prefix).resolve(), Path(sys.base_exec_prefix).resolve(), interpreter()):
        if not any(path.is_relative_to(other) for other in paths):
            paths.append(path)
    return paths[1:]


def _system_folders() -> list[str]:
    """/usr, read-only, and the folders of / that belong to it."""
    words = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = Path("/") / name
        if path.is_symlink():
            words += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            words += ["--ro-bind", str(path), str(path)]
    return words


def _sites_to_hide() -> list[Path]:
    """The interpreter's folders of installed packages: a snippet gets the packages of the options, not the user's."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    sites = {Path(sysconfig.get_path(kind, vars=base)) for kind in ("purelib", "platlib")}
    return sorted(path for path in sites if path.is_dir())


def _as_nobody() -> list[str]:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        complaint = "setpriv is not installed; as root, code is run as another user"
        raise ConfigError(complaint, where="sandbox", hint="apt-get install util-linux")
    who = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return [setpriv, *who, "--no-new-privs", "--pdeathsig", "KILL"]


def _readable(bwrap: str, paths: list[Path]) -> list[str]:
    """Bind paths that lie in folders only root may enter (/root/.pyenv) for a user who is not root.

    Nothing else of those folders can be read.
    """
    closed = {folder for path in paths if (folder := _closed_folder(path))}
    if not closed:
        return []
    # The monitor of this bwrap has no capability to kill what became another user: with its process namespace that
    # user's processes end nevertheless.
    words = [bwrap, "--dev-bind", "/", "/", "--unshare-pid", "--die-with-parent"]
    for folder in sorted(closed):
        words += ["--tmpfs", str(folder)]
    for path in paths:
        if (folder := _closed_folder(path)) is not None:
            for parent in reversed(path.relative_to(folder).parents[:-1]):  # bwrap's own would be closed again
                words += ["--dir", str(folder / parent)]
            words += ["--ro-bind", str(path), str(path)]
    return [*words, "--"]


def _closed_folder(path: Path) -> Path | None:
    """The topmost folder above a path that others may not enter."""
    return next((folder for folder in reversed(path.parents) if not folder.stat().st_mode & stat.S_IXOTH), None)
