"""The machine's own floating-point peak, measured by a small C++ program that is compiled when it is needed."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu_peak.cpp")
MISSING = {"bfloat16": "this processor has no avx512_bf16, so it has no bfloat16 peak"}


class NoPeak(Exception):
    """Why there is no peak to compare with, in a sentence."""


@functools.cache
def peaks(threads: int) -> dict[str, float]:
    """Operations a second by dtype name, of so many threads at once; a dtype that the processor lacks is not in it."""
    compiler = shutil.which("c++")
    if compiler is None:
        raise NoPeak("there is no C++ compiler (c++) to build the measurement of the peak")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / SOURCE.stem
        build = subprocess.run(
            [compiler, "-std=c++17", "-O3", "-march=native", "-pthread", SOURCE, "-o", program],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if build.returncode:
            errors = [line for line in build.stderr.splitlines() if "error" in line]
            raise NoPeak(f"{SOURCE.name} does not compile here: {(errors or ['no message'])[0]}")
        lines = subprocess.run([program, str(threads)], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: float(rate) for name, rate in (line.split() for line in lines)}


def peak(dtype: str, threads: int) -> float:
    """Operations a second; raises NoPeak where it cannot be measured."""
    found = peaks(threads)
    if dtype not in found:
        raise NoPeak(MISSING.get(dtype, f"there is no peak of {dtype}"))
    return found[dtype]
