"""Makes the plug-ins visible to this process and to every process it starts, with nothing installed.

A temporary directory with a dist-info folder (entry points) and a sitecustomize (torchvision shim for spawned
workers) goes on sys.path and PYTHONPATH. On a machine with an accelerator the engine's own platform is used:
only the registration of generated ports is added there.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

from porter.verify.environment import gpu_present

NAME = "porter_verify_plugins"
PACKAGE_ROOT = Path(__file__).resolve().parents[3]

CPU_ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
}
QUIET_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

SITECUSTOMIZE = '''\
"""Loaded by spawned engine workers: only the torchvision shim, and only once torch is wanted."""
import sys


class _Shim:
    """Declares torchvision's operator schemas just before torchvision is first imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            from porter.verify.platform.shim import declare_torchvision_operators

            declare_torchvision_operators()
        return None


sys.meta_path.insert(0, _Shim())
'''


def plugin_directory() -> Path:
    """A fresh directory that holds the entry points; removed when this process ends."""
    root = Path(tempfile.mkdtemp(prefix="porter_plugins_"))
    atexit.register(shutil.rmtree, root, True)
    info = root / f"{NAME}-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0.0.1\n")
    entries = "[vllm_omni.general_plugins]\nporter_ports = porter.verify.platform.plugins:register_ports\n"
    if not gpu_present():
        entries += "[vllm_omni.platform_plugins]\nporter_cpu = porter.verify.platform.plugins:platform_plugin\n"
        (root / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (info / "entry_points.txt").write_text(entries)
    return root


def environment(generated: Path | str | None = None, archs: tuple[str, ...] = ()) -> dict[str, str]:
    """Environment for a new process in which the engine finds our plug-ins. Does not change this process."""
    root = plugin_directory()
    paths = [str(root), str(PACKAGE_ROOT)]
    inherited = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in paths]
    env = dict(os.environ)
    for key, value in (QUIET_ENVIRONMENT | ({} if gpu_present() else CPU_ENVIRONMENT)).items():
        env.setdefault(key, value)
    env["PYTHONPATH"] = os.pathsep.join(paths + inherited)
    if generated is not None:
        env["PORTER_GENERATED"] = str(Path(generated).resolve())
    if archs:
        env["PORTER_ARCHS"] = ",".join(archs)
    return env


def activate(generated: Path | str | None = None, archs: tuple[str, ...] = ()) -> None:
    """Apply `environment` to this process, before anything of the engine is imported."""
    env = environment(generated, archs)
    os.environ.update({k: v for k, v in env.items() if os.environ.get(k) != v})
    for path in reversed(env["PYTHONPATH"].split(os.pathsep)):
        if path not in sys.path:
            sys.path.insert(0, path)
    if not gpu_present():
        from porter.verify.platform.shim import declare_torchvision_operators

        declare_torchvision_operators()
