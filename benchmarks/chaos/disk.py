"""A disk of its own for the server's data, which can fill up and become read-only without harm to anyone else's.

It is a small tmpfs in a mount namespace that a sleeping process holds, so it outlives the server. Where the system does
not allow that, the data lie in a plain folder, and a full disk is a limit on file sizes.
"""

import os
import shutil
import stat
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

SIZE_MIB = 192
# What the filler leaves: less than a page of the database.
LEFT_BYTES = 1024

# Root, also that of a namespace, may write everywhere unless this is taken from it.
_UNPRIVILEGED = ([] if shutil.which("setpriv") is None else
                 ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"])


class Disk:
    """`folder`: where the server puts its data; `seen`: where this process finds them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = self.seen = folder
        self._holder = _hold(folder)
        if self._holder is not None:
            self.seen = Path(f"/proc/{self._holder.pid}/root{folder}")

    @property
    def protects(self) -> bool:
        """Whether the server is bound by permissions: not if it is root and nothing takes that from it."""
        return bool(_UNPRIVILEGED) or (self._holder is None and os.geteuid() != 0)

    @property
    def prefix(self) -> list[str]:
        """What a command must start with to see the disk, and to be bound by its permissions."""
        if self._holder is None:
            return _UNPRIVILEGED if os.geteuid() == 0 else []
        return ["nsenter", "-t", str(self._holder.pid), "-U", "-m", "--preserve-credentials", "--", *_UNPRIVILEGED]

    def fill(self, server: int) -> None:
        """Nothing more fits, whatever the process `server` writes."""
        if self._holder is None:
            psutil.Process(server).rlimit(psutil.RLIMIT_FSIZE, (0, psutil.RLIM_INFINITY))
            return
        with (self.seen / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(2**20)):
                pass
        with (self.seen / "filler").open("ab", buffering=0) as file, suppress(OSError):
            while file.write(bytes(LEFT_BYTES)):
                pass

    def free(self, server: int) -> None:
        if self._holder is None:
            psutil.Process(server).rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
            return
        (self.seen / "filler").unlink(missing_ok=True)

    def write_protect(self, on: bool) -> None:
        """Take the right to write from its folders and files, or give it back. What is open stays as it is."""
        for path in (self.seen, *self.seen.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            path.chmod(mode & ~0o222 if on else mode | stat.S_IWUSR)

    def close(self) -> None:
        if self._holder is not None:
            _end(self._holder)


def _hold(folder: Path) -> "subprocess.Popen[bytes] | None":
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return None
    command: Sequence[str] = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
                              f'mount -t tmpfs -o size={SIZE_MIB}m tmpfs "$0" && echo held && exec cat', str(folder))
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert holder.stdout is not None
    if holder.stdout.readline() == b"held\n":
        return holder
    _end(holder)
    return None


def _end(holder: "subprocess.Popen[bytes]") -> None:
    """It ends with its input."""
    assert holder.stdin is not None and holder.stdout is not None
    holder.stdin.close()
    holder.stdout.close()
    holder.wait(30)
