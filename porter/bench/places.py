"""Texts and records without the machine they come from: no folders of an installation, few pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PACKAGES = ("diffusers", "vllm_omni", "vllm", "torch", "transformers", "triton", "porter")
_FOLDERS = re.compile(rf"(?<![\w:/.~+-])[\w/.~+-]*/(?=(?:{'|'.join(PACKAGES)})/)")
"""What stands before the folder of a package in a path, cut or whole; not in an address, which has a colon before it."""


def without_folders(text: str) -> str:
    """`text` with the paths of files of known packages from the package on: `torch/nn/modules/module.py`."""
    return _FOLDERS.sub("", text)


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
