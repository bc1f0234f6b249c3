"""Makes a CUDA build of torchvision importable beside a CPU build of torch.

Its compiled part does not load there, and its Python part then fails because two operator schemas are missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

_library: Any = None


def declare_torchvision_operators() -> None:
    """Declare the schemas of `nms` and `qnms`. Call before torchvision is imported; does nothing where not needed."""
    global _library
    import torch

    if _library is not None or torch.version.cuda or importlib.util.find_spec("torchvision") is None:
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):
            _library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
