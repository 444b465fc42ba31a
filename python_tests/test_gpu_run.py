"""`make gpu` where there is no GPU, and what it writes where there is one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "cuda_tests"


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_one_line_without_a_gpu(tmp_path):
    ran = subprocess.run([FOLDER / "run_gpu.sh", tmp_path], capture_output=True, text=True, check=False)
    assert ran.returncode == 77
    assert len(ran.stdout.splitlines()) == 1
    assert "no NVIDIA GPU here" in ran.stdout
    assert list(tmp_path.iterdir()) == []


def test_page_has_every_stage(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU of a test, 1.2, 3 MiB'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    stages = ["build\tok\t30\tsm_90a", "operators\tFAILED\t12\t1 failed | 99 passed", "benchmarks\tlate\t99\t"]
    (tmp_path / "stages.tsv").write_text("\n".join(stages) + "\n")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([sys.executable, FOLDER / "gpu_page.py", tmp_path, tmp_path], env=environment, check=True)
    page = (tmp_path / "gpu.md").read_text()
    assert "| GPU | GPU of a test, 3 MiB |" in page
    assert "| operators: values and gradients against float64 | FAILED | 12 | 1 failed \\| 99 passed |" in page
    assert "there is no figure of this run" in page
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert [stage["verdict"] for stage in results["stages"]] == ["ok", "FAILED", "late"]
