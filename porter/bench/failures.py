"""One clear sentence for what can go wrong on a machine with an accelerator, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.bench.places import without_folders
from porter.verify.bench import JobError
from porter.verify.outcome import VerifyError

MEMORY = "cut the model with --depth, choose smaller --cases, or hold one side at a time with --alone"
DRIVER = "the driver is older than torch's CUDA: update the driver, or install torch built for an older CUDA"
NO_CARD = "no accelerator is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES, or run with --device cpu"
POISON = ("AcceleratorError", "device-side assert", "CUDA error", "CUBLAS_STATUS_", "CUDNN_STATUS_EXECUTION_FAILED")
"""Messages of torch after an error inside a kernel; every later call of the process fails, too."""
FLASH = "pip install fa3-fwd on Hopper, flash-attn elsewhere"


def explained(error: JobError | VerifyError) -> str:
    """A failed job as one message."""
    if isinstance(error, VerifyError):
        text = f"{error.message}; {error.advice}" if error.advice else error.message
        return without_folders(" ".join(text.split()))[:600]
    first = without_folders(error.message.strip().splitlines()[0]) if error.message.strip() else error.kind
    if error.kind == "OutOfMemory":
        return f"out of memory ({first[:200]}): {MEMORY}"
    return f"{error.kind}: {first[:400]}"


def poisoned(error: JobError) -> bool:
    """Whether a failed job leaves a CUDA context in which nothing runs any more: only a new process helps.

    Memory that ran out leaves a sound one.
    """
    return error.kind != "OutOfMemory" and any(mark in f"{error.kind}: {error.message}" for mark in POISON)


def device_problem(device: Mapping[str, Any], wanted: str, cards: int = 1) -> str | None:
    """Why `wanted` (cuda or cpu) can't be had on the machine that a worker describes; None when it can."""
    if device.get("dead"):
        return str(device["problem"])
    if wanted != "cuda":
        return None
    if not device.get("cuda"):
        problem = str(device.get("problem", ""))
        if "driver" in problem.lower() and ("old" in problem.lower() or "insufficient" in problem.lower()):
            return f"{problem}: {DRIVER}"
        if device.get("cuda_of_torch") is None:
            return f"torch {device.get('torch')} is built without CUDA: install a CUDA build of torch"
        return f"{problem or 'torch finds no CUDA device'}: {NO_CARD}"
    if device.get("devices", 1) < cards:
        return f"{cards} cards are needed, {device.get('devices', 1)} are visible: {NO_CARD}"
    return None


def flash_problem(facts: Mapping[str, Any], device: Mapping[str, Any]) -> str | None:
    """Why an engine side does not use FlashAttention on a card that could; None when it does, or on the CPU."""
    if not device.get("cuda") or "FLASH_ATTN" in "".join(facts.get("backend", [])):
        return None
    if not facts.get("flash_attention"):
        return f"FlashAttention is missing, the engine falls back to {', '.join(facts.get('backend', []))}: {FLASH}"
    return f"the engine chose {', '.join(facts.get('backend', []))} although {facts['flash_attention']} is installed"
