// Option-A shortcut on CUDA, in one pass over memory. A thread processes packs of V adjacent elements of the dense
// [N, K, P, Q] tensors, each by one access of up to 16 bytes: V channels of a pixel in NHWC order, V pixels of a row in
// NCHW order.

#include "shortcut.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>

namespace fastres {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSM = 16;  // enough threads to fill an SM twice; a grid-stride loop covers the rest

template <class B, int V>
struct alignas(sizeof(B) * V) Pack {
  B at[V];
};

// The sizes and strides that the kernels need, in their integer type I.
template <class I>
struct Shape {
  I items;  // number of packs of a [N, K, P, Q] tensor
  I C, H, W, K, P, Q, stride;
  I sN, sC, sH, sW;
};

// The indices of a pack's first element.
template <class I>
struct Position {
  I n, k, p, q;
};

template <int V, bool channels_last, class I>
__device__ __forceinline__ Position<I> position(const Shape<I>& s, I item) {
  const I inner = (channels_last ? s.K : s.Q) / V;
  const I first = item % inner * V;
  item /= inner;
  if constexpr (channels_last) {
    const I q = item % s.Q;
    item /= s.Q;
    return {item / s.P, first, item % s.P, q};
  } else {
    const I p = item % s.P;
    item /= s.P;
    return {item / s.K, item % s.K, p, first};
  }
}

// Loads the V elements of x that belong to a pack: adjacent channels in NHWC, every `stride`-th pixel of a row in NCHW.
// For V > 1 the host has checked with `packs` that the accesses are aligned and stay within the row, and that stride is
// 1 or 2 in NCHW.
template <class B, int V, bool channels_last, class I>
__device__ __forceinline__ Pack<B, V> load_x(const B* __restrict__ x, const Shape<I>& s) {
  if constexpr (V == 1) {
    return {*x};
  } else if constexpr (channels_last) {
    return *reinterpret_cast<const Pack<B, V>*>(x);
  } else {
    const auto low = *reinterpret_cast<const Pack<B, V>*>(x);
    if (s.stride == 1) return low;
    const auto high = *reinterpret_cast<const Pack<B, V>*>(x + V);
    Pack<B, V> evens;
#pragma unroll
    for (int i = 0; i < V; ++i) evens.at[i] = 2 * i < V ? low.at[2 * i] : high.at[2 * i - V];
    return evens;
  }
}

template <class T, int V, bool channels_last, bool fused, class I>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(Shape<I> s, const Bits<T>* __restrict__ y, const Bits<T>* __restrict__ x, Bits<T>* __restrict__ out) {
  using P = Pack<Bits<T>, V>;
  const I step = static_cast<I>(gridDim.x) * kThreads;
  for (I item = static_cast<I>(blockIdx.x) * kThreads + threadIdx.x; item < s.items; item += step) {
    const auto at = position<V, channels_last>(s, item);
    P value{};
    if (at.k < s.C) {
      const I offset = at.n * s.sN + at.k * s.sC + at.p * s.stride * s.sH + at.q * s.stride * s.sW;
      value = load_x<Bits<T>, V, channels_last>(x + offset, s);
    }
    if constexpr (fused) {
      const P other = reinterpret_cast<const P*>(y)[item];
#pragma unroll
      for (int i = 0; i < V; ++i) value.at[i] = add_relu<T>(other.at[i], value.at[i]);
    }
    reinterpret_cast<P*>(out)[item] = value;
  }
}

// Writes the block of dx that belongs to a pack: the gradient at the pixels that the shortcut reads, and zeros from
// there to the next such pixels or the edge of the image. The blocks tile dx, so every element is written exactly once.
template <class B, int V, bool channels_last, class I>
__device__ __forceinline__ void store_dx(B* __restrict__ dx, const Shape<I>& s, const Position<I>& at,
                                         const Pack<B, V>& value) {
  using P = Pack<B, V>;
  const I h0 = at.p * s.stride, w0 = at.q * s.stride;
  B* to = dx + at.n * s.sN + at.k * s.sC + h0 * s.sH + w0 * s.sW;
  const I rows = min(s.stride, s.H - h0);
  if constexpr (V == 1 || channels_last) {
    const I columns = min(s.stride, s.W - w0);
    for (I h = 0; h < rows; ++h) {
      for (I w = 0; w < columns; ++w) {
        *reinterpret_cast<P*>(to + h * s.sH + w * s.sW) = h == 0 && w == 0 ? value : P{};
      }
    }
  } else {
    if (s.stride == 1) {
      *reinterpret_cast<P*>(to) = value;
      return;
    }
    P low{}, high{};
#pragma unroll
    for (int i = 0; i < V; ++i) (2 * i < V ? low.at[2 * i] : high.at[2 * i - V]) = value.at[i];
    for (I h = 0; h < rows; ++h) {
      *reinterpret_cast<P*>(to + h * s.sH) = h == 0 ? low : P{};
      *reinterpret_cast<P*>(to + h * s.sH + V) = h == 0 ? high : P{};
    }
  }
}

template <class T, int V, bool channels_last, bool fused, class I>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(Shape<I> s, const Bits<T>* __restrict__ grad, const Bits<T>* __restrict__ out,
                   Bits<T>* __restrict__ dy, Bits<T>* __restrict__ dx) {
  using P = Pack<Bits<T>, V>;
  const I step = static_cast<I>(gridDim.x) * kThreads;
  for (I item = static_cast<I>(blockIdx.x) * kThreads + threadIdx.x; item < s.items; item += step) {
    const auto at = position<V, channels_last>(s, item);
    if (!fused && at.k >= s.C) continue;
    P value = reinterpret_cast<const P*>(grad)[item];
    if constexpr (fused) {
      const P kept = reinterpret_cast<const P*>(out)[item];
#pragma unroll
      for (int i = 0; i < V; ++i) value.at[i] = masked<T>(value.at[i], kept.at[i]);
      reinterpret_cast<P*>(dy)[item] = value;
    }
    if (at.k < s.C) store_dx<Bits<T>, V, channels_last>(dx, s, at, value);
  }
}

// Whether packs of V elements can be used. No pack may cross the end of a pixel's channels, of x's C channels or of a
// row, and all packs must be aligned to their size. This includes the dense tensors: a view may start at any element.
template <class B>
bool packs(const Problem& s, int V, std::initializer_list<const B*> pointers) {
  for (const B* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % (V * sizeof(B))) return false;
  }
  const auto strided = [V](int64_t size, int64_t stride) { return size <= 1 || stride % V == 0; };
  if (s.channels_last) {
    return s.sC == 1 && s.C % V == 0 && s.K % V == 0 && strided(s.N, s.sN) && strided(s.H, s.sH) && strided(s.W, s.sW);
  }
  return s.stride <= 2 && s.sW == 1 && s.Q % V == 0 && s.W == s.Q * s.stride && strided(s.N, s.sN) &&
         strided(s.C, s.sC) && strided(s.H, s.sH);
}

// Whether 32-bit integers can hold all offsets: those of x or dx from its first element, and those in a dense tensor.
bool fits_int32(const Problem& s) {
  const auto reach = [](int64_t size, int64_t stride) { return std::max<int64_t>(size - 1, 0) * stride; };
  const int64_t far = reach(s.N, s.sN) + reach(s.C, s.sC) + reach(s.H, s.sH) + reach(s.W, s.sW);
  // The grid-stride loop takes one step past the end. The bound 2^30 leaves room for it with any launch grid.
  return std::max(far, s.N * s.K * s.P * s.Q) < (int64_t{1} << 30);
}

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "the option-A shortcut's CUDA kernel failed: ", cudaGetErrorString(error));
}

// Calls launch(V, channels_last, I{}), where V and channels_last are integral constants. Uses the widest packs and
// 32-bit integers where possible. With 64-bit integers V is 1: their divisions take longer than the memory accesses.
template <class B, class F>
void specialise(const Problem& s, std::initializer_list<const B*> pointers, F launch) {
  constexpr std::integral_constant<int, 16 / sizeof(B)> widest;
  constexpr std::integral_constant<int, 1> single;
  const auto with_layout = [&](auto channels_last) {
    if (!fits_int32(s)) {
      launch(single, channels_last, int64_t{});
    } else if (packs<B>(s, widest, pointers)) {
      launch(widest, channels_last, int32_t{});
    } else {
      launch(single, channels_last, int32_t{});
    }
  };
  if (s.channels_last) {
    with_layout(std::true_type());
  } else {
    with_layout(std::false_type());
  }
}

// The element type with which kernels are instantiated. Kernels that only move elements depend on the size alone, so
// the two 16-bit types share them.
template <class T, bool fused>
using Element = std::conditional_t<!fused && sizeof(T) == 2, Half, T>;

template <class I>
Shape<I> shape(const Problem& s, int V) {
  const auto narrow = [](int64_t value) { return static_cast<I>(value); };
  return {narrow(s.N * s.K * s.P * s.Q / V), narrow(s.C),  narrow(s.H),  narrow(s.W),  narrow(s.K),  narrow(s.P),
          narrow(s.Q),  narrow(s.stride),    narrow(s.sN), narrow(s.sC), narrow(s.sH), narrow(s.sW)};
}

// Launches `kernel` for `items` packs on the tensor's device, on torch's current stream there.
template <class... Parameters, class... Arguments>
void launch_on(const Tensor& tensor, int64_t items, void (*kernel)(Parameters...), Arguments... arguments) {
  const int32_t device = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t blocks = std::min<int64_t>((items + kThreads - 1) / kThreads, int64_t{processors} * kBlocksPerSM);
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError());
}

struct Cuda {
  template <class T, bool fused>
  static void gather(const Problem& s, const Tensor& on, const Bits<T>* y, const Bits<T>* x, Bits<T>* out) {
    specialise<Bits<T>>(s, {y, x, out}, [&](auto V, auto channels_last, auto integer) {
      using I = decltype(integer);
      const Shape<I> shape_ = shape<I>(s, V);
      const auto kernel = gather_kernel<Element<T, fused>, V(), channels_last(), fused, I>;
      launch_on(on, shape_.items, kernel, shape_, y, x, out);
    });
  }

  template <class T, bool fused>
  static void scatter(const Problem& s, const Tensor& on, const Bits<T>* grad, const Bits<T>* out, Bits<T>* dy,
                      Bits<T>* dx) {
    specialise<Bits<T>>(s, {grad, out, dy, dx}, [&](auto V, auto channels_last, auto integer) {
      using I = decltype(integer);
      const Shape<I> shape_ = shape<I>(s, V);
      const auto kernel = scatter_kernel<Element<T, fused>, V(), channels_last(), fused, I>;
      launch_on(on, shape_.items, kernel, shape_, grad, out, dy, dx);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastres, CUDA, m) { implement<Cuda>(m); }

}  // namespace fastres
