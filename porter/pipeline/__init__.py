"""The pipeline half: from a Diffusers pipeline class to the pipeline file of a port."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from porter.pipeline.model import Denoiser, Feature, Parameter, PipelinePort

if TYPE_CHECKING:
    from porter.pipeline.assemble import port_pipeline

__all__ = ["Denoiser", "Feature", "Parameter", "PipelinePort", "port_pipeline"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - loaded by whoever ports a pipeline
    if name == "port_pipeline":
        from porter.pipeline.assemble import port_pipeline

        return port_pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
