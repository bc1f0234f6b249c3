"""A stand-in for a generated port, made at test time from the installed engine's own files and the port contract.

Used only while generated/ has no port of SUBJECT. Nothing of the engine is kept in the repository.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

SUBJECT = "QwenImagePipeline"
DENOISER = "QwenImageTransformer2DModel"
FILES = ("qwen_image_transformer", "pipeline_qwen_image", "rope_utils", "cfg_parallel", "autoencoder_kl_qwenimage")

ADAPTER = """
from .qwen_image_transformer import QwenImageTransformer2DModel as Base


class QwenImageTransformer2DModel(Base):
    def __init__(self, *, od_config, quant_config=None, prefix="", **config):
        super().__init__(od_config=od_config, quant_config=quant_config, **config)

    def forward(self, *args, **kwargs):
        text = kwargs["encoder_hidden_states"]
        kwargs.setdefault("txt_seq_lens", [text.shape[1]] * text.shape[0])
        return super().forward(*args, **kwargs)

    def load_weights(self, weights):
        known = {n for n, _ in self.named_parameters()}
        packed = {".to_q.": ".to_qkv.", ".to_k.": ".to_qkv.", ".to_v.": ".to_qkv.", ".to_out.0.": ".to_out.",
                  ".add_q_proj.": ".add_kv_proj.", ".add_k_proj.": ".add_kv_proj.", ".add_v_proj.": ".add_kv_proj."}
        shards = {}
        checked = []
        for name, weight in weights:
            target = name
            for old, new in packed.items():
                target = target.replace(old, new)
            if target not in known and name not in known:
                raise ValueError(f"unknown weight {name}")
            shards.setdefault(target, set()).add(name)
            checked.append((name, weight))
        for target, names in shards.items():
            if ("to_qkv" in target or "add_kv_proj" in target) and len(names) != 3:
                raise ValueError(f"{target}: {len(names)} of 3 shards")
        return super().load_weights(iter(checked)) & known
"""


def adapt(root: Path) -> Path:
    """Write the stand-in below `root` and return it."""
    spec = importlib.util.find_spec("vllm_omni")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "diffusion" / "models" / "qwen_image"
    folder = root / "qwen_image"
    folder.mkdir(parents=True)
    for stem in FILES:
        text = (source / f"{stem}.py").read_text()
        text = text.replace("from vllm_omni.diffusion.models.qwen_image.", "from .")
        (folder / f"{stem}.py").write_text(text)
    (folder / "__init__.py").write_text("")
    (folder / "adapter.py").write_text(ADAPTER)
    row = {
        "source": f"diffusers.{SUBJECT}", "arch": SUBJECT, "folder": "qwen_image", "module": "pipeline_qwen_image",
        "class": SUBJECT, "pre_process": None, "post_process": "get_qwen_image_post_process_func",
        "denoisers": {
            "transformer": {"source": f"diffusers.{DENOISER}", "module": "adapter", "class": DENOISER}
        },
        "features": {},
    }  # fmt: skip
    manifest = {"schema": 1, "diffusers": "0.40.0", "engine": "vllm-omni 0.30.0", "ports": [row]}
    (root / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return root
