"""Facts about a Diffusers pipeline: components, regions of `__call__`, guidance, liveness. One analysis per file."""

from porter.facts.pipeline.call_state import CallState, call_state
from porter.facts.pipeline.components import Component, components
from porter.facts.pipeline.guidance import Branch, Combination, Guidance, guidance
from porter.facts.pipeline.members import Members, members
from porter.facts.pipeline.regions import Loop, Regions, regions
from porter.facts.pipeline.tail import PostProcess, Tail, tail

__all__ = [
    "Branch", "CallState", "Combination", "Component", "Guidance", "Loop", "Members", "PostProcess", "Regions", "Tail",
    "call_state", "components", "guidance", "members", "regions", "tail",
]  # fmt: skip
