"""Texts and records without the machine they come from: no folders of an installation, few pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PACKAGES = ("diffusers", "vllm_omni", "vllm", "torch", "transformers", "triton", "porter")
_KNOWN = rf"(?:{'|'.join(PACKAGES)})/"
_FOLDERS = re.compile(rf"(?<![\w:/.~+-])[\w/.~+-]*/(?={_KNOWN})")
"""What stands before the folder of a package in a path, cut or whole; not in an address, which has a colon before it."""
_OTHERS = re.compile(
    rf"(?<![\w:/.~+-])(?!{_KNOWN})[\w/.~+-]*/(?=[\w.~+-]+/[\w+-]+\.py\b)|(?<=# )(?!{_KNOWN})[\w/.~+-]*/(?=[\w.~+-]+$)"
)
"""The same before the last folder of another Python file, and what is left of such a path where a reason was cut off."""
_STACK = re.compile(r"\nUser stack trace:.*", re.DOTALL)
"""What torch adds to a reason, over several lines: files on files."""


def without_folders(text: str) -> str:
    """`text` with paths of files of known packages from the package on (`torch/nn/modules/module.py`), those of other Python
    files from their last folder on, and without stack traces."""
    return _OTHERS.sub("", _FOLDERS.sub("", _STACK.sub("", text)))


def portable(data: Mapping[str, Any]) -> dict[str, Any]:
    """A record to be kept in a repository: every figure as it is, without folders. Of the pictures, most of its size, those
    of the first denoiser stay as an example.
    """
    pictured = next((name for name, row in data["denoisers"].items() if row.get("pictures")), None)
    rows = {
        name: {k: v for k, v in row.items() if k != "pictures" or name == pictured} for name, row in data["denoisers"].items()
    }  # fmt: skip
    return _plain({**data, "denoisers": rows})


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return without_folders(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value
