// Conformance of the emulator: every instruction of ptx.cuh and hopper.cuh on fixed data, compared with plain
// loops on the host. Data are small integers, so that sums in any order have the same bits. Runs on the
// emulator as one of ctest's tests, and on a GPU:
//
//   nvcc -std=c++17 -O3 --expt-relaxed-constexpr -Icsrc -Icuda_tests -gencode=arch=compute_80,code=compute_80
//       -gencode=arch=compute_90a,code=sm_90a cuda_tests/conformance.cu -o conformance
//   ./conformance gpu.bin
//
// The file receives the raw results, for a bytewise comparison with those of the emulator. Instructions of
// sm_90a are skipped on other GPUs, and the file is then shorter. Exit code 77: no GPU.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "hopper_gemm.cuh"

namespace {

using namespace statecore;
using bf16 = __nv_bfloat16;

// ---- emulator or GPU

enum class Gpu { kNone, kOther, kHopper };
#if defined(STATECORE_EMULATED)
Gpu find_gpu() { return Gpu::kHopper; }
void* allocate(size_t bytes) { return simt::alloc_global(bytes, "conformance"); }
void release(void* data) { simt::free_global(data); }
void upload(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void download(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
#else
void require(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
Gpu find_gpu() {
  int count = 0, major = 0, minor = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return Gpu::kNone;
  require(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  require(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
  return major == 9 && minor == 0 ? Gpu::kHopper : Gpu::kOther;
}
void* allocate(size_t bytes) {
  void* data = nullptr;
  require(cudaMalloc(&data, bytes));
  return data;
}
void release(void* data) { cudaFree(data); }
void upload(void* to, const void* from, size_t bytes) {
  require(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
}
void download(void* to, const void* from, size_t bytes) {
  require(cudaDeviceSynchronize());
  require(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}
#endif

template <class T>
struct DeviceArray {
  T* data;
  size_t count;
  explicit DeviceArray(const std::vector<T>& values)
      : data(static_cast<T*>(allocate(values.size() * sizeof(T)))), count(values.size()) {
    upload(data, values.data(), count * sizeof(T));
  }
  explicit DeviceArray(int count) : DeviceArray(std::vector<T>(size_t(count))) {}  // zeros
  ~DeviceArray() { release(data); }
  std::vector<T> values() const {
    std::vector<T> copy(count);
    download(copy.data(), data, count * sizeof(T));
    return copy;
  }
};

int failures = 0;
std::vector<unsigned char> all_results;

template <class T>
void compare(const std::string& name, const std::vector<T>& result, const std::vector<T>& expected) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(result.data());
  all_results.insert(all_results.end(), bytes, bytes + result.size() * sizeof(T));
  size_t wrong = 0, first = 0;
  for (size_t i = result.size(); i-- > 0;)
    if (std::memcmp(&result[i], &expected[i], sizeof(T)) != 0) ++wrong, first = i;
  if (result.size() == expected.size() && wrong == 0) return;
  ++failures;
  std::printf("FAILED: %s: %zu of %zu differ, first at index %zu\n", name.c_str(), wrong, result.size(),
              first);
}

// ---- data: small integers, which all types represent exactly

// Element i of a matrix, in [-2, 2].
int integer(uint32_t seed, uint32_t i) {
  uint32_t x = i * 0x9e3779b1u + seed * 0x85ebca6bu;
  x = (x ^ x >> 15) * 0x2c1b3c6du;
  return int((x ^ x >> 12) % 5) - 2;
}

template <class T>
T exact(int x) {
  const float value = float(x);
  uint32_t single;
  std::memcpy(&single, &value, 4);
  T result;
  if (sizeof(T) == 4) {
    std::memcpy(&result, &single, 4);
    return result;
  }
  const bool is_bfloat16 = std::is_same<T, bf16>::value;
  if (single & (is_bfloat16 ? 0xffff : 0x1fff))
    throw std::logic_error("the number is not exact in this type");
  const uint32_t magnitude = single & 0x7fffffffu, sign = single >> 16 & 0x8000u;
  const uint16_t bits = is_bfloat16      ? uint16_t(single >> 16)
                        : magnitude == 0 ? uint16_t(sign)
                                         : uint16_t(sign | ((magnitude >> 13) - (112 << 10)));
  std::memcpy(&result, &bits, 2);
  return result;
}

template <class T>
std::vector<T> integers(uint32_t seed, size_t count) {
  std::vector<T> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = exact<T>(integer(seed, uint32_t(i)));
  return values;
}

// a[m, depth] b[depth, n], where a(i, k) and b(k, j) return elements.
template <class Result, class A, class B>
std::vector<Result> product(int m, int n, int depth, const A& a, const B& b) {
  std::vector<Result> sums(size_t(m) * n);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      int sum = 0;
      for (int k = 0; k < depth; ++k) sum += a(i, k) * b(k, j);
      sums[size_t(i) * n + j] = exact<Result>(sum);
    }
  return sums;
}

// ---- ldmatrix
constexpr int kMatrixWords = 1024;  // 4-byte words of shared memory, in rows of 16 bytes

__host__ __device__ constexpr int matrix_row(int lane) { return (lane * 37 + 11) % (kMatrixWords / 4); }

__global__ void ldmatrix_kernel(const uint32_t* in, uint32_t* out) {
  STATECORE_SHARED(uint32_t, words, kMatrixWords);
  const int lane = threadIdx.x;
  for (int i = lane; i < kMatrixWords; i += 32) words[i] = in[i];
  __syncthreads();
  uint32_t plain[4], transposed[4];
  ldmatrix<false>(plain, shared_address(words) + matrix_row(lane) * 16);
  ldmatrix<true>(transposed, shared_address(words) + matrix_row(lane) * 16);
  for (int m = 0; m < 4; ++m) out[lane * 4 + m] = plain[m], out[128 + lane * 4 + m] = transposed[m];
}

std::vector<uint32_t> counted(size_t words) {
  std::vector<uint32_t> values(words);
  for (size_t i = 0; i < words; ++i) values[i] = uint32_t(2 * i) | uint32_t(2 * i + 1) << 16;
  return values;
}

// The 16-bit element of shared memory that half `half` of the lane's register for matrix m holds.
int element(int lane, int m, int half, bool transposed) {
  const int row = transposed ? lane % 4 * 2 + half : lane / 4;
  const int column = transposed ? lane / 4 : lane % 4 * 2 + half;
  return matrix_row(8 * m + row) * 8 + column;
}

void test_ldmatrix() {
  const std::vector<uint32_t> words = counted(kMatrixWords);
  DeviceArray<uint32_t> in(words), out(256);
  launch("ldmatrix", ldmatrix_kernel, {dim3(1), dim3(32)}, nullptr, in.data, out.data);
  std::vector<uint32_t> expected;
  for (bool transposed : {false, true})
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m)
        expected.push_back(uint32_t(element(lane, m, 0, transposed)) |
                           uint32_t(element(lane, m, 1, transposed)) << 16);
  compare("ldmatrix", out.values(), expected);
}

// ---- mma.sync: d[16, 16] = a b from [64, 64] tiles in either layout, zero-filled beyond the valid
// rows and columns
constexpr int kValidDepth = 48, kTileRows = 64;

template <class T, bool kATransposed, bool kBTransposed>
__global__ void mma_kernel(const T* a, const T* b, float* d) {
  STATECORE_DYNAMIC_SHARED(shared);
  using Tile = Tile<T, 64>;
  unsigned char* b_tile = shared + Tile::bytes(kTileRows);
  load_tile<T, kTileRows, 64, 32>(shared, a, 64, kATransposed ? kValidDepth : 16,
                                  kATransposed ? 16 : kValidDepth);
  cp_async_commit();
  load_tile<T, kTileRows, 64, 32>(b_tile, b, 64, kBTransposed ? kValidDepth : 16,
                                  kBTransposed ? 16 : kValidDepth);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  float sums[2][4] = {};
  for (int k = 0; k < 64; k += kMmaK<T>) {
    OperandA<T> left;
    OperandB<T> right[2];
    load_operand<kATransposed>(left, Tile{}, shared, kATransposed ? k : 0, kATransposed ? 0 : k);
    load_operand<kBTransposed>(right, Tile{}, b_tile, kBTransposed ? k : 0, kBTransposed ? 0 : k);
    mma(sums[0], left, right[0]);
    mma(sums[1], left, right[1]);
  }
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i) d[accumulator_row(i) * 16 + 8 * n + accumulator_column(i)] = sums[n][i];
}

template <class T, bool kATransposed, bool kBTransposed>
void test_mma(const std::string& type) {
  DeviceArray<T> a(integers<T>(1, 64 * 64)), b(integers<T>(2, 64 * 64));
  DeviceArray<float> d(256);
  launch("mma", mma_kernel<T, kATransposed, kBTransposed>,
         {dim3(1), dim3(32), size_t(2 * Tile<T, 64>::bytes(kTileRows))}, nullptr, a.data, b.data, d.data);
  const auto left = [](int m, int k) { return integer(1, uint32_t(kATransposed ? k * 64 + m : m * 64 + k)); };
  const auto right = [](int k, int n) {
    return integer(2, uint32_t(kBTransposed ? k * 64 + n : n * 64 + k));
  };
  compare("mma " + type + (kATransposed ? ", a transposed" : "") + (kBTransposed ? ", b transposed" : ""),
          d.values(), product<float>(16, 16, kValidDepth, left, right));
}

template <class T>
void test_mma_layouts(const std::string& type) {
  test_mma<T, false, false>(type);
  test_mma<T, false, true>(type);
  test_mma<T, true, false>(type);
  test_mma<T, true, true>(type);
}

// ---- named barriers: warp 0 waits for numbers of warps 1 and 2, which only arrive; then all wait for warp 0
__global__ void named_barrier_kernel(uint32_t* out) {
  STATECORE_SHARED(uint32_t, numbers, 96);
  const int thread = threadIdx.x;
  if (thread >= 32) {
    numbers[thread] = uint32_t(thread * thread);
    named_barrier_arrive(1, 96);
  } else {
    named_barrier_sync(1, 96);
    numbers[thread] = numbers[thread + 32] + numbers[thread + 64];
  }
  named_barrier_sync(2, 96);
  out[thread] = numbers[thread % 32];
}

void test_named_barriers() {
  DeviceArray<uint32_t> out(96);
  launch("named_barrier", named_barrier_kernel, {dim3(1), dim3(96)}, nullptr, out.data);
  std::vector<uint32_t> expected(96);
  for (uint32_t i = 0; i < 96; ++i)
    expected[i] = (i % 32 + 32) * (i % 32 + 32) + (i % 32 + 64) * (i % 32 + 64);
  compare("named barriers", out.values(), expected);
}

// ---- ex2.approx: the only inputs whose results are exact
__global__ void exp2_kernel(const float* in, float* out) { out[threadIdx.x] = exp2_approx(in[threadIdx.x]); }

void test_exp2() {
  DeviceArray<float> in({0.0f, -0.0f, -INFINITY, INFINITY}), out(4);
  launch("exp2", exp2_kernel, {dim3(1), dim3(4)}, nullptr, in.data, out.data);
  compare("ex2", out.values(), {1.0f, 1.0f, 0.0f, INFINITY});
}

// ---- stmatrix and elect_one
__global__ void stmatrix_kernel(const uint32_t* in, uint32_t* out) {
#if defined(STATECORE_SM90A)
  STATECORE_SHARED(uint32_t, words, 2 * kMatrixWords);
  const int lane = threadIdx.x;
  for (int i = lane; i < 2 * kMatrixWords; i += 32) words[i] = 0;
  __syncthreads();
  uint32_t r[4];
  for (int m = 0; m < 4; ++m) r[m] = in[lane * 4 + m];
  stmatrix<false>(shared_address(words) + matrix_row(lane) * 16, r);
  stmatrix<true>(shared_address(words) + 4 * kMatrixWords + matrix_row(lane) * 16, r);
  __syncthreads();
  for (int i = lane; i < 2 * kMatrixWords; i += 32) out[i] = words[i];
  const uint32_t elected = __ballot_sync(0xffffffffu, elect_one());
  if (lane == 0) out[2 * kMatrixWords] = uint32_t(__popc(elected));
#endif
}

void test_stmatrix() {
  const std::vector<uint32_t> words = counted(128);
  DeviceArray<uint32_t> in(words), out(2 * kMatrixWords + 1);
  launch("stmatrix", stmatrix_kernel, {dim3(1), dim3(32)}, nullptr, in.data, out.data);
  std::vector<uint32_t> expected(2 * kMatrixWords + 1);
  for (bool transposed : {false, true})
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m)
        for (int half = 0; half < 2; ++half) {
          const int at = element(lane, m, half, transposed) + (transposed ? 2 * kMatrixWords : 0);
          expected[size_t(at / 2)] |= (words[size_t(lane * 4 + m)] >> 16 * half & 0xffff) << at % 2 * 16;
        }
  expected.back() = 1;
  compare("stmatrix", out.values(), expected);
}

// ---- TMA and bulk copies: loads a box that extends beyond some edges of the tensor, copies out its layout
// in shared memory, and stores it where it extends beyond other edges
constexpr int kSizes[5] = {88, 6, 3, 4, 2}, kBox[5] = {64, 4, 2, 2, 2};
__host__ __device__ constexpr int load_corner(int i) {
  return i == 0 ? 40 : i == 1 ? -1 : i == 2 ? 1 : i == 3 ? 3 : 0;
}
__host__ __device__ constexpr int store_corner(int i) { return i == 0 ? -8 : i == 1 ? 3 : i == 2 ? -1 : 1; }
constexpr unsigned kBulkBytes = 512;

template <class T, int kRank>
__global__ void tma_kernel(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to,
                           uint32_t bytes, uint32_t* box, const uint32_t* bulk_from, uint32_t* bulk_to) {
#if defined(STATECORE_SM90A)
  STATECORE_DYNAMIC_SHARED(shared);
  STATECORE_SHARED(uint64_t, barrier, 1);
  const uint32_t landed = shared_address(barrier), bulk = shared_address(shared) + bytes;
  if (threadIdx.x == 0) {
    mbarrier_init(landed, 1);
    fence_mbarrier_init();
    prefetch_tensor_map(from);
  }
  __syncthreads();
  int load_at[kRank], store_at[kRank];
#pragma unroll
  for (int i = 0; i < kRank; ++i) {
    load_at[i] = load_corner(i);
    store_at[i] = store_corner(i);
  }
  if (threadIdx.x == 0) {
    mbarrier_expect_tx(landed, kBulkBytes);
    mbarrier_arrive_expect_tx(landed, bytes);
    tma_load(shared_address(shared), from, load_at, landed);
    bulk_load(bulk, bulk_from, kBulkBytes, landed);
  }
  mbarrier_wait(landed, 0);
  for (uint32_t i = threadIdx.x; i < bytes / 4; i += 32)
    box[i] = reinterpret_cast<const uint32_t*>(shared)[i];
  if (threadIdx.x == 0) {
    tma_store(to, store_at, shared_address(shared));
    bulk_commit();
    bulk_store(bulk_to, bulk, kBulkBytes);
    bulk_commit();
    bulk_wait_read<1>();
    bulk_wait<0>();
  }
#endif
}

// The tensors of one test: the loaded and the stored one have the same shape, with padding between rows.
template <class T, int kRank>
struct BoxCase {
  int64_t sizes[kRank], strides[kRank - 1];
  int box[kRank];
  int elements, box_elements = 1, box_rows = 1;
  bool swizzled;

  explicit BoxCase(bool swizzled) : swizzled(swizzled) {
    constexpr int kPad = 8;
    elements = kSizes[0] + kPad;
    for (int i = 0; i < kRank; ++i) {
      sizes[i] = kSizes[i];
      box[i] = i == 0 ? 128 / int(sizeof(T)) : kBox[i];
      box_elements *= box[i];
      if (i > 0) strides[i - 1] = elements, elements *= kSizes[i], box_rows *= kBox[i];
    }
  }

  TensorMap map(const T* data) const { return make_tensor_map(data, sizes, strides, box, swizzled); }

  // The offset in the tensor of element (row, column) of a box at corner(), or -1 if it is out of bounds.
  template <class Corner>
  int64_t offset(int row, int column, const Corner& corner) const {
    int64_t at = column + corner(0);
    bool inside = at >= 0 && at < sizes[0];
    for (int i = 1, rest = row; i < kRank; rest /= kBox[i], ++i) {
      const int64_t coordinate = rest % kBox[i] + corner(i);
      inside &= coordinate >= 0 && coordinate < sizes[i];
      at += coordinate * strides[i - 1];
    }
    return inside ? at : -1;
  }

  // The index in shared memory of element (row, column) of the box.
  size_t shared_index(int row, int column) const {
    const int per_vector = 16 / int(sizeof(T)), vector = column / per_vector ^ (swizzled ? row % 8 : 0);
    return size_t(row * box[0] + vector * per_vector + column % per_vector);
  }
};

template <class T, int kRank>
void test_tma(const std::string& type, bool swizzled) {
  const BoxCase<T, kRank> c(swizzled);
  std::vector<T> values(size_t(c.elements), T{});
  for (int i = 0; i < c.elements; ++i) values[size_t(i)] = exact<T>(i % 251);
  const std::vector<T> untouched(size_t(c.elements), exact<T>(-1));
  DeviceArray<T> from(values), to(untouched), result(c.box_elements);
  DeviceArray<uint32_t> bulk_from(counted(kBulkBytes / 4)), bulk_to(kBulkBytes / 4);
  const uint32_t bytes = uint32_t(c.box_elements * sizeof(T));
  launch("tma", tma_kernel<T, kRank>, {dim3(1), dim3(32), bytes + kBulkBytes}, nullptr, c.map(from.data),
         c.map(to.data), bytes, reinterpret_cast<uint32_t*>(result.data), bulk_from.data, bulk_to.data);

  std::vector<T> loaded(size_t(c.box_elements), T{}), stored = untouched;
  for (int row = 0; row < c.box_rows; ++row)
    for (int column = 0; column < c.box[0]; ++column) {
      const int64_t load_at = c.offset(row, column, load_corner),
                    store_at = c.offset(row, column, store_corner);
      const T value = load_at >= 0 ? values[size_t(load_at)] : exact<T>(0);
      loaded[c.shared_index(row, column)] = value;
      if (store_at >= 0) stored[size_t(store_at)] = value;
    }
  const std::string name =
      "TMA, rank " + std::to_string(kRank) + ", " + type + (swizzled ? ", swizzled" : "");
  compare(name + ", load", result.values(), loaded);
  compare(name + ", store", to.values(), stored);
  compare(name + ", bulk copy", bulk_to.values(), bulk_from.values());
}

// ---- wgmma: d[64, n] = a[64, 64] b[64, n], with a in shared memory or in registers
template <class T, int kN, Major kA, Major kB, bool kARegisters>
__global__ void __launch_bounds__(128) wgmma_kernel(const T* a, const T* b, float* d) {
#if defined(STATECORE_SM90A)
  STATECORE_DYNAMIC_SHARED(shared);
  using Panel = Tile<T, 64>;
  constexpr int kPanelBytes = Panel::bytes(64), kWidth = (kN + 63) / 64 * 64;
  unsigned char* b_panels = shared + kPanelBytes;
  for (int i = threadIdx.x; i < 64 * 64; i += 128)
    *reinterpret_cast<T*>(shared + Panel::offset(i / 64, i % 64)) = a[i];
  // K-major: one panel of n rows. MN-major: one panel per 64 columns.
  for (int i = threadIdx.x; i < 64 * kWidth; i += 128) {
    const int row = kB == Major::kK ? i / 64 : i % 4096 / 64, panel = kB == Major::kK ? 0 : i / 4096;
    *reinterpret_cast<T*>(b_panels + panel * kPanelBytes + Panel::offset(row, i % 64)) = b[i];
  }
  fence_proxy_async();
  __syncthreads();

  const uint32_t left = shared_address(shared), right = shared_address(b_panels);
  float sums[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) sums[i] = 1000;
  OperandA<T> registers[4];
  if constexpr (kARegisters)
#pragma unroll
    for (int k = 0; k < 4; ++k)
      load_operand<false>(registers[k], Panel{}, shared, int(threadIdx.x) / 32 * 16, 16 * k);
  wgmma_fence_operand(sums);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 64; k += 16) {
    const uint64_t b_descriptor = kB == Major::kK ? k_major_descriptor(right, kPanelBytes, 0, k)
                                                  : mn_major_descriptor(right, kPanelBytes, 0, k);
    if constexpr (kARegisters)
      wgmma<T, kN, kB>(sums, registers[k / 16].r, b_descriptor, k > 0);
    else
      wgmma<T, kN, kA, kB>(sums,
                           kA == Major::kK ? k_major_descriptor(left, kPanelBytes, 0, k)
                                           : mn_major_descriptor(left, kPanelBytes, 0, k),
                           b_descriptor, k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_fence_operand(sums);
  const int row = int(threadIdx.x) / 32 * 16;
#pragma unroll
  for (int i = 0; i < kN / 2; ++i)
    d[(row + accumulator_row(i % 4)) * kN + i / 4 * 8 + accumulator_column(i % 4)] = sums[i];
#endif
}

template <class T, int kN, Major kA, Major kB, bool kARegisters>
void test_wgmma(const std::string& type) {
  constexpr int kWidth = (kN + 63) / 64 * 64;
  DeviceArray<T> a(integers<T>(3, 64 * 64)), b(integers<T>(4, size_t(64 * kWidth)));
  DeviceArray<float> d(64 * kN);
  launch("wgmma", wgmma_kernel<T, kN, kA, kB, kARegisters>, {dim3(1), dim3(128), size_t(64 + kWidth) * 128},
         nullptr, a.data, b.data, d.data);
  const auto left = [](int m, int k) {
    return integer(3, uint32_t(kA == Major::kK ? m * 64 + k : k * 64 + m));
  };
  const auto right = [](int k, int n) {
    return integer(4, uint32_t(kB == Major::kK ? n * 64 + k : n / 64 * 4096 + k * 64 + n % 64));
  };
  compare("wgmma " + type + ", n = " + std::to_string(kN) + (kARegisters ? ", a in registers" : "") +
              (kA == Major::kMN ? ", a MN-major" : "") + (kB == Major::kMN ? ", b MN-major" : ""),
          d.values(), product<float>(64, kN, 64, left, right));
}

template <class T, int kN>
void test_wgmma_layouts(const std::string& type) {
  test_wgmma<T, kN, Major::kK, Major::kK, false>(type);
  test_wgmma<T, kN, Major::kMN, Major::kMN, false>(type);
  test_wgmma<T, kN, Major::kK, Major::kMN, true>(type);
}

template <class T, hopper_gemm::Operands kOperands>
void test_gemm(const std::string& type) {
  using hopper_gemm::kM;
  using hopper_gemm::kN;
  using hopper_gemm::Operands;
  constexpr int kDepth = 200, kRows = 50;
  DeviceArray<T> a(integers<T>(5, kM * kDepth)), b(integers<T>(6, kN * kDepth));
  DeviceArray<T> c(kRows * kN);
  hopper_gemm::run<T, kOperands>(a.data, b.data, c.data, kDepth, kRows, nullptr);
  const auto left = [](int m, int k) {
    return integer(5, uint32_t(hopper_gemm::kAMnMajor<kOperands> ? k * kM + m : m * kDepth + k));
  };
  const auto right = [](int k, int n) {
    return integer(6, uint32_t(hopper_gemm::kBMnMajor<kOperands> ? k * kN + n : n * kDepth + k));
  };
  compare("gemm " + type + ", operands " + std::to_string(int(kOperands)), c.values(),
          product<T>(kRows, kN, kDepth, left, right));
}

void test_hopper() {
  using hopper_gemm::Operands;
  test_stmatrix();
  for (bool swizzled : {false, true}) {
    test_tma<bf16, 2>("bfloat16", swizzled);
    test_tma<__half, 3>("float16", swizzled);
    test_tma<bf16, 4>("bfloat16", swizzled);
    test_tma<bf16, 5>("bfloat16", swizzled);
    test_tma<float, 3>("float32", swizzled);
  }
  test_wgmma_layouts<bf16, 8>("bfloat16");
  test_wgmma_layouts<bf16, 16>("bfloat16");
  test_wgmma_layouts<bf16, 32>("bfloat16");
  test_wgmma_layouts<bf16, 64>("bfloat16");
  test_wgmma_layouts<bf16, 96>("bfloat16");
  test_wgmma_layouts<bf16, 128>("bfloat16");
  test_wgmma_layouts<bf16, 160>("bfloat16");
  test_wgmma_layouts<bf16, 192>("bfloat16");
  test_wgmma_layouts<bf16, 224>("bfloat16");
  test_wgmma_layouts<bf16, 256>("bfloat16");
  test_wgmma_layouts<__half, 64>("float16");
  test_wgmma_layouts<__half, 128>("float16");
  test_wgmma<bf16, 128, Major::kMN, Major::kK, false>("bfloat16");
  test_wgmma<bf16, 128, Major::kK, Major::kMN, false>("bfloat16");
  test_wgmma<bf16, 128, Major::kK, Major::kK, true>("bfloat16");
  test_gemm<__half, Operands::kKMajor>("float16");
  test_gemm<__half, Operands::kMnMajor>("float16");
  test_gemm<__half, Operands::kARegisters>("float16");
  test_gemm<__half, Operands::kAStored>("float16");
  test_gemm<bf16, Operands::kKMajor>("bfloat16");
}

}  // namespace

int main(int argc, char** argv) {
  const Gpu gpu = find_gpu();
  if (gpu == Gpu::kNone) return std::puts("no GPU"), 77;
  test_ldmatrix();
  test_mma_layouts<bf16>("bfloat16");
  test_mma_layouts<__half>("float16");
  test_mma_layouts<float>("float32");
  test_named_barriers();
  test_exp2();
  if (gpu == Gpu::kHopper)
    test_hopper();
  else
    std::puts("not an sm_90 GPU: skipped TMA, mbarriers, wgmma and stmatrix");
  if (argc > 1) {
    std::FILE* file = std::fopen(argv[1], "wb");
    if (!file || std::fwrite(all_results.data(), 1, all_results.size(), file) != all_results.size())
      return std::perror(argv[1]), 1;
    std::fclose(file);
  }
  std::printf("%zu bytes of results, %d failures\n", all_results.size(), failures);
  return failures != 0;
}
