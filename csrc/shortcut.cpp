// Option-A shortcut on the CPU, parallel over planes (NCHW) or rows of pixels (NHWC). Some loops move elements, others
// do arithmetic. They run one after the other over the same few KB (a plane, a row or a pixel), so that the later loop
// finds its data in the L1 cache. The inner loops are plain and free of branches, so that the compiler can vectorise
// them for the instruction set that the build selects.

#include "shortcut.h"

#include <algorithm>

namespace fastres {
namespace {

constexpr int64_t kGrain = 1 << 15;  // minimum number of elements per task, as at::internal::GRAIN_SIZE

template <class F>
void parallel_rows(int64_t rows, int64_t row_size, const F& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row_size)), f);
}

// x[2 i] and x[2 i + 1] as one integer, with x[2 i] in its lower half. Subsampling by two is then a truncation, and
// inserting zeros is a zero extension. Both have vector instructions.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
template <class B>
using Pair = std::conditional_t<sizeof(B) == 2, uint32_t, uint64_t>;

// narrow: out[i] = x[2 i] for i < count. widen is the transpose: dx[2 i] = grad[i], dx[2 i + 1] = 0. The compiler
// vectorises them because count is a constant.
template <int count, class B>
inline void narrow(B* out, const B* x) {
  Pair<B> pairs[count];
  B lower[count];
  std::memcpy(pairs, x, sizeof(pairs));
  for (int i = 0; i < count; ++i) lower[i] = static_cast<B>(pairs[i]);
  std::memcpy(out, lower, sizeof(lower));
}

template <int count, class B>
inline void widen(B* dx, const B* grad) {
  B lower[count];
  Pair<B> pairs[count];
  std::memcpy(lower, grad, sizeof(lower));
  for (int i = 0; i < count; ++i) pairs[i] = lower[i];
  std::memcpy(dx, pairs, sizeof(pairs));
}

// Calls f(i, block) for blocks [i, i + block) that cover [0, size); block is an integral constant. Rows are short (7,
// 8, 14, 16, 28 pixels), so instead of leaving a remainder the last block overlaps the previous one.
template <class F>
inline void in_blocks(int64_t size, const F& f) {
  const auto cover = [&](auto count) {
    int64_t i = 0;
    for (; i + count <= size; i += count) f(i, count);
    if (i < size) f(size - count, count);
  };
  if (size >= 16) {
    cover(std::integral_constant<int, 16>());
  } else if (size >= 4) {
    cover(std::integral_constant<int, 4>());
  } else {
    cover(std::integral_constant<int, 1>());
  }
}

// memcpy and memset for the few channels of a pixel, for which a library call takes longer than the work itself.
template <class B>
inline void copy(B* __restrict out, const B* __restrict x, int64_t size) {
  constexpr int64_t block = 32 / sizeof(B);
  if (size % block || size > 16 * block) {
    std::memcpy(out, x, size * sizeof(B));
  } else {
    for (int64_t i = 0; i < size; i += block) std::memcpy(out + i, x + i, 32);
  }
}

template <class B>
inline void clear(B* out, int64_t size) {
  constexpr int64_t block = 32 / sizeof(B);
  if (size % block || size > 16 * block) {
    std::memset(out, 0, size * sizeof(B));
  } else {
    for (int64_t i = 0; i < size; i += block) std::memset(out + i, 0, 32);
  }
}

// out[i] = x[i * step]. in_pairs: step is 2 and x[2 * size - 1] may be read too.
template <class B>
inline void gather_row(B* __restrict out, const B* __restrict x, int64_t step, int64_t size, bool in_pairs) {
  if (step == 1) return copy(out, x, size);
  if constexpr (sizeof(B) < sizeof(Pair<B>)) {
    if (in_pairs) return in_blocks(size, [&](int64_t i, auto count) { narrow<count()>(out + i, x + 2 * i); });
  }
  for (int64_t i = 0; i < size; ++i) out[i] = x[i * step];
}

// Fills a row of W elements of dx: grad at every `stride`-th element, zeros between them.
template <class B>
inline void scatter_row(const B* __restrict grad, B* __restrict dx, int64_t stride, int64_t W) {
  if (stride == 1) return copy(dx, grad, W);
  if constexpr (sizeof(B) < sizeof(Pair<B>)) {
    if (stride == 2) {
      in_blocks(W / 2, [&](int64_t i, auto count) { widen<count()>(dx + 2 * i, grad + i); });
      if (W % 2) dx[W - 1] = grad[W / 2];
      return;
    }
  }
  clear(dx, W);
  for (int64_t i = 0, w = 0; w < W; ++i, w += stride) dx[w] = grad[i];
}

// out[i] = relu(y[i] + x[i]); x and out may be the same row.
template <class T>
inline void add_relu_row(Bits<T>* out, const Bits<T>* y, const Bits<T>* x, int64_t size) {
#pragma GCC ivdep
  for (int64_t i = 0; i < size; ++i) out[i] = add_relu<T>(y[i], x[i]);
}

// out[i] = relu(y[i]), for the appended channels.
template <class T>
inline void relu_row(Bits<T>* __restrict out, const Bits<T>* __restrict y, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = relu<T>(y[i]);
}

// dy[i] = grad[i] where relu passes the gradient at its output out[i] (see `passes`), else 0.
template <class T>
inline void mask_row(Bits<T>* __restrict dy, const Bits<T>* __restrict grad, const Bits<T>* __restrict out,
                      int64_t size) {
  for (int64_t i = 0; i < size; ++i) dy[i] = masked<T>(grad[i], out[i]);
}

// Calls f(plane, planes, n, k) for ranges of planes that cover [begin, end), where the N * K planes of the output are
// numbered n * K + k. A range is one plane of x's channels, or consecutive planes of one image's appended channels.
// `plane` is the number of its first plane, of image n and channel k; `planes` is the length of the range.
template <class F>
void for_planes(const Problem& s, int64_t begin, int64_t end, const F& f) {
  while (begin < end) {
    const int64_t n = begin / s.K, k = begin % s.K;
    const int64_t planes = k < s.C ? 1 : std::min(s.K - k, end - begin);
    f(begin, planes, n, k);
    begin += planes;
  }
}

struct Cpu {
  template <class T, bool fused>
  static void gather(const Problem& s, const Tensor&, const Bits<T>* y, const Bits<T>* x, Bits<T>* out) {
    if (s.channels_last) {
      const int64_t row_size = s.Q * s.K;
      parallel_rows(s.N * s.P, row_size, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const Bits<T>* from = x + row / s.P * s.sN + row % s.P * s.stride * s.sH;
          for (int64_t i = row * row_size; i < (row + 1) * row_size; i += s.K, from += s.stride * s.sW) {
            if (!fused || s.sC != 1) gather_row(out + i, from, s.sC, s.C, false);
            if constexpr (fused) {
              add_relu_row<T>(out + i, y + i, s.sC == 1 ? from : out + i, s.C);
              relu_row<T>(out + i + s.C, y + i + s.C, s.K - s.C);
            } else {
              clear(out + i + s.C, s.K - s.C);
            }
          }
        }
      });
    } else {
      const int64_t plane_size = s.P * s.Q;
      const bool in_pairs = s.stride == 2 && s.sW == 1 && s.W % 2 == 0;
      parallel_rows(s.N * s.K, plane_size, [&](int64_t begin, int64_t end) {
        for_planes(s, begin, end, [&](int64_t plane, int64_t planes, int64_t n, int64_t k) {
          const int64_t i = plane * plane_size, size = planes * plane_size;
          if (k < s.C) {
            const Bits<T>* from = x + n * s.sN + k * s.sC;
            for (int64_t p = 0; p < s.P; ++p, from += s.stride * s.sH) {
              gather_row(out + i + p * s.Q, from, s.stride * s.sW, s.Q, in_pairs);
            }
            if constexpr (fused) add_relu_row<T>(out + i, y + i, out + i, size);
          } else if constexpr (fused) {
            relu_row<T>(out + i, y + i, size);
          } else {
            clear(out + i, size);
          }
        });
      });
    }
  }

  // dx is dense, in the same memory order as the other tensors.
  template <class T, bool fused>
  static void scatter(const Problem& s, const Tensor&, const Bits<T>* grad, const Bits<T>* out, Bits<T>* dy,
                      Bits<T>* dx) {
    if (s.channels_last) {
      const int64_t row_size = s.Q * s.K;
      parallel_rows(s.N * s.P, row_size, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t i = row * row_size;
          if constexpr (fused) mask_row<T>(dy + i, grad + i, out + i, row_size);
          const Bits<T>* from = fused ? dy + i : grad + i;
          const int64_t n = row / s.P, h = row % s.P * s.stride, below = std::min(s.stride, s.H - h) - 1;
          Bits<T>* to = dx + (n * s.H + h) * s.W * s.C;
          for (int64_t w = 0; w < s.W; w += s.stride, from += s.K) {
            const int64_t beside = std::min(s.stride, s.W - w) - 1;
            copy(to, from, s.C);
            clear(to + s.C, beside * s.C);
            to += (1 + beside) * s.C;
          }
          clear(to, below * s.W * s.C);
        }
      });
    } else {
      const int64_t plane_size = s.P * s.Q;
      parallel_rows(s.N * s.K, plane_size, [&](int64_t begin, int64_t end) {
        for_planes(s, begin, end, [&](int64_t plane, int64_t planes, int64_t n, int64_t k) {
          const int64_t i = plane * plane_size;
          if constexpr (fused) mask_row<T>(dy + i, grad + i, out + i, planes * plane_size);
          if (k >= s.C) return;
          const Bits<T>* from = fused ? dy + i : grad + i;
          Bits<T>* to = dx + (n * s.C + k) * s.H * s.W;
          for (int64_t h = 0; h < s.H; h += s.stride, from += s.Q) {
            const int64_t below = std::min(s.stride, s.H - h) - 1;
            scatter_row(from, to, s.stride, s.W);
            clear(to + s.W, below * s.W);
            to += (1 + below) * s.W;
          }
        });
      });
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) { implement<Cpu>(m); }

}  // namespace fastres
