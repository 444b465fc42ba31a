// Matrix products of a warp, and the loads and stores of their operands. Registers of a lane hold the
// elements that the PTX manual says.

#include <cstring>

#include "simt/block.h"
#include "simt/instructions.h"

namespace simt {
namespace {

constexpr char kMma[] = "mma.sync", kTf32[] = "mma.sync of tf32", kLoad[] = "ldmatrix", kStore[] = "stmatrix";
constexpr uint32_t kAllLanes = 0xffffffffu;

struct MmaArgument {
  Half half;
  float* d;
  const uint32_t *a, *b;
};

const MmaArgument& argument_of(const Meeting& meeting, int lane) {
  return *static_cast<const MmaArgument*>(meeting.argument[lane]);
}

using Row = float __attribute__((vector_size(32)));  // eight columns: as wide as the host can

// d [16, 8] += a [16, depth] b [depth, 8]; each lane has two rows and two columns of d.
template <int kDepth>
void accumulate(const Meeting& meeting, const float (&a)[16][kDepth], const Row (&b)[kDepth]) {
  ++counters().mma;
  Row sums[16];
  for (int row = 0; row < 16; ++row) {
    Row sum{};
    for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k];
    sums[row] = sum;
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = argument_of(meeting, lane).d;
    for (int i = 0; i < 4; ++i) d[i] += sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace

void mma_m16n8k16(Half half, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const Where& where) {
  MmaArgument argument{half, d, a, b};
  meet(kMma, kAllLanes, &argument, where, [](const Meeting& meeting) {
    float left[16][16];
    Row right[16];
    const Half half = argument_of(meeting, 0).half;
    for (int lane = 0; lane < 32; ++lane) {
      const MmaArgument& x = argument_of(meeting, lane);
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) widen(half, x.a[i], &left[group + i % 2 * 8][pair + i / 2 * 8], 1);
      for (int i = 0; i < 2; ++i)
        widen(half, x.b[i], reinterpret_cast<float*>(&right[pair + i * 8]) + group, 8);
    }
    accumulate(meeting, left, right);
  });
}

// The low 13 bits of an operand are not looked at.
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Where& where) {
  MmaArgument argument{Half::kBFloat16, d, a, b};
  meet(kTf32, kAllLanes, &argument, where, [](const Meeting& meeting) {
    const auto tf32 = [](uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); };
    float left[16][8];
    Row right[8];
    for (int lane = 0; lane < 32; ++lane) {
      const MmaArgument& x = argument_of(meeting, lane);
      for (int i = 0; i < 4; ++i) left[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = tf32(x.a[i]);
      for (int i = 0; i < 2; ++i) right[lane % 4 + i * 4][lane / 4] = tf32(x.b[i]);
    }
    accumulate(meeting, left, right);
  });
}

namespace {

struct MatrixArgument {
  int matrices;
  bool transposed;
  uint32_t* registers;
  uint32_t row_address;
};

// f(matrix, its rows of 8 elements in shared memory)
template <class F>
void for_each_matrix(const Meeting& meeting, const F& f) {
  const int matrices = static_cast<MatrixArgument*>(meeting.argument[0])->matrices;
  for (int m = 0; m < matrices; ++m) {
    uint16_t* rows[8];
    uint32_t banks = 0;  // of 16 bytes
    ++counters().ldmatrix;
    for (int r = 0; r < 8; ++r) {
      const int lane = 8 * m + r;
      const uint32_t address = static_cast<MatrixArgument*>(meeting.argument[lane])->row_address;
      rows[r] = reinterpret_cast<uint16_t*>(at_address(address, 16, 16, meeting.where));
      counters().ldmatrix_conflicts += banks >> address / 16 % 8 & 1;
      banks |= 1u << address / 16 % 8;
    }
    f(m, rows);
  }
}

}  // namespace

void ldmatrix(int matrices, bool transposed, uint32_t* registers, uint32_t row_address, const Where& where) {
  MatrixArgument argument{matrices, transposed, registers, row_address};
  meet(kLoad, kAllLanes, &argument, where, [](const Meeting& meeting) {
    for_each_matrix(meeting, [&](int m, uint16_t* const* rows) {
      for (int r = 0; r < 8; ++r)
        check_read(*meeting.thread[8 * m + r],
                   static_cast<MatrixArgument*>(meeting.argument[8 * m + r])->row_address, 16, meeting.where);
      for (int lane = 0; lane < 32; ++lane) {
        const MatrixArgument& x = *static_cast<MatrixArgument*>(meeting.argument[lane]);
        const int row = lane / 4, column = lane % 4 * 2;
        const uint32_t low = x.transposed ? rows[column][row] : rows[row][column];
        const uint32_t high = x.transposed ? rows[column + 1][row] : rows[row][column + 1];
        x.registers[m] = low | high << 16;
      }
    });
  });
}

void stmatrix(int matrices, bool transposed, const uint32_t* registers, uint32_t row_address,
              const Where& where) {
  MatrixArgument argument{matrices, transposed, const_cast<uint32_t*>(registers), row_address};
  meet(kStore, kAllLanes, &argument, where, [](const Meeting& meeting) {
    for_each_matrix(meeting, [&](int m, uint16_t* const* rows) {
      for (int r = 0; r < 8; ++r)
        check_write(*meeting.thread[8 * m + r],
                    static_cast<MatrixArgument*>(meeting.argument[8 * m + r])->row_address, 16,
                    meeting.where);
      for (int lane = 0; lane < 32; ++lane) {
        const MatrixArgument& x = *static_cast<MatrixArgument*>(meeting.argument[lane]);
        const int row = lane / 4, column = lane % 4 * 2;
        (x.transposed ? rows[column][row] : rows[row][column]) = uint16_t(x.registers[m]);
        (x.transposed ? rows[column + 1][row] : rows[row][column + 1]) = uint16_t(x.registers[m] >> 16);
      }
    });
  });
}

}  // namespace simt
