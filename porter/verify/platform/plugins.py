"""The two entry points that `bootstrap` makes visible to the engine in every process."""

from __future__ import annotations

import logging
import os
import sys

log = logging.getLogger(__name__)


def platform_plugin() -> str | None:
    """Entry point of group `vllm_omni.platform_plugins`: our platform, or None where there is an accelerator."""
    from porter.verify.environment import gpu_present

    return None if gpu_present() else "porter.verify.platform.cpu_platform.CpuOmniPlatform"


def register_ports() -> None:
    """Entry point of group `vllm_omni.general_plugins`: registers the ports named by the environment.

    PORTER_GENERATED is a folder with a manifest.json; PORTER_ARCHS, when set, limits registration to a comma list.
    Safe to call more than once.
    """
    root = os.environ.get("PORTER_GENERATED")
    if not root:
        return
    from porter.verify.manifest import read_manifest
    from porter.verify.ports import register as register_port

    wanted = set(filter(None, os.environ.get("PORTER_ARCHS", "").split(",")))
    for port in read_manifest(root).ports:
        if port.module is None or port.cls is None or (wanted and port.arch not in wanted):
            continue
        module = register_port(root, port)
        log.info("registered %s", port.arch)
        _witness(module)


class _Witness:
    """Notes in the file PORTER_WITNESS that a port's module is being imported: proof that the engine uses it."""

    def __init__(self, module: str, path: str) -> None:
        self.module, self.path = module, path

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == self.module:
            with open(self.path, "a") as stream:
                stream.write(f"{os.getpid()} {name}\n")


def _witness(module: str) -> None:
    path = os.environ.get("PORTER_WITNESS")
    if path and not any(isinstance(f, _Witness) and f.module == module for f in sys.meta_path):
        sys.meta_path.insert(0, _Witness(module, path))
