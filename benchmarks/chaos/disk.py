"""A disk of its own for the server's data, which can fill up and become read-only without harm to anyone else's.

It is a small tmpfs in a mount namespace that a sleeping process holds, so it outlives the server. Where the system does
not allow that, the data lie in a plain folder: a full disk is then a limit on file sizes, and read-only is left out.
"""

import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

SIZE_MIB = 192
# What the filler leaves: less than a page of the database.
LEFT_BYTES = 1024


class Disk:
    """`folder`: where the server puts its data; `seen`: where this process finds them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = self.seen = folder
        self._holder = _hold(folder)
        if self._holder is not None:
            self.seen = Path(f"/proc/{self._holder.pid}/root{folder}")

    @property
    def own(self) -> bool:
        """Whether it is a disk of its own."""
        return self._holder is not None

    @property
    def prefix(self) -> list[str]:
        """What a command must start with to see the disk."""
        if self._holder is None:
            return []
        return ["nsenter", "-t", str(self._holder.pid), "-U", "-m", "--preserve-credentials", "--"]

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
        """Remount it, for all that is opened from now on and all that is open. Only for a disk of its own."""
        how = "ro" if on else "rw"
        subprocess.run([*self.prefix, "mount", "-o", f"remount,{how}", str(self.folder)], check=True, timeout=30)

    def close(self) -> None:
        if self._holder is not None:
            assert self._holder.stdin is not None
            self._holder.stdin.close()
            self._holder.wait(30)


def _hold(folder: Path) -> "subprocess.Popen[bytes] | None":
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return None
    command: Sequence[str] = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
                              f'mount -t tmpfs -o size={SIZE_MIB}m tmpfs "$0" && echo held && exec cat', str(folder))
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert holder.stdout is not None
    if holder.stdout.readline() == b"held\n":
        return holder
    holder.wait(30)
    return None
