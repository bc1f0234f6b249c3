"""Random weights of real size, the same on every side: each tensor comes from a generator seeded by its Diffusers name.

The values are rounded to bfloat16, so that a float32 reference holds exactly what the others hold.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch


def random_weight(name: str, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """A bfloat16 tensor. The spread is that of torch's default for linears; scales of norms vary around 1."""
    generator = torch.Generator(device=device).manual_seed(zlib.crc32(name.encode()))
    drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    if "table" in name:
        drawn.mul_(shape[-1] ** -0.5)
    elif len(shape) <= 1:
        drawn = drawn.mul_(0.1).add_(1) if "norm" in name and name.endswith("weight") else drawn.mul_(0.02)
    else:
        drawn.mul_((3 * drawn[0].numel()) ** -0.5)
    return drawn.to(torch.bfloat16)


def randomize(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Give every parameter of a Diffusers module its random weight, in its own dtype."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(random_weight(name, parameter.shape, device))
    return module.eval()


def checkpoint(
    shapes: dict[str, torch.Size], buffers: dict[str, torch.Tensor], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint with these weights holds, one tensor at a time: parameters and persistent buffers."""
    for name, shape in shapes.items():
        yield name, buffers[name].to(device) if name in buffers else random_weight(name, shape, device)
