"""A tiny Qwen2.5-VL in vLLM, whose processor of this family needs torchvision: installed, or unpacked below build/
(docs/vision.md says how).
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("vllm")

ROOT = Path(__file__).resolve().parents[2]
UNPACKED = ROOT / "build" / "torchvision"


def test_conversations_with_pictures_and_a_weight_sync(tmp_path):
    if find_spec("torchvision") is None and not (UNPACKED / "torchvision").is_dir():
        pytest.skip('no torchvision: pip install --no-deps --target build/torchvision "torchvision==0.28.*"')
    places = (
        [str(ROOT)]
        if find_spec("torchvision")
        else [str(ROOT), str(ROOT / "tests/engines/torchvision_on_cpu"), str(UNPACKED)]
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-m", "tests.engines.vision_in_vllm", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
