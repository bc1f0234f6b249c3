"""Files around the ports: a folder's `__init__.py`, the plug-in package, rows for the engine's own registry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct

from porter.pipeline.render import render_text


class PortRow(Struct, frozen=True):
    """One port as the registry sees it; `module` and `cls` are None while only its denoiser is ported."""

    arch: str
    folder: str
    module: str | None
    cls: str | None
    pre_process: str | None = None
    post_process: str | None = None


def folder_init(folder: str, transformers: Iterable[tuple[str, str]], ports: Sequence[PortRow]) -> str:
    """`__init__.py` of one folder: `transformers` are (module, class) pairs."""
    imports: dict[str, list[str]] = {}
    for module, cls in sorted(transformers):
        imports.setdefault(module, []).append(cls)
    for port in sorted(ports, key=lambda p: p.arch):
        if port.module is not None and port.cls is not None:
            names = [port.cls, *(n for n in (port.pre_process, port.post_process) if n)]
            imports.setdefault(port.module, []).extend(names)
    rows = sorted((module, sorted(set(names))) for module, names in imports.items())
    exported = sorted(n for _, names in rows for n in names)
    title = f"Ports of the {folder} family."
    return render_text("registry/folder_init.py.jinja", title=title, imports=rows, exported=exported) + "\n"


def package_files(folders: Iterable[str], version: str) -> dict[str, str]:
    """`__init__.py` and `pyproject.toml` of `generated/`, which installs as the package `porter_ports`."""
    packages = ["porter_ports", *(f"porter_ports.{f}" for f in sorted(folders))]
    return {
        "__init__.py": render_text("registry/package_init.py.jinja"),
        "pyproject.toml": render_text("registry/pyproject.toml.jinja", packages=packages, version=version),
    }


def registry_rows(ports: Iterable[PortRow]) -> str:
    """The rows a port needs in the engine's own registry."""
    complete = sorted((p for p in ports if p.module is not None), key=lambda p: p.arch)
    return render_text("registry/registry_rows.py.jinja", ports=complete)
