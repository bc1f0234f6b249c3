"""`python -m porter.verify.install`: the CPU environment of verification, into the current interpreter.

    pip install --no-deps -r porter/verify/requirements-cpu.txt     # torch resolves to a CPU build where one is offered
    delete site-packages/vllm/*.so                                  # plain torch kernels: bit-exact linears in float32
    check

Nothing is resolved by pip (--no-deps): the file pins what the imports need. Not needed, and left out: triton,
torchaudio, torchcodec, numba, opencv, sentencepiece. torchvision may be a CUDA build; see platform/shim.py.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from porter.verify.environment import check_environment, gpu_present

REQUIREMENTS = Path(__file__).with_name("requirements-cpu.txt")

CHECK = """
from porter.verify.platform import bootstrap
bootstrap.activate()
import torch, vllm_omni.diffusion.registry
from vllm_omni.platforms import current_omni_platform
print(type(current_omni_platform).__name__, torch.__version__)
"""


def pip_command(requirements: Path = REQUIREMENTS) -> list[str]:
    """The pip call."""
    return [sys.executable, "-m", "pip", "install", "--no-deps", "-r", str(requirements)]


def vllm_folder() -> Path | None:
    spec = importlib.util.find_spec("vllm")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def delete_kernels() -> list[Path]:
    """Delete vLLM's compiled CPU kernels: without them every linear is torch's own. Returns what was deleted."""
    folder = vllm_folder()
    found = sorted(folder.glob("*.so")) if folder else []
    for file in found:
        file.unlink()
    return found


def check() -> str:
    """Import the engine in a new process with the plug-in. Returns its line; raises RuntimeError when it fails."""
    problems = check_environment()
    if problems:
        raise RuntimeError("; ".join(p.title for p in problems))
    command = [sys.executable, "-P", "-c", CHECK]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=_environment(), check=False)
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    return result.stdout.strip().splitlines()[-1]


def _environment() -> dict[str, str]:
    from porter.verify.platform.bootstrap import environment

    return environment()


def main() -> int:
    if gpu_present():
        print("this machine has an accelerator: install vllm and vllm-omni for it instead", file=sys.stderr)
        return 2
    print("$", " ".join(pip_command()), file=sys.stderr)
    code = subprocess.run(pip_command(), check=False).returncode
    if code:
        return code
    importlib.invalidate_caches()
    for file in delete_kernels():
        print(f"deleted {file.name}", file=sys.stderr)
    try:
        print(check())
    except RuntimeError as error:
        print(f"the environment does not work: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
