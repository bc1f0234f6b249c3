"""Importing generated modules by path, as packages, so that their relative imports work. No torch here."""

from __future__ import annotations

import hashlib
import importlib
import sys
import types
from pathlib import Path

from porter.verify.manifest import Port
from porter.verify.outcome import VerifyError


def package_of(generated: Path | str) -> str:
    """Name of a package whose search path is `generated`; one per folder, so several can live in one process."""
    root = Path(generated).resolve()
    name = f"porter_ports_{hashlib.sha256(str(root).encode()).hexdigest()[:10]}"
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [str(root)]
        package.__package__ = name
        sys.modules[name] = package
    return name


def module_file(generated: Path | str, folder: str, module: str) -> Path:
    """The file of a manifest's `folder` and `module` (a module name, or dotted below the generated folder)."""
    root = Path(generated).resolve()
    stem = module.removesuffix(".py").rsplit(".", 1)[-1]
    path = root / folder / f"{stem}.py"
    if not path.is_file():
        raise VerifyError(f"{path} does not exist", "the manifest names a module that was not generated")
    return path


def module_name(generated: Path | str, folder: str, module: str) -> str:
    """Importable dotted name of a generated module in this process."""
    stem = module_file(generated, folder, module).stem
    return f"{package_of(generated)}.{folder.replace('/', '.')}.{stem}"


def register(generated: Path | str, port: Port) -> str:
    """Make a port the engine's class for its architecture, in this process. Returns the name of its module."""
    from vllm_omni.diffusion import registry

    assert port.module is not None
    module = module_name(generated, port.folder, port.module)
    # As the generated package does: the engine's own functions fit its own pipeline.
    registry._DIFFUSION_PRE_PROCESS_FUNCS.pop(port.arch, None)
    registry._DIFFUSION_POST_PROCESS_FUNCS.pop(port.arch, None)
    registry.register_diffusion_model(
        port.arch, module, port.cls, pre_process_func_name=port.pre_process, post_process_func_name=port.post_process
    )
    return module


def load_class(generated: Path | str, folder: str, module: str, cls: str) -> type:
    """Import a class of a generated folder. The folder's own __init__ runs first, as it does for a user."""
    importlib.invalidate_caches()
    loaded = importlib.import_module(module_name(generated, folder, module))
    try:
        return getattr(loaded, cls)
    except AttributeError:
        raise VerifyError(f"{loaded.__file__} defines no {cls}", "manifest and module disagree") from None
