"""porter compiles a Diffusers pipeline's source into a vLLM-Omni port."""

__version__ = "0.1.0"
