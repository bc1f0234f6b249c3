"""A small Diffusers of one pipeline, and statements from text."""

from __future__ import annotations

from pathlib import Path

import libcst as cst
import pytest

from porter.emit.imports import resolve_imports
from porter.pipeline import PipelinePort, port_pipeline
from porter.source.library import Library
from porter.source.marks import strip

FILES = {
    "__init__.py": '__version__ = "0.0.0"\n',
    "models/__init__.py": "",
    "models/transformers/__init__.py": "",
    "models/transformers/net.py": """
class TinyTransformer:
    def forward(self, hidden_states, timestep, text, guidance=None, return_dict=True):
        return hidden_states
""",
    "models/autoencoders/__init__.py": "",
    "models/autoencoders/vae.py": "class TinyVAE: ...\n",
    "schedulers/__init__.py": "",
    "schedulers/flow.py": "class TinyScheduler: ...\n",
    "image_processor.py": """
class VaeImageProcessor:
    def __init__(self, vae_scale_factor=8, do_normalize=True): ...
    def postprocess(self, image, output_type="pil"):
        return self._finish(image) if self.config.do_normalize else image
    def _finish(self, image):
        return image
""",
    "pipelines/__init__.py": "",
    "pipelines/pipeline_utils.py": "class DiffusionPipeline: ...\n",
}
HEAD = """
import torch
from transformers import TinyEncoder, TinyTokenizer
from ..image_processor import VaeImageProcessor
from ..models.autoencoders.vae import TinyVAE
from ..models.transformers.net import TinyTransformer
from ..schedulers.flow import TinyScheduler
from ..utils import logging
from .pipeline_utils import DiffusionPipeline
from .output import TinyOutput

logger = logging.get_logger(__name__)


"""
INIT = '''class TinyPipeline(DiffusionPipeline):
    """Makes tiny images."""

    def __init__(self, scheduler: TinyScheduler, vae: TinyVAE, text_encoder: TinyEncoder, tokenizer: TinyTokenizer,
                 transformer: TinyTransformer, safety: TinyEncoder = None):
        super().__init__()
        self.register_modules(scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer,
                              transformer=transformer, safety=safety)
        self.vae_scale_factor = self.vae.config.factor if getattr(self, "vae", None) else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.never_read = 3

    def encode_prompt(self, prompt, device=None, lora_scale=None):
        device = device or self._execution_device
        if lora_scale is not None:
            self.scale(lora_scale)
        # longest prompt decides
        ids = self.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        return self.text_encoder(ids.to(device))[0]

    @property
    def guidance_scale(self):
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self):
        return self._guidance_scale > 1

    @property
    def interrupt(self):
        return self._interrupt

'''
CALL = '''    @torch.no_grad()
    def __call__(self, prompt: str | list[str] = None, negative_prompt: str | list[str] = None, height: int | None = None,
                 num_inference_steps: int = 7, guidance_scale: float = 3.0, num_images_per_prompt: int = 1,
                 generator: torch.Generator | None = None, latents: torch.Tensor | None = None,
                 output_type: str | None = "pil", return_dict: bool = True, attention_kwargs: dict | None = None,
                 callback_on_step_end=None, callback_on_step_end_tensor_inputs=["latents"], flavour: str = "plain"):
        """Long documentation."""
        height = height or 64
        self._guidance_scale = guidance_scale
        self._interrupt = False
        lora_scale = attention_kwargs.get("scale", None) if attention_kwargs is not None else None
        embeds = self.encode_prompt(prompt, lora_scale=lora_scale)
        if self.do_classifier_free_guidance:
            negative_embeds = self.encode_prompt(negative_prompt, lora_scale=lora_scale)
        if latents is None:
            latents = torch.randn(1, 4, height // self.vae_scale_factor, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                # one number per image
                timestep = t.expand(latents.shape[0])
                noise = self.transformer(latents, timestep, text=embeds, return_dict=False)[0]
                if self.do_classifier_free_guidance:
                    with self.transformer.cache_context("uncond"):
                        negative_noise = self.transformer(latents, timestep, text=negative_embeds, return_dict=False)[0]
                    noise = negative_noise + self.guidance_scale * (noise - negative_noise)
                # compute the previous sample
                latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(self, i, t, {k: locals()[k] for k in callback_on_step_end_tensor_inputs})
                if i == len(timesteps) - 1:
                    progress_bar.update()
        if output_type == "latent":
            image = latents
        else:
            image = self.vae.decode(latents, return_dict=False)[0]
            image = self.image_processor.postprocess(image, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (image,)
        return TinyOutput(images=image)
'''
PIPELINE = HEAD + INIT + CALL


class Studio:
    """Ports pipeline sources."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def library(self, source: str = PIPELINE) -> Library:
        for name, text in {**FILES, "pipelines/tiny.py": source}.items():
            path = self.root / "diffusers" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Library(self.root / "diffusers", "0.0.0")

    def port(self, source: str = PIPELINE) -> PipelinePort:
        return port_pipeline(self.library(source), "diffusers.pipelines.tiny.TinyPipeline", {})


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path)


def printed(port: PipelinePort) -> str:
    """The code of a port with ordinary names."""
    body = strip(cst.Module(body=[d.node for d in port.unit.definitions]).code)
    return resolve_imports(body, {f"{d.module}.{d.name}": d.name for d in port.unit.definitions}).body


def statements(text: str) -> list[cst.BaseStatement]:
    return list(cst.parse_module(text).body)


def text_of(nodes: list[cst.BaseStatement]) -> str:
    return strip(cst.Module(body=list(nodes)).code) if nodes else ""
