"""A PostgreSQL of the tests' own: a cluster in a temporary folder, reached by a Unix socket and by nobody else."""

import hashlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vectors.library.database import Database

START_S = 120
USER = "trimtab"
# PostgreSQL refuses root. Of these users the first that the machine has runs it for a suite that root runs.
OTHERS = ("postgres", "nobody")
# A crash of the machine may lose what tests stored; a restart of the program does not.
OPTIONS = {"listen_addresses": "", "fsync": "off", "synchronous_commit": "off", "full_page_writes": "off",
           "shared_buffers": "32MB", "max_connections": "200", "log_min_messages": "fatal"}


def programs() -> Path | None:
    """The folder of PostgreSQL's programs, the newest one that is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    at = shutil.which("postgres")
    return None if at is None else Path(at).parent


needs_postgres = pytest.mark.skipif(programs() is None, reason="PostgreSQL is not installed")


class Cluster:
    """Runs from `start` to `stop`, and may be started again. A database is made when its URL is first asked for."""

    def __init__(self, folder: Path) -> None:
        found = programs()
        assert found is not None
        self._bin, self.folder = found, folder
        self._user = next(user for user in OTHERS if _exists(user)) if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        self._made: set[str] = set()
        # Also the name of the Unix socket holds it.
        self.port = 5432
        if self._user is not None:
            shutil.chown(folder, self._user)
        self._run("initdb", "--pgdata", str(folder / "data"), "--username", USER, "--auth", "trust", "--no-sync",
                  "--encoding", "UTF8", "--locale", "C")

    def start(self, **more: str) -> None:
        """more: options of PostgreSQL."""
        options = [word for name, value in (OPTIONS | {"port": str(self.port)} | more).items()
                   for word in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._bin / "postgres"), "-D", str(self.folder / "data"), "-k", str(self.folder), *options],
                stdout=log, stderr=log, user=self._user, extra_groups=[] if self._user else None, cwd=self.folder)
        deadline = time.monotonic() + START_S
        while subprocess.run([self._bin / "pg_isready", "-q", "-h", self.folder, "-p", str(self.port), "-U",
                              USER]).returncode:
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, "PostgreSQL does not start"
            time.sleep(0.05)

    def stop(self) -> None:
        """End it as an administrator does who does not wait for clients."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(timeout=START_S)
            self._process = None

    def url(self, key: object, *, template: str = "template0") -> str:
        """Of a database of this key's own, which is a copy of `template` when it is first asked for."""
        name = "t" + hashlib.sha256(str(key).encode()).hexdigest()[:20]
        if name not in self._made:
            made = self._sql(f'CREATE DATABASE "{name}" TEMPLATE "{template}"', check=False)
            # Another process of the same test may have been first.
            assert made.returncode == 0 or b"already exists" in made.stderr, made.stderr
            self._made.add(name)
        return self._url(name)

    def make_template(self) -> None:
        """A database with the tables of a library, which is quicker to copy than to migrate."""
        self._sql("CREATE DATABASE library TEMPLATE template0")
        Database(self._url("library")).close()

    def library_url(self, key: object) -> str:
        """As `url`, with the tables of a library. `make_template` comes first."""
        return self.url(key, template="library")

    def open_to_network(self, password: str, certificate: Path, key: Path) -> None:
        """Start it again, reachable also at a port of 127.0.0.1, where it asks for TLS and a password."""
        quoted = password.replace("'", "''")
        self._sql(f"ALTER USER {USER} PASSWORD '{quoted}'")
        self.stop()
        for name, source in (("server.crt", certificate), ("server.key", key)):
            shutil.copyfile(source, self.folder / name)
            (self.folder / name).chmod(0o600)
            if self._user is not None:
                shutil.chown(self.folder / name, self._user)
        rules = self.folder / "data" / "pg_hba.conf"
        rules.write_text("local all all trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.start(listen_addresses="127.0.0.1", ssl="on", ssl_cert_file=str(self.folder / "server.crt"),
                   ssl_key_file=str(self.folder / "server.key"))

    def clear(self) -> None:
        """Drop the databases that were made."""
        for name in self._made:
            self._sql(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        self._made.clear()

    def _url(self, name: str) -> str:
        return f"postgresql+psycopg://{USER}@/{name}?host={self.folder}&port={self.port}"

    def _sql(self, text: str, *, check: bool = True) -> "subprocess.CompletedProcess[bytes]":
        return self._run("psql", "-qX", "-h", str(self.folder), "-p", str(self.port), "-U", USER, "-d", "postgres",
                         "-c", text, check=check)

    def _run(self, program: str, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[bytes]":
        done = subprocess.run([self._bin / program, *arguments], capture_output=True, user=self._user,
                              extra_groups=[] if self._user else None, cwd=self.folder)
        assert done.returncode == 0 or not check, done.stderr.decode()
        return done


@contextmanager
def running() -> Iterator[Cluster]:
    """A cluster that runs within the block. Its folder has a short name, as a socket's path may not be long."""
    folder = Path(tempfile.mkdtemp(prefix="trimtab-pg-"))
    try:
        cluster = Cluster(folder)
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True
