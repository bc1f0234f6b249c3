"""What can go wrong around a command: a folder that can't be written, a checkpoint, an interrupt halfway."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from porter import exits

ROOT = Path(__file__).resolve().parents[1]


def children(pid: int) -> list[int]:
    try:
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


PORTER = ("-m", "porter")


def _listening() -> None:
    """Tests that run in the background ignore interrupts, which a new process inherits."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stopped(
    arguments: list[str], number: int, how: int, everyone: bool, temporary: Path, program: Sequence[str] = PORTER
) -> str:
    """Start a command, wait until it has `number` children, send it (or its group) a signal. Gives what it said."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    process = subprocess.Popen(
        [sys.executable, *program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True, preexec_fn=_listening,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        while len(found := children(process.pid)) < number and process.poll() is None:
            assert time.monotonic() < deadline, "it never started its processes"
            time.sleep(0.05)
        (os.killpg if everyone else os.kill)(process.pid, how)
        printed, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == exits.INTERRUPTED, said
    assert printed == "" and "Traceback" not in said and said.count("PORT010") == 1, said
    assert len(found) == number and not [c for c in found if alive(c)], "children are left"
    return said


class nobody:
    """Folder without write permission; root, who may write everywhere, is another user meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        for each in (self.folder, self.folder / "cog_view4"):
            each.chmod(0o555)
        self.root = os.geteuid() == 0
        if self.root:
            for parent in self.folder.parents:  # pytest's folders are for their owner only
                if parent.owner() == "root" and not parent.stat().st_mode & 0o001 and "pytest" in str(parent):
                    parent.chmod(0o755)
            os.seteuid(65534)

    def __exit__(self, *_: object) -> None:
        if self.root:
            os.seteuid(0)
        for each in (self.folder, self.folder / "cog_view4"):
            each.chmod(0o755)


def checkpoint(folder: Path) -> Path:
    """A transformer in two shards and a VAE in one, of one number each."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "vae").mkdir()
    index = {"_class_name": "QwenImagePipeline", "transformer": ["diffusers", "T"], "vae": ["diffusers", "V"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "transformer" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for path in ("transformer/model-1", "transformer/model-2", "vae/model"):
        header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        (folder / f"{path}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        (folder / path).parent.joinpath("config.json").write_text("{}")
    return folder
