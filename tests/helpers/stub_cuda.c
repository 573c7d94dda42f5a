// A stub CUDA driver for a machine without a GPU: the functions of libcuda.so.1 that Triton's host side calls. It loads
// and executes nothing. Launches are passed to `on_launch`. Tensor maps that the real driver rejects are rejected.
#include <cuda.h>
#include <string.h>

typedef void (*launch_callback)(void *function, unsigned x, unsigned y, unsigned z, unsigned shared, void **params);
static launch_callback on_launch;
static unsigned long long handles = 16;

// Sets the function that is called for every launch; NULL for none.
void stub_on_launch(launch_callback callback) { on_launch = callback; }

// The contents of a tensor map, written into its 128 bytes.
typedef struct {
  unsigned long long address, dims[5], strides[4];
  unsigned box[5];
  unsigned char rank, type, swizzle, fill;
} Map;

static const unsigned element_bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};  // by CUtensorMapDataType

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  (void)promotion;
  static const unsigned span[] = {256 * 16, 32, 64, 128};  // bytes of the innermost box by swizzle
  Map said = {.address = (unsigned long long)address, .dims = {0}, .strides = {0}, .box = {0}};
  if (rank < 1 || rank > 5 || said.address % 16 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle > 3)
    return CUDA_ERROR_INVALID_VALUE;
  unsigned inner = box[0] * element_bytes[type];
  if (inner % 16 || inner > span[swizzle]) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < rank; i++) {
    if (dims[i] < 1 || dims[i] > 1ull << 32 || box[i] < 1 || box[i] > 256 || steps[i] != 1)
      return CUDA_ERROR_INVALID_VALUE;
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40)) return CUDA_ERROR_INVALID_VALUE;
    said.dims[i] = dims[i];
    said.box[i] = box[i];
    if (i + 1 < rank) said.strides[i] = strides[i];
  }
  said.rank = rank, said.type = type, said.swizzle = swizzle, said.fill = fill;
  memset(map, 0, sizeof *map);
  memcpy(map, &said, sizeof said);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  (void)extra;
  if (on_launch)
    on_launch(function, config->gridDimX, config->gridDimY, config->gridDimZ, config->sharedMemBytes, params);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448 : 233472;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  (void)function;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  (void)image;
  *module = (CUmodule)++handles;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {  // called from Triton 3.8 on
  (void)module;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  (void)module, (void)name;
  *function = (CUfunction)++handles;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  (void)attribute;
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "unknown error";
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {  // called from Triton 3.8 on
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)16;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  (void)device;
  return cuCtxGetCurrent(context);
}

CUresult cuCtxSetCurrent(CUcontext context) {
  (void)context;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) { return cuDeviceGet(device, 0); }

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  (void)function, (void)attribute, (void)value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  (void)function, (void)config;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  (void)limit;
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  (void)limit, (void)value;
  return CUDA_SUCCESS;
}
