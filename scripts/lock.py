"""`make lock`: writes requirements.lock, what the image installs, every file with its hash.

torch is left out, and what only its CUDA builds ask for with it: which build is right depends on the machine, so the
image installs torch by itself, in the version that constraints.txt names.
"""

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
EXTRAS = ("plots", "probes", "postgresql", "s3", "otel")
OF_TORCH = ("torch", "triton", "nvidia-", "cuda-")
HEAD = "# Written by `make lock` from pyproject.toml and constraints.txt; do not edit. torch is installed apart.\n"


def wanted() -> list[str]:
    """Requirements of the package and of its client, which are in this repository themselves."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    client = tomllib.loads((ROOT / "clients" / "python" / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *client["dependencies"]]
    for extra in EXTRAS:
        lines += project["optional-dependencies"][extra]
    return sorted(line for line in lines if not line.startswith("trimtab-client"))


def without_torch(text: str) -> str:
    """The file that pip-compile wrote, without the blocks of torch and of what belongs to its builds."""
    kept, dropping = [], False
    for line in text.splitlines(keepends=True):
        if line.startswith("#"):
            continue
        if not line.startswith(" "):
            dropping = line.startswith(OF_TORCH)
        if not dropping:
            kept.append(line)
    return HEAD + "".join(kept)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, found = Path(folder) / "requirements.in", Path(folder) / "requirements.txt"
        source.write_text("\n".join(wanted()))
        subprocess.run([sys.executable, "-m", "piptools", "compile", "--quiet", "--generate-hashes", "--strip-extras",
                        "--allow-unsafe", "--no-annotate", "--no-header", "--no-emit-index-url",
                        "--no-emit-find-links", "--no-emit-options", "--constraint", str(ROOT / "constraints.txt"),
                        "--output-file", str(found), str(source)], check=True)
        LOCK.write_text(without_torch(found.read_text()))


if __name__ == "__main__":
    main()
