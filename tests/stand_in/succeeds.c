// Functions of the CUDA runtime of which torch needs no more than success; see runtime.c. No header is included, for
// their arguments don't matter.

#define SUCCEEDS(name) \
  int name() { return 0; }

SUCCEEDS(cudaEventDestroy)
SUCCEEDS(cudaEventRecord)
SUCCEEDS(cudaEventRecordWithFlags)
SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cudaGraphDestroy)
SUCCEEDS(cudaGraphExecDestroy)
SUCCEEDS(cudaGraphRetainUserObject)
SUCCEEDS(cudaProfilerStart)
SUCCEEDS(cudaProfilerStop)
SUCCEEDS(cudaStreamWaitEvent)
SUCCEEDS(cudaUserObjectRelease)
