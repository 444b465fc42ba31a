"""`make gpu` where there is no GPU, and what it writes where there is one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import gpu, suite
from benchmarks.page import PLACEHOLDER, page, template
from benchmarks.suite import stages

FOLDER = Path(__file__).resolve().parents[1] / "cuda_tests"


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_one_line_without_a_gpu(tmp_path):
    ran = subprocess.run([FOLDER / "run_gpu.sh", tmp_path], capture_output=True, text=True, check=False)
    assert ran.returncode == 77
    assert len(ran.stdout.splitlines()) == 1
    assert "no NVIDIA GPU here" in ran.stdout
    assert list(tmp_path.iterdir()) == []


def test_page_has_every_stage(tmp_path):
    lines = ["build\tok\t30\tsm_90a", "operators\tFAILED\t12\t1 failed | 99 passed", "benchmarks\tlate\t99\t"]
    (tmp_path / "stages.tsv").write_text("\n".join(lines) + "\n")
    checks = {"date": "today", "machine": {"GPU": "of a test"}, "stages": stages(tmp_path / "stages.tsv")}
    text = page({"sections": {}, "checks": checks}, "gpu")
    assert "Nothing was timed." in text
    assert "`make gpu`, today: GPU of a test." in text
    row = "| operators | values and gradients against float64 | **FAILED** | 12 | 1 failed \\| 99 passed |"
    assert row in text.splitlines()
    assert "| benchmarks | what is measured on this page | **late** | 99 |  |" in text


def test_what_was_checked_joins_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "gpu_facts", lambda: {"GPU": "of a test"})
    (tmp_path / "stages.tsv").write_text("memcheck\tskipped\t0\tthere is no compute-sanitizer\n")
    suite.main_of_device("cuda", gpu.questions(), ["--checks", str(tmp_path), "--out", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.json", "gpu.md"]
    assert "**skipped** | 0 | there is no compute-sanitizer |" in (tmp_path / "out" / "gpu.md").read_text()


def test_every_stage_of_the_script_is_explained():
    script = (FOLDER / "run_gpu.sh").read_text()
    explained = [name for name in PLACEHOLDER.findall(template("gpu_checks")) if name not in ("date", "machine")]
    assert re.findall(r"^stage (\w+)", script, re.MULTILINE) == explained
