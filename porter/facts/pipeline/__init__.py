"""Facts about a Diffusers pipeline: components, regions of `__call__`, guidance, liveness. One analysis per file."""

from porter.facts.pipeline.call_state import CallState, call_state
from porter.facts.pipeline.combination import Combination
from porter.facts.pipeline.components import Component, components
from porter.facts.pipeline.denoiser_call import Branch
from porter.facts.pipeline.guidance import Guidance, guidance
from porter.facts.pipeline.members import Members, members
from porter.facts.pipeline.prompt_axis import PromptAxis, Share, prompt_axis
from porter.facts.pipeline.regions import Loop, Regions, regions
from porter.facts.pipeline.stages import Stages, stages
from porter.facts.pipeline.tail import PostProcess, Tail, Value, tail

__all__ = [
    "Branch", "CallState", "Combination", "Component", "Guidance", "Loop", "Members", "PostProcess", "PromptAxis",
    "Regions", "Share", "Stages", "Tail", "Value", "call_state", "components", "guidance", "members", "prompt_axis",
    "regions", "stages", "tail",
]  # fmt: skip
