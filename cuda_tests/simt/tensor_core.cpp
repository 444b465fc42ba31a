// mma.sync, ldmatrix and stmatrix, with the register layouts of the PTX manual.

#include <cstring>

#include "simt/block.h"
#include "simt/instructions.h"

namespace simt {
namespace {

constexpr char kMma[] = "mma.sync", kMmaTf32[] = "mma.sync of tf32", kLdmatrix[] = "ldmatrix",
               kStmatrix[] = "stmatrix";
constexpr uint32_t kAllLanes = 0xffffffffu;

struct MmaArgument {
  HalfType type;
  float* d;
  const uint32_t *a, *b;
};

const MmaArgument& argument_of(const Collective& collective, int lane) {
  return *static_cast<const MmaArgument*>(collective.argument[lane]);
}

using Row = float __attribute__((vector_size(32)));  // eight columns

// d[16, 8] += a[16, kDepth] b[kDepth, 8]; each lane holds two rows and two columns of d.
template <int kDepth>
void accumulate(const Collective& collective, const float (&a)[16][kDepth], const Row (&b)[kDepth]) {
  ++counters().mma;
  Row sums[16];
  for (int row = 0; row < 16; ++row) {
    Row sum{};
    for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k];
    sums[row] = sum;
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = argument_of(collective, lane).d;
    for (int i = 0; i < 4; ++i) d[i] += sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace

void mma_m16n8k16(HalfType type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const Where& where) {
  MmaArgument argument{type, d, a, b};
  run_collective(kMma, kAllLanes, &argument, where, [](const Collective& collective) {
    float left[16][16];
    Row right[16];
    const HalfType type = argument_of(collective, 0).type;
    for (int lane = 0; lane < 32; ++lane) {
      const MmaArgument& x = argument_of(collective, lane);
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) unpack_pair(type, x.a[i], &left[group + i % 2 * 8][pair + i / 2 * 8], 1);
      for (int i = 0; i < 2; ++i)
        unpack_pair(type, x.b[i], reinterpret_cast<float*>(&right[pair + i * 8]) + group, 8);
    }
    accumulate(collective, left, right);
  });
}

// Tensor cores ignore the low 13 bits of an operand.
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Where& where) {
  MmaArgument argument{HalfType::kBFloat16, d, a, b};
  run_collective(kMmaTf32, kAllLanes, &argument, where, [](const Collective& collective) {
    const auto tf32 = [](uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); };
    float left[16][8];
    Row right[8];
    for (int lane = 0; lane < 32; ++lane) {
      const MmaArgument& x = argument_of(collective, lane);
      for (int i = 0; i < 4; ++i) left[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = tf32(x.a[i]);
      for (int i = 0; i < 2; ++i) right[lane % 4 + i * 4][lane / 4] = tf32(x.b[i]);
    }
    accumulate(collective, left, right);
  });
}

namespace {

struct MatrixArgument {
  int matrices;
  bool transposed;
  uint32_t* registers;
  uint32_t row_address;
};

// f(matrix, pointers to its rows of 8 elements)
template <class F>
void for_each_matrix(const Collective& collective, const F& f) {
  const int matrices = static_cast<MatrixArgument*>(collective.argument[0])->matrices;
  for (int m = 0; m < matrices; ++m) {
    uint16_t* rows[8];
    uint32_t banks = 0;  // those in use, in units of 16 bytes
    ++counters().ldmatrix;
    for (int r = 0; r < 8; ++r) {
      const int lane = 8 * m + r;
      const uint32_t address = static_cast<MatrixArgument*>(collective.argument[lane])->row_address;
      rows[r] = reinterpret_cast<uint16_t*>(shared_pointer(address, 16, 16, collective.where));
      counters().ldmatrix_conflicts += banks >> address / 16 % 8 & 1;
      banks |= 1u << address / 16 % 8;
    }
    f(m, rows);
  }
}

}  // namespace

void ldmatrix(int matrices, bool transposed, uint32_t* registers, uint32_t row_address, const Where& where) {
  MatrixArgument argument{matrices, transposed, registers, row_address};
  run_collective(kLdmatrix, kAllLanes, &argument, where, [](const Collective& collective) {
    for_each_matrix(collective, [&](int m, uint16_t* const* rows) {
      for (int r = 0; r < 8; ++r)
        check_read(*collective.thread[8 * m + r],
                   static_cast<MatrixArgument*>(collective.argument[8 * m + r])->row_address, 16,
                   collective.where);
      for (int lane = 0; lane < 32; ++lane) {
        const MatrixArgument& x = *static_cast<MatrixArgument*>(collective.argument[lane]);
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
  run_collective(kStmatrix, kAllLanes, &argument, where, [](const Collective& collective) {
    for_each_matrix(collective, [&](int m, uint16_t* const* rows) {
      for (int r = 0; r < 8; ++r)
        check_write(*collective.thread[8 * m + r],
                    static_cast<MatrixArgument*>(collective.argument[8 * m + r])->row_address, 16,
                    collective.where);
      for (int lane = 0; lane < 32; ++lane) {
        const MatrixArgument& x = *static_cast<MatrixArgument*>(collective.argument[lane]);
        const int row = lane / 4, column = lane % 4 * 2;
        (x.transposed ? rows[column][row] : rows[row][column]) = uint16_t(x.registers[m]);
        (x.transposed ? rows[column + 1][row] : rows[row][column + 1]) = uint16_t(x.registers[m] >> 16);
      }
    });
  });
}

}  // namespace simt
