// Host code shared by the CPU and CUDA implementations of the option-A shortcut: checks, layouts, allocation.
//
//   shortcut(x)[n, k, p, q] = k < C ? x[n, k, p * stride, q * stride] : 0
//
// x and dx [N, C, H, W] are accessed through their strides. All tensors of the output's shape [N, K, P, Q] are dense,
// in NCHW or NHWC order. A device implements `gather` (forward) and `scatter` (backward, the transpose of gather).

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <tuple>
#include <type_traits>

#if defined(__CUDACC__)
#define FASTRES_HD __host__ __device__
#else
#define FASTRES_HD
#endif

namespace fastres {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Problem {
  int64_t N, C, H, W;
  int64_t K, P, Q;
  int64_t stride;
  int64_t sN, sC, sH, sW;  // element strides of x or dx
  bool channels_last;      // order of the dense [N, K, P, Q] tensors
};

// Elements are handled as integers of the same size: copies need nothing else, and integer loops vectorise well.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <class To, class From>
FASTRES_HD inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Whether relu passes the gradient at an output with the bits `out`. As in torch's threshold_backward this is true
// unless out <= 0, so it is true for NaN. As a signed integer, a positive number or positive NaN is greater than 0. As
// an unsigned integer, a negative NaN is greater than negative infinity.
template <class T>
FASTRES_HD constexpr bool passes(Bits<T> out) {
  constexpr int mantissa = sizeof(T) == 8 ? 52 : sizeof(T) == 4 ? 23 : std::is_same_v<T, Half> ? 10 : 7;
  constexpr Bits<T> negative_infinity = static_cast<Bits<T>>(~uint64_t{0} << mantissa);
  return static_cast<std::make_signed_t<Bits<T>>>(out) > 0 || out > negative_infinity;
}

// value where relu passes `out`, else +0; without a branch.
template <class T>
FASTRES_HD constexpr Bits<T> masked(Bits<T> value, Bits<T> out) {
  return static_cast<Bits<T>>(value & -static_cast<Bits<T>>(passes<T>(out)));
}

template <class T>
FASTRES_HD constexpr Bits<T> relu(Bits<T> y) {
  return masked<T>(y, y);
}

// relu(y + x). 16-bit types are added in float and rounded once.
template <class T>
FASTRES_HD inline Bits<T> add_relu(Bits<T> y, Bits<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const auto widen = [](uint16_t b) { return bits_as<float>(static_cast<uint32_t>(b) << 16); };
    const uint32_t sum = bits_as<uint32_t>(widen(y) + widen(x));
    const bool nan = (sum & 0x7FFFFFFFu) > 0x7F800000u;  // rounding must not carry a NaN into infinity
    return relu<T>(nan ? 0x7FC0 : static_cast<uint16_t>((sum + 0x7FFFu + ((sum >> 16) & 1u)) >> 16));
  } else if constexpr (std::is_same_v<T, Half>) {
    const Half sum(static_cast<float>(Half(y, Half::from_bits())) + static_cast<float>(Half(x, Half::from_bits())));
    return relu<T>(sum.x);
  } else {
    return relu<T>(bits_as<Bits<T>>(bits_as<T>(y) + bits_as<T>(x)));
  }
}

// Whether ATen's suggest_memory_format() is channels_last.
inline bool is_channels_last(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  if (strides[1] == 0) return false;
  int64_t least = 0;
  for (int d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || strides[d] < least || (d == 0 && least == strides[1])) return false;
    least = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  }
  return true;
}

inline Tensor empty(const Tensor& like, const int64_t (&sizes)[4], bool channels_last) {
  return torch::stable::empty({sizes, 4}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline bool is_dense(const Tensor& t, bool channels_last) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  constexpr int nchw[] = {3, 2, 1, 0}, nhwc[] = {1, 3, 2, 0};
  for (int d : channels_last ? nhwc : nchw) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

inline Tensor dense(const Tensor& t, bool channels_last) {
  if (is_dense(t, channels_last)) return t;
  const auto s = t.sizes();
  Tensor copy = empty(t, {s[0], s[1], s[2], s[3]}, channels_last);
  return torch::stable::copy_(copy, t);
}

inline void check_tensor(const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions [N, C, H, W], got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of the other tensor");
  STD_TORCH_CHECK(t.device() == like.device(), name, " must be on the device of the other tensor");
}

inline void check_shape(const char* name, const Tensor& t, int64_t N, int64_t K, int64_t P, int64_t Q) {
  STD_TORCH_CHECK(t.size(0) == N && t.size(1) == K && t.size(2) == P && t.size(3) == Q, name, " must be [", N, ", ", K,
                  ", ", P, ", ", Q, "], got [", t.size(0), ", ", t.size(1), ", ", t.size(2), ", ", t.size(3), "]");
}

inline Problem problem(int64_t N, int64_t C, int64_t H, int64_t W, int64_t K, int64_t stride) {
  STD_TORCH_CHECK(stride >= 1, "stride must be at least 1, got ", stride);
  STD_TORCH_CHECK(K >= C, "channels must be at least x's ", C, ", got ", K);
  Problem s{};
  s.N = N, s.C = C, s.H = H, s.W = W, s.K = K;
  s.stride = std::min(stride, std::max<int64_t>({H, W, 1}));  // a larger one has the same result but could overflow
  s.P = (H + s.stride - 1) / s.stride;
  s.Q = (W + s.stride - 1) / s.stride;
  return s;
}

inline void set_strides(Problem& s, const Tensor& x) {
  s.sN = x.stride(0), s.sC = x.stride(1), s.sH = x.stride(2), s.sW = x.stride(3);
}

inline Problem problem_of(const Tensor& x, int64_t channels, int64_t stride) {
  check_tensor("x", x, x);
  Problem s = problem(x.size(0), x.size(1), x.size(2), x.size(3), channels, stride);
  set_strides(s, x);
  return s;
}

// Calls f with a null pointer to the tensor's element type; f uses only its type.
template <class F>
void for_dtype(const Tensor& t, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return f(static_cast<double*>(nullptr));
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half: return f(static_cast<Half*>(nullptr));
    default: STD_TORCH_CHECK(false, "the shortcut takes float64, float32, bfloat16 or float16");
  }
}

template <class Device>
Tensor pad_shortcut(const Tensor& x, int64_t stride, int64_t channels) {
  Problem s = problem_of(x, channels, stride);
  s.channels_last = is_channels_last(x);
  Tensor out = empty(x, {s.N, s.K, s.P, s.Q}, s.channels_last);
  if (out.numel() == 0) return out;
  for_dtype(x, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using B = Bits<T>;
    Device::template gather<T, false>(s, x, nullptr, static_cast<const B*>(x.const_data_ptr()),
                                      static_cast<B*>(out.mutable_data_ptr()));
  });
  return out;
}

template <class Device>
Tensor pad_shortcut_add_relu(const Tensor& y, const Tensor& x, int64_t stride) {
  check_tensor("y", y, x);
  Problem s = problem_of(x, y.size(1), stride);
  check_shape("y", y, s.N, s.K, s.P, s.Q);
  s.channels_last = is_channels_last(y);
  const Tensor y_dense = dense(y, s.channels_last);
  Tensor out = empty(y, {s.N, s.K, s.P, s.Q}, s.channels_last);
  if (out.numel() == 0) return out;
  for_dtype(x, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using B = Bits<T>;
    Device::template gather<T, true>(s, x, static_cast<const B*>(y_dense.const_data_ptr()),
                                     static_cast<const B*>(x.const_data_ptr()),
                                     static_cast<B*>(out.mutable_data_ptr()));
  });
  return out;
}

// dx [N, C, H, W] from grad [N, K, P, Q], in grad's memory format.
template <class Device>
Tensor pad_shortcut_backward(const Tensor& grad, int64_t stride, int64_t C, int64_t H, int64_t W) {
  check_tensor("grad", grad, grad);
  Problem s = problem(grad.size(0), C, H, W, grad.size(1), stride);
  check_shape("grad", grad, s.N, s.K, s.P, s.Q);
  s.channels_last = is_channels_last(grad);
  const Tensor g = dense(grad, s.channels_last);
  Tensor dx = empty(grad, {s.N, s.C, s.H, s.W}, s.channels_last);
  set_strides(s, dx);
  if (dx.numel() == 0) return dx;
  for_dtype(g, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using B = Bits<T>;
    Device::template scatter<T, false>(s, g, static_cast<const B*>(g.const_data_ptr()), nullptr, nullptr,
                                       static_cast<B*>(dx.mutable_data_ptr()));
  });
  return dx;
}

// (dy [N, K, P, Q], dx [N, C, H, W]) from grad and the saved output, both in the output's memory format.
template <class Device>
std::tuple<Tensor, Tensor> pad_shortcut_add_relu_backward(const Tensor& grad, const Tensor& out, int64_t stride,
                                                          int64_t C, int64_t H, int64_t W) {
  check_tensor("out", out, out);
  check_tensor("grad", grad, out);
  Problem s = problem(out.size(0), C, H, W, out.size(1), stride);
  check_shape("out", out, s.N, s.K, s.P, s.Q);
  check_shape("grad", grad, s.N, s.K, s.P, s.Q);
  s.channels_last = is_channels_last(out);
  const Tensor g = dense(grad, s.channels_last), o = dense(out, s.channels_last);
  Tensor dy = empty(out, {s.N, s.K, s.P, s.Q}, s.channels_last);
  Tensor dx = empty(out, {s.N, s.C, s.H, s.W}, s.channels_last);
  set_strides(s, dx);
  if (dy.numel() == 0) return {dy, dx};
  for_dtype(g, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using B = Bits<T>;
    Device::template scatter<T, true>(s, g, static_cast<const B*>(g.const_data_ptr()),
                                      static_cast<const B*>(o.const_data_ptr()),
                                      static_cast<B*>(dy.mutable_data_ptr()), static_cast<B*>(dx.mutable_data_ptr()));
  });
  return {dy, dx};
}

// fastres/ops/shortcut.py defines the schemas, fake implementations, autograd and the ATen implementation.
template <class Device>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("pad_shortcut", TORCH_BOX(&pad_shortcut<Device>));
  m.impl("pad_shortcut_backward", TORCH_BOX(&pad_shortcut_backward<Device>));
  m.impl("pad_shortcut_add_relu", TORCH_BOX(&pad_shortcut_add_relu<Device>));
  m.impl("pad_shortcut_add_relu_backward", TORCH_BOX(&pad_shortcut_add_relu_backward<Device>));
}

}  // namespace fastres
