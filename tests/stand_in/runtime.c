// A stand-in for the CUDA runtime: one H100 whose memory is the host's and whose kernels do nothing.
//
// Preloaded, it goes before the libcudart that torch brings. Copies and fills are done at once. Nothing is recorded in
// a graph, but what a capture forbids is noted, and what it would have recorded is counted; the functions that begin
// with stand_in_ tell of it. Functions of which torch needs no more than success are in succeeds.c.

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#undef cudaGetDeviceProperties  // a macro for the name with its version

enum { kVersion = 13000, kMultiprocessors = 132, kAlignment = 512, kNotesBytes = 1 << 16 };
static const size_t kMemory = 80ull << 30;

static int captures = 0;  // begun so far
static int capturing = 0;
static cudaStream_t captured_stream = 0;
static enum cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
static int captured_nodes = 0;  // kernels, copies and fills of the last capture
static char notes[kNotesBytes];

// What captures forbade and was done all the same, one line each.
const char* stand_in_violations(void) { return notes; }

// Kernels, copies and fills that the last capture would have recorded.
int stand_in_captured_nodes(void) { return captured_nodes; }

static void forbidden(const char* what) {
  if (!capturing) return;
  size_t used = strlen(notes);
  snprintf(notes + used, kNotesBytes - used, "%s\n", what);
}

static void node(void) {
  if (capturing) captured_nodes++;
}

static uintptr_t new_handle(void) {
  static uintptr_t last = 0x1000;
  return last += 16;
}

static cudaError_t allocate(void** pointer, size_t size) {
  *pointer = aligned_alloc(kAlignment, (size + kAlignment - 1) / kAlignment * kAlignment);
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

// The device.

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return cudaSuccess; }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 232448;
      break;
    default:
      *value = 1;
  }
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* properties, int device) {
  *properties = (struct cudaDeviceProp){
      .name = "Stand-in H100",
      .major = 9,
      .minor = 0,
      .multiProcessorCount = kMultiprocessors,
      .totalGlobalMem = kMemory,
      .maxThreadsPerMultiProcessor = 2048,
      .warpSize = 32,
      .maxThreadsPerBlock = 1024,
      .maxThreadsDim = {1024, 1024, 64},
      .maxGridSize = {2147483647, 65535, 65535},
      .sharedMemPerBlock = 49152,
      .sharedMemPerBlockOptin = 232448,
      .sharedMemPerMultiprocessor = 233472,
      .regsPerBlock = 65536,
      .textureAlignment = 512,
      .l2CacheSize = 50 << 20,
  };
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties_v2(struct cudaDeviceProp* properties, int device) {
  return cudaGetDeviceProperties(properties, device);
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  *can = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
  forbidden("cudaDeviceSynchronize");
  return cudaSuccess;
}

cudaError_t cudaGetLastError(void) { return cudaSuccess; }

cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) { return "an error of the stand-in"; }

const char* cudaGetErrorName(cudaError_t error) { return "cudaErrorStandIn"; }

// Streams and events: everything has happened by the time it is asked for.

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = (cudaStream_t)new_handle();
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return cudaStreamCreateWithFlags(stream, flags);
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  forbidden("cudaStreamQuery");
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  forbidden("cudaStreamSynchronize");
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = (cudaEvent_t)new_handle();
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventQuery(cudaEvent_t event) {
  forbidden("cudaEventQuery");
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  forbidden("cudaEventSynchronize");
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = 0.05f;
  return cudaSuccess;
}

// Graphs: a capture has a beginning and an end, and nothing in between.

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  int active = capturing && stream == captured_stream;
  *status = active ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  cudaStreamIsCapturing(stream, status);
  if (id) *id = captures;
  if (graph) *graph = (cudaGraph_t)new_handle();
  if (dependencies) *dependencies = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  captures++;
  capturing = 1;
  captured_stream = stream;
  captured_nodes = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  capturing = 0;
  captured_stream = 0;
  *graph = (cudaGraph_t)new_handle();
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
  enum cudaStreamCaptureMode before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
  *executable = (cudaGraphExec_t)new_handle();
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) { return cudaSuccess; }

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  *count = captured_nodes ? captured_nodes : 1;  // torch warns of a graph without any
  return cudaSuccess;
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* pointer, cudaHostFn_t destroy, unsigned references,
                                 unsigned flags) {
  *object = (cudaUserObject_t)new_handle();
  return cudaSuccess;
}

// Memory: in a capture only where the allocator has said that it knows.

cudaError_t cudaMalloc(void** pointer, size_t size) {
  if (capture_mode != cudaStreamCaptureModeRelaxed) forbidden("cudaMalloc");
  return allocate(pointer, size);
}

cudaError_t cudaFree(void* pointer) {
  if (capture_mode != cudaStreamCaptureModeRelaxed) forbidden("cudaFree");
  free(pointer);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned flags) {
  if (capture_mode != cudaStreamCaptureModeRelaxed) forbidden("cudaHostAlloc");
  return allocate(pointer, size);
}

cudaError_t cudaFreeHost(void* pointer) {
  free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *free_bytes = kMemory - (2ull << 30);
  *total = kMemory;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes, const void* pointer) {
  *attributes = (struct cudaPointerAttributes){.type = cudaMemoryTypeUnregistered};
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  if (kind != cudaMemcpyDeviceToDevice) forbidden("cudaMemcpyAsync between host and device");
  node();
  memcpy(to, from, size);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, enum cudaMemcpyKind kind) {
  forbidden("cudaMemcpy");
  memcpy(to, from, size);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* to, int value, size_t size) {
  forbidden("cudaMemset");
  memset(to, value, size);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  node();
  memset(to, value, size);
  return cudaSuccess;
}

// Kernels.

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  node();
  return cudaSuccess;
}

// What nvcc makes of <<<>>>: the kernel is looked up, then launched.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  node();
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void* function, void** arguments) {
  node();
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* attributes, const void* function) {
  *attributes =
      (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 32, .binaryVersion = 90, .ptxVersion = 90};
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int size,
                                                                   size_t shared, unsigned flags) {
  *blocks = 2;
  return cudaSuccess;
}
