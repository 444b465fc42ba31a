"""kernel_gate.py must report every planted defect of compiled kernels."""

import subprocess
import sys
from pathlib import Path

import pytest

GATE = Path(__file__).resolve().parents[1] / "cuda_tests" / "kernel_gate.py"

KERNELS = r"""
template <int kValues>
__global__ void copies(float4* to, const float4* from) {
  float4 held[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) held[i] = from[threadIdx.x + 32 * i];
#pragma unroll
  for (int i = 0; i < kValues; ++i) to[threadIdx.x + 32 * i] = held[i];
}
template __global__ void copies<2>(float4*, const float4*);
template __global__ void copies<4>(float4*, const float4*);

__global__ void __launch_bounds__(1024) spills(float* x) {  // 128 values in at most 64 registers
  float held[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) held[i] = x[threadIdx.x + i * 1024];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; ++i) x[threadIdx.x * 128 + i] = held[i];
}

__global__ void keeps_a_stack(float* x, const int* at) {  // an array with dynamic indices
  float held[16];
  for (int i = 0; i < 16; ++i) held[i] = x[i];
  for (int i = 0; i < 16; ++i) held[at[i]] += held[at[i + 1]];
  for (int i = 0; i < 16; ++i) x[i] = held[i];
}

__global__ void adds_in_any_order(float* x) { atomicAdd(x, float(threadIdx.x)); }

__global__ void unexpected(float* x) { *x = 1; }

__global__ void __launch_bounds__(128) waits_for_wgmma(float* x, unsigned long long a, unsigned long long b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  float d[4] = {};
  asm volatile("wgmma.fence.sync.aligned;");
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
  asm volatile("wgmma.commit_group.sync.aligned;");
  d[0] += 1;  // before wgmma.wait_group
  asm volatile("wgmma.wait_group.sync.aligned 0;");
  for (int i = 0; i < 4; ++i) x[threadIdx.x * 4 + i] = d[i];
#endif
}

__global__ void idle(float*) {}
"""

EXPECTED = """
[planted]
"copies<2>" = { "LDG.128" = 2, "STG.128" = "2.." }
"copies<*>" = { sm_80 = { "LDG.128" = "..3" }, sm_90a = { "LDG.128" = "2..4" } }
"spills" = {}
"keeps_a_stack" = {}
"adds_in_any_order" = {}
"waits_for_wgmma" = { HGMMA = 1 }
"gone" = {}
"""


@pytest.fixture(scope="module")
def gate(tmp_path_factory) -> subprocess.CompletedProcess:
    folder = tmp_path_factory.mktemp("gate")
    (folder / "planted.cu").write_text(KERNELS)
    (folder / "expected.toml").write_text(EXPECTED)
    command = [sys.executable, GATE, "--folder", folder / "built", "--expected", folder / "expected.toml"]
    result = subprocess.run([*command, folder / "planted.cu"], capture_output=True, text=True, check=False)
    if result.returncode == 77:
        pytest.skip(result.stdout)
    return result


def test_what_costs_time_fails(gate):
    assert gate.returncode == 1, gate.stdout + gate.stderr
    for gpu in ("sm_80", "sm_90a"):
        assert f"planted: spills for {gpu}: " in gate.stdout
        assert f"planted: keeps_a_stack for {gpu}: 64 bytes of stack frame" in gate.stdout
    assert "planted: waits_for_wgmma for sm_90a: ptxas info    : (C75" in gate.stdout
    assert "planted: waits_for_wgmma for sm_80" not in gate.stdout


def test_other_instructions_than_expected_fail(gate):
    if "there is no nvdisasm" in gate.stdout:
        pytest.skip("no nvdisasm")
    assert "planted: copies<2>" not in gate.stdout
    assert "planted: copies<4> for sm_80: LDG.128 4 times instead of ..3" in gate.stdout
    assert "planted: copies<4> for sm_90a" not in gate.stdout
    assert "planted: unexpected for sm_80: no entry in expected_instructions.toml" in gate.stdout
    assert "planted: adds_in_any_order for sm_80: RED" in gate.stdout
    assert 'planted: "gone" in expected_instructions.toml fits no kernel' in gate.stdout
    assert "planted: idle does nothing on any GPU" in gate.stdout
