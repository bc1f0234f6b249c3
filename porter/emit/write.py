"""Put files in place, all or none: texts are written beside their targets first, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from porter.model import Diagnostic, PorterError


def write_atomically(files: Mapping[str, str], out: Path) -> list[str]:
    """Write `files` (path relative to `out` -> text); returns the paths that changed, sorted.

    Nothing is replaced before every new text is on disk; if a rename fails, or the user interrupts, what was replaced
    is put back. Raises PorterError (PORT009) with the folder as it was.
    """
    changed = [name for name in sorted(files) if _differs(out / name, files[name])]
    made: list[Path] = []
    staged: dict[str, Path] = {}
    saved: dict[str, bytes | None] = {}
    try:
        for name in changed:
            target = out / name
            made += _folders(target.parent)
            staged[name] = _stage(target, files[name])
        for name, path in staged.items():
            target = out / name
            saved[name] = target.read_bytes() if target.exists() else None
            os.replace(path, target)
    except OSError as error:
        _undo(out, staged, saved, made)
        reason = error.strerror or str(error)
        raise PorterError(
            Diagnostic("PORT009", f"can't write to {out}: {reason}", advice="nothing was changed")
        ) from None
    except BaseException:
        _undo(out, staged, saved, made)
        raise
    return changed


def check_writable(path: Path) -> None:
    """Raise PorterError (PORT009) if a file can't be written there: to know before the work, not after it."""
    there = next(p for p in path.absolute().parents if p.exists())
    if path.is_dir():
        reason = "it is a folder"
    elif not there.is_dir():
        reason = f"{there} is no folder"
    elif not os.access(there, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        reason = "permission denied"
    else:
        return
    raise PorterError(Diagnostic("PORT009", f"can't write {path}: {reason}", advice="nothing was run"))


def _differs(path: Path, text: str) -> bool:
    try:
        return path.read_bytes() != text.encode()
    except OSError:
        return True


def _folders(folder: Path) -> list[Path]:
    """Make a folder and its parents; returns those that were not there, outermost first."""
    missing = [folder, *folder.parents]
    new = [p for p in missing if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return list(reversed(new))


def _stage(target: Path, text: str) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o644
        os.chmod(name, mode)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    return Path(name)


def _undo(out: Path, staged: Mapping[str, Path], saved: Mapping[str, bytes | None], made: list[Path]) -> None:
    for name, content in saved.items():
        with suppress(OSError):
            if content is not None:
                (out / name).write_bytes(content)
            elif not staged[name].exists():  # it was renamed into place
                (out / name).unlink()
    for path in staged.values():
        with suppress(OSError):
            path.unlink()
    for folder in reversed(made):
        with suppress(OSError):
            folder.rmdir()
