"""What torch.compile did since the last look: graphs, graph breaks, recompilations and their reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def forget() -> None:
    """Drop compiled code and counters of this process."""
    import torch
    from torch._dynamo.utils import clear_compilation_metrics, counters

    torch._dynamo.reset()
    counters.clear()
    clear_compilation_metrics()


def undo(module: torch.nn.Module) -> None:
    """Compiled blocks of a module become eager again."""
    for part in module.modules():
        if hasattr(part.__dict__.get("forward"), "_torchdynamo_orig_callable"):
            del part.forward
        part._compiled_call_impl = None
    forget()


def statistics() -> dict[str, Any]:
    """{graphs, breaks, break_reasons, recompiles, recompile_reasons} since `forget`."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    from porter.bench.places import without_folders

    breaks = counters["graph_break"]
    again = [m for m in get_compilation_metrics() if getattr(m, "recompile_reason", None)]
    reasons = sorted({f"{m.co_name}: {without_folders(str(m.recompile_reason).strip())[:200]}" for m in again})
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(breaks.values()),
        "break_reasons": [without_folders(str(reason).strip().splitlines()[0])[:200] for reason in list(breaks)[:4]],
        "recompiles": len(again),
        "recompile_reasons": reasons[:4],
    }
