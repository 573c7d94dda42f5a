// Option-A shortcut on the CPU: one pass over memory, parallel over planes (NCHW) or rows of pixels (NHWC). The inner
// loops are plain and branch-free, for the compiler to vectorise; the builder passes this machine's instruction set.

#include "shortcut.h"

#include <algorithm>

namespace fastres {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements per task, as at::internal::GRAIN_SIZE

template <class F>
void parallel_rows(int64_t rows, int64_t row_size, const F& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row_size)), f);
}

// out[i] = x[i * step], or relu(y[i] + x[i * step]).
template <bool fused, class T>
inline void gather_row(T* __restrict out, const T* __restrict y, const T* __restrict x, int64_t step, int64_t size) {
  const auto run = [&](auto step_) {
    for (int64_t i = 0; i < size; ++i) {
      if constexpr (fused) {
        out[i] = add_relu(y[i], x[i * step_]);
      } else {
        out[i] = x[i * step_];
      }
    }
  };
  if (step == 1) {
    run(std::integral_constant<int64_t, 1>());
  } else if (step == 2) {
    run(std::integral_constant<int64_t, 2>());
  } else {
    run(step);
  }
}

// The appended channels: 0, or relu(y).
template <bool fused, class T>
inline void gather_zeros(T* __restrict out, const T* __restrict y, int64_t size) {
  if constexpr (fused) {
    for (int64_t i = 0; i < size; ++i) out[i] = passes(y[i]) ? y[i] : zero<T>();
  } else {
    std::memset(static_cast<void*>(out), 0, size * sizeof(T));
  }
}

template <class T>
inline void clear(T* dx, int64_t size) {
  std::memset(static_cast<void*>(dx), 0, size * sizeof(T));
}

template <bool fused, class T>
inline T masked(const T* grad, const T* out, int64_t i) {
  if constexpr (fused) {
    return passes(out[i]) ? grad[i] : zero<T>();
  } else {
    return grad[i];
  }
}

// dy[i] = masked gradient: the appended channels, which nothing of dx depends on.
template <bool fused, class T>
inline void scatter_zeros(const T* __restrict grad, const T* __restrict out, T* __restrict dy, int64_t size) {
  if constexpr (fused) {
    for (int64_t i = 0; i < size; ++i) dy[i] = masked<fused>(grad, out, i);
  }
}

// dx[i] = dy[i] = masked gradient.
template <bool fused, class T>
inline void scatter_dense(const T* __restrict grad, const T* __restrict out, T* __restrict dy, T* __restrict dx,
                          int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const T value = masked<fused>(grad, out, i);
    if constexpr (fused) dy[i] = value;
    dx[i] = value;
  }
}

// A row of W elements of dx: the masked gradient at every `stride`-th, zeros between.
template <bool fused, class T>
inline void scatter_row(const T* __restrict grad, const T* __restrict out, T* __restrict dy, T* __restrict dx,
                        int64_t stride, int64_t W) {
  if (stride == 1) return scatter_dense<fused>(grad, out, dy, dx, W);
  if (stride == 2) {
    const int64_t pairs = W / 2;
    for (int64_t i = 0; i < pairs; ++i) {
      const T value = masked<fused>(grad, out, i);
      if constexpr (fused) dy[i] = value;
      dx[2 * i] = value;
      dx[2 * i + 1] = zero<T>();
    }
    if (W % 2) {
      const T value = masked<fused>(grad, out, pairs);
      if constexpr (fused) dy[pairs] = value;
      dx[W - 1] = value;
    }
    return;
  }
  clear(dx, W);
  for (int64_t i = 0, w = 0; w < W; ++i, w += stride) {
    const T value = masked<fused>(grad, out, i);
    if constexpr (fused) dy[i] = value;
    dx[w] = value;
  }
}

struct Cpu {
  template <class T, bool fused>
  static void gather(const Problem& s, const Tensor&, const T* y, const T* x, T* out) {
    const auto y_at = [y](int64_t i) { return fused ? y + i : nullptr; };
    if (s.channels_last) {
      parallel_rows(s.N * s.P, s.Q * s.K, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const T* from = x + row / s.P * s.sN + row % s.P * s.stride * s.sH;
          for (int64_t q = 0, i = row * s.Q * s.K; q < s.Q; ++q, i += s.K, from += s.stride * s.sW) {
            gather_row<fused>(out + i, y_at(i), from, s.sC, s.C);
            gather_zeros<fused>(out + i + s.C, y_at(i + s.C), s.K - s.C);
          }
        }
      });
    } else {
      const int64_t plane_size = s.P * s.Q;
      parallel_rows(s.N * s.K, plane_size, [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin, planes; plane < end; plane += planes) {
          const int64_t n = plane / s.K, k = plane % s.K;
          int64_t i = plane * plane_size;
          if (k >= s.C) {
            planes = std::min(s.K - k, end - plane);
            gather_zeros<fused>(out + i, y_at(i), planes * plane_size);
            continue;
          }
          planes = 1;
          const T* from = x + n * s.sN + k * s.sC;
          for (int64_t p = 0; p < s.P; ++p, i += s.Q, from += s.stride * s.sH) {
            gather_row<fused>(out + i, y_at(i), from, s.stride * s.sW, s.Q);
          }
        }
      });
    }
  }

  // dx is dense, in the order of the other tensors.
  template <class T, bool fused>
  static void scatter(const Problem& s, const Tensor&, const T* grad, const T* out, T* dy, T* dx) {
    const auto out_at = [out](int64_t i) { return fused ? out + i : nullptr; };
    const auto dy_at = [dy](int64_t i) { return fused ? dy + i : nullptr; };
    if (s.channels_last) {
      parallel_rows(s.N * s.P, s.Q * s.K, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t n = row / s.P, h = row % s.P * s.stride, below = std::min(s.stride, s.H - h) - 1;
          T* to = dx + (n * s.H + h) * s.W * s.C;
          int64_t i = row * s.Q * s.K;
          for (int64_t w = 0; w < s.W; w += s.stride, i += s.K) {
            const int64_t beside = std::min(s.stride, s.W - w) - 1;
            scatter_dense<fused>(grad + i, out_at(i), dy_at(i), to, s.C);
            scatter_zeros<fused>(grad + i + s.C, out_at(i + s.C), dy_at(i + s.C), s.K - s.C);
            clear(to + s.C, beside * s.C);
            to += (1 + beside) * s.C;
          }
          clear(to, below * s.W * s.C);
        }
      });
    } else {
      const int64_t plane_size = s.P * s.Q;
      parallel_rows(s.N * s.K, plane_size, [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin, planes; plane < end; plane += planes) {
          const int64_t n = plane / s.K, k = plane % s.K;
          int64_t i = plane * plane_size;
          if (k >= s.C) {
            planes = std::min(s.K - k, end - plane);
            scatter_zeros<fused>(grad + i, out_at(i), dy_at(i), planes * plane_size);
            continue;
          }
          planes = 1;
          T* to = dx + (n * s.C + k) * s.H * s.W;
          for (int64_t h = 0; h < s.H; h += s.stride, i += s.Q) {
            const int64_t below = std::min(s.stride, s.H - h) - 1;
            scatter_row<fused>(grad + i, out_at(i), dy_at(i), to, s.stride, s.W);
            clear(to + s.W, below * s.W);
            to += (1 + below) * s.W;
          }
        }
      });
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) { implement<Cpu>(m); }

}  // namespace fastres
