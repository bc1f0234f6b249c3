"""One request through the public entry point, as a user writes it: `python -m porter.verify.serve_program JOB.json`.

Started by rung `serve` with the environment of `platform.bootstrap`; no file of the engine is touched. Writes
{images, seconds_init, seconds_generate} to the job's `out`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def images_of(outputs: Any) -> list[Any]:
    """Pictures or frames in what `Omni.generate` returns."""
    first = outputs[0]
    found = getattr(first, "images", None)
    if not found:
        found = getattr(getattr(first, "request_output", None), "images", None)
    return list(found or [])


def sound_of(outputs: Any) -> list[Any]:
    """Sound in what `Omni.generate` returns."""
    for holder in (outputs[0], getattr(outputs[0], "request_output", None)):
        found = (getattr(holder, "multimodal_output", None) or {}).get("audio")
        if found is not None:
            return [found]
    return []


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    from porter.verify.baseline import pictures
    from porter.verify.platform import bootstrap

    bootstrap.activate(job["generated"], (job["arch"],))
    import numpy as np
    import torch
    from vllm_omni import Omni
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    start = time.perf_counter()
    omni = Omni(model=job["checkpoint"], dtype="float32", enforce_eager=True, **job.get("options", {}))
    ready = time.perf_counter()
    params = OmniDiffusionSamplingParams(seed=job["seed"], **job["sampling"])
    prompt = job["prompt"] | ({"multi_modal_data": pictures(job["images"])} if job["images"] else {})
    outputs = omni.generate(prompt, sampling_params_list=[params])
    done = time.perf_counter()
    found = images_of(outputs) or sound_of(outputs)
    generated = [i.detach().cpu() if torch.is_tensor(i) else torch.from_numpy(np.array(i)) for i in found]
    torch.save({"images": generated, "seconds_init": ready - start, "seconds_generate": done - ready}, job["out"])
    (omni.close if hasattr(omni, "close") else omni.shutdown)()


if __name__ == "__main__":
    main()
