// A stand-in for the CUDA driver, as far as torch and Triton ask for it; see runtime.c. No header is included: for most
// functions success is all that is wanted, and their arguments don't matter.

enum { kHandle = 0x10 };

#define SUCCEEDS(name) \
  int name() { return 0; }

SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuDevicePrimaryCtxRetain)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuInit)
SUCCEEDS(cuLaunchCooperativeKernel)
SUCCEEDS(cuLaunchKernel)
SUCCEEDS(cuLinkAddData_v2)
SUCCEEDS(cuLinkComplete)
SUCCEEDS(cuLinkCreate_v2)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuPointerGetAttribute)
SUCCEEDS(cuTensorMapEncodeTiled)

int cuCtxGetCurrent(void** context) {
  *context = (void*)kHandle;
  return 0;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = 0;
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = 1;
  return 0;
}

int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}

int cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = 0;
  return 0;
}

int cuGetErrorString(int error, const char** text) {
  *text = "an error of the stand-in";
  return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = (void*)kHandle;
  return 0;
}

int cuModuleLoad(void** module, const char* file) {
  *module = (void*)kHandle;
  return 0;
}

int cuModuleLoadData(void** module, const void* image) {
  *module = (void*)kHandle;
  return 0;
}

int cuModuleLoadDataEx(void** module, const void* image, unsigned count, void* options, void* values) {
  *module = (void*)kHandle;
  return 0;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int size, unsigned long shared) {
  *blocks = 2;
  return 0;
}
