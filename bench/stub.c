// The part of the CUDA driver that Triton calls, for a processor that is not there: everything succeeds at once.
#include <stdint.h>

#define SUCCEEDS(name)                                                                                                 \
  int name(void) { return 0; }

SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuTensorMapEncodeIm2col)
SUCCEEDS(cuTensorMapEncodeTiled)
SUCCEEDS(cuLaunchKernelEx)
SUCCEEDS(cuInit)

static int a_thing;

static int give(void **to) {
  *to = &a_thing;
  return 0;
}

int cuCtxGetCurrent(void **context) { return give(context); }
int cuDevicePrimaryCtxRetain(void **context, int device) { return give(context); }
int cuModuleLoadData(void **module, const void *image) { return give(module); }

// every kernel has a handle of its own
int cuModuleGetFunction(uint64_t *function, void *module, const char *name) {
  static uint64_t last = 0;
  *function = last += 16;
  return 0;
}

int cuGetErrorString(int code, const char **text) {
  *text = "an error of the stub";
  return 0;
}

int cuCtxGetDevice(int *device) { return *device = 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = 0; }

int cuCtxGetLimit(uint64_t *value, int limit) {
  *value = 0;
  return 0;
}

int cuDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}

// of an H200: shared memory of a block (97, opted in), the number of multiprocessors (16), the size of a warp (10)
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 97 ? 232448 : attribute == 16 ? 132 : attribute == 10 ? 32 : 1024;
  return 0;
}

// threads of a block (0); registers, local memory
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0;
  return 0;
}

int cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *configuration) { return *clusters = 0; }

int cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t pointer) {
  *value = pointer;
  return 0;
}

// Triton 3.9 asks for it
int cuStreamIsCapturing(void *stream, int *status) { return *status = 0; }
