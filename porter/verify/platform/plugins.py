"""The two entry points that `bootstrap` makes visible to the engine in every process."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

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
        _witness_preparing(port.arch)


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


def _witness_preparing(arch: str) -> None:
    """Note in the file PORTER_WITNESS what the engine process prepares of a request's media, at each request."""
    path = os.environ.get("PORTER_WITNESS")
    if not path:
        return
    from vllm_omni.diffusion import registry

    load: Any = registry._load_process_func
    if getattr(load, "notes", None) == arch:
        return

    def noting(od_config: Any, name: str) -> Any:
        function = load(od_config, name)
        if od_config.model_class_name != arch or name != registry._DIFFUSION_PRE_PROCESS_FUNCS.get(arch):
            return function

        def pre_process_func(request: Any) -> Any:
            request = function(request)
            prompt = {} if isinstance(request.prompt, str) else request.prompt
            made = (prompt.get("additional_information") or {}).get("prepared_media", {})
            with open(path, "a") as stream:
                stream.write(f"{os.getpid()} prepared {' '.join(sorted(made))}\n")
            return request

        return pre_process_func

    noting.notes = arch  # type: ignore[attr-defined]
    registry._load_process_func = noting
