// Stands in for libcuda: every call succeeds and does nothing. For the time of the host's side of a launch alone.
#include <stdint.h>

typedef int Result;

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
// An H100's: compute capability 9.0, 132 multiprocessors, shared memory and registers of a block and multiprocessor.
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 75: *value = 9; break;
        case 76: *value = 0; break;
        case 16: *value = 132; break;
        case 97: *value = 232448; break;
        case 8: *value = 49152; break;
        case 81: *value = 233472; break;
        case 12:
        case 82: *value = 65536; break;
        case 10: *value = 32; break;
        default: *value = 1024;
    }
    return 0;
}
Result cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
Result cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
Result cuCtxSetCurrent(void *context) { return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuCtxSetLimit(int limit, uint64_t value) { return 0; }
Result cuCtxGetLimit(uint64_t *value, int limit) { *value = 0; return 0; }
Result cuGetErrorString(Result error, const char **text) { *text = "stub"; return 0; }
Result cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
Result cuModuleUnload(void *module) { return 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
Result cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { *(uint64_t *)data = pointer; return 0; }
Result cuPointerGetAttributes(unsigned count, int *attributes, void **data, uint64_t pointer) { return 0; }
Result cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
Result cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) { return 0; }
Result cuLaunchKernel(void) { return 0; }
Result cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) { *count = 1; return 0; }
Result cuTensorMapEncodeTiled(void) { return 0; }
Result cuTensorMapEncodeIm2col(void) { return 0; }
