"""The engine side of every comparison: `python -m porter.verify.engine_worker RANK`, started by `bench`.

Reads one JSON job per line on stdin, answers one JSON line each on the original stdout. Jobs live in `engine_jobs`
(denoisers) and `engine_pipeline` (pipelines).
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

_started = time.perf_counter()


def main() -> None:
    reply = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from porter.verify.platform import bootstrap

    bootstrap.activate()
    import torch

    torch.set_num_threads(int(os.environ.get("PORTER_THREADS", "1")))
    import vllm_omni.diffusion.registry
    import vllm_omni.diffusion.worker.diffusion_model_runner  # noqa: F401

    from porter.verify import engine_jobs, engine_pipeline

    jobs = engine_jobs.JOBS | engine_pipeline.JOBS
    print(json.dumps({"ok": True, "import_seconds": time.perf_counter() - _started}), file=reply)
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        answer: dict[str, Any]
        try:
            answer = {"ok": True, **jobs[job["job"]](job)}
        except Exception as problem:  # noqa: BLE001 - goes to the caller
            answer = {
                "ok": False,
                "type": type(problem).__name__,
                "error": str(problem)[:2000],
                "traceback": traceback.format_exc()[-4000:],
            }
        print(json.dumps(answer | {"seconds": time.perf_counter() - start}), file=reply)


if __name__ == "__main__":
    main()
