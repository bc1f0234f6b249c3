"""The checks of `graphs.py`, in a process of their own: the engine changes the one it is imported in."""

import subprocess
import sys
from pathlib import Path

CHECKS = Path(__file__).with_name("graphs.py")


def test_when_a_port_replays_its_blocks_as_graphs(engine_environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run(command, env=engine_environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
