// Argument checks shared by the operators. A message names the argument, what was expected and what was
// passed, and reaches Python as a RuntimeError.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/heads_view.h"

namespace statecore {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message << "statecore: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << ")";
  return text.str();
}

inline std::string shape_text(std::initializer_list<int64_t> sizes) {
  std::ostringstream text;
  text << "(";
  const char* separator = "";
  for (int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << ")";
  return text.str();
}

inline const char* dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline void check_dim(const char* name, const Tensor& t, int64_t dim, const char* layout) {
  if (t.dim() != dim) refuse(name, " must have ", dim, " dimensions ", layout, ", got shape ", shape_text(t));
}

inline void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> expected) {
  bool equal = t.dim() == int64_t(expected.size());
  int64_t d = 0;
  for (int64_t size : expected) equal = equal && t.size(d++) == size;
  if (!equal) refuse(name, " must have shape ", shape_text(expected), ", got ", shape_text(t));
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType expected) {
  if (t.scalar_type() != expected)
    refuse(name, " must be ", dtype_text(expected), ", got ", dtype_text(t.scalar_type()));
}

inline void check_same_device(const char* name, const Tensor& t, const Tensor& q) {
  if (t.device() != q.device()) refuse(name, " must be on the same device as q");
}

inline void check_last_contiguous(const char* name, const Tensor& t) {
  if (t.dim() > 0 && t.size(-1) > 1 && t.stride(-1) != 1)
    refuse(name, " must have stride 1 in its last dimension, got stride ", t.stride(-1),
           "; call .contiguous() on it first");
}

inline void check_contiguous(const char* name, const Tensor& t) {
  if (!t.is_contiguous()) refuse(name, " must be contiguous; call .contiguous() on it first");
}

// Whether to validate the contents of t: always on the CPU. On CUDA that would synchronise, so only with
// STATECORE_CHECK=1.
inline bool checks_contents([[maybe_unused]] const Tensor& t) {
#if !defined(STATECORE_EMULATED)
  if (t.is_cpu()) return true;
#endif
  static const char* const setting = std::getenv("STATECORE_CHECK");
  return setting && std::string(setting) == "1";
}

inline Tensor on_cpu(const Tensor& t) {
  return t.is_cpu() ? t : torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// The dtype that q, k and v share: float32, bfloat16, float16 or float64 (CPU only).
inline DType element_dtype(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: refuse("q must be float32, bfloat16, float16 or float64, got ", dtype_text(q.scalar_type()));
  }
}

inline ScalarType state_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// x [B, T, H, D], whose last dimension check_last_contiguous() has accepted.
inline HeadsView heads_view(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

inline const int32_t* int32_data(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }

// Checks cu_seqlens [N + 1] of packed q [1, T, ...] and returns N, the number of sequences.
inline int64_t check_cu_seqlens(const Tensor& cu_seqlens, const Tensor& q) {
  check_dim("cu_seqlens", cu_seqlens, 1, "[sequences + 1]");
  check_dtype("cu_seqlens", cu_seqlens, ScalarType::Int);
  check_same_device("cu_seqlens", cu_seqlens, q);
  check_contiguous("cu_seqlens", cu_seqlens);
  if (q.size(0) != 1) refuse("cu_seqlens needs q of batch size 1, got ", q.size(0));
  const int64_t sequences = cu_seqlens.size(0) - 1;
  if (sequences < 0) refuse("cu_seqlens must have at least one element, got shape ", shape_text(cu_seqlens));
  if (!checks_contents(cu_seqlens)) return sequences;
  const Tensor offsets = on_cpu(cu_seqlens);
  const int32_t* offset = int32_data(offsets);
  if (offset[0] != 0) refuse("cu_seqlens must start with 0, got ", offset[0]);
  for (int64_t n = 0; n < sequences; ++n)
    if (offset[n] > offset[n + 1])
      refuse("cu_seqlens must not decrease, got ", offset[n], " then ", offset[n + 1], " at position ",
             n + 1);
  if (offset[sequences] != q.size(1))
    refuse("cu_seqlens must end with the number of tokens, ", q.size(1), ", got ", offset[sequences]);
  return sequences;
}

// Checks step_ids [B, T]: every id is >= 0, or -1 for padding, and ids other than -1 do not decrease within a
// sequence. cu_seqlens must have been checked.
inline void check_step_ids(const Tensor& step_ids, const std::optional<Tensor>& cu_seqlens, const Tensor& q,
                           int64_t batch, int64_t tokens) {
  check_shape("step_ids", step_ids, {batch, tokens});
  check_dtype("step_ids", step_ids, ScalarType::Int);
  check_same_device("step_ids", step_ids, q);
  check_last_contiguous("step_ids", step_ids);
  if (!checks_contents(step_ids)) return;
  const Tensor all_ids = on_cpu(step_ids);
  const Tensor offsets = cu_seqlens ? on_cpu(*cu_seqlens) : Tensor();
  const int32_t* next_start = nullptr;
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* ids = int32_data(all_ids) + b * all_ids.stride(0);
    if (cu_seqlens) next_start = int32_data(offsets);
    int32_t last = -1;
    for (int64_t t = 0; t < tokens; ++t) {
      for (; next_start && *next_start == t; ++next_start) last = -1;
      if (ids[t] < -1)
        refuse("step_ids must be >= 0, or -1 for padding, got ", ids[t], " at [", b, ", ", t, "]");
      if (ids[t] != -1 && ids[t] < last)
        refuse("step_ids must not decrease inside a sequence, got ", ids[t], " after ", last, " at [", b,
               ", ", t, "]");
      if (ids[t] != -1) last = ids[t];
    }
  }
}

}  // namespace statecore
