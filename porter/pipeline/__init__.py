"""The pipeline half: from a Diffusers pipeline class to the pipeline file of a port."""

from porter.pipeline.assemble import port_pipeline
from porter.pipeline.model import Denoiser, Feature, Parameter, PipelinePort

__all__ = ["Denoiser", "Feature", "Parameter", "PipelinePort", "port_pipeline"]
