/* A CUDA runtime without a card: one device, or FAKE_N of them, of compute capability FAKE_CC (80). Nothing is computed. */
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>
static int now = 0;
static int number(const char *name, int usual) { char *s = getenv(name); return s ? atoi(s) : usual; }
static int cc(void) { return number("FAKE_CC", 80); }
cudaError_t cudaGetDevice(int *d) { *d = now; return 0; }
cudaError_t cudaSetDevice(int d) { now = d; return 0; }
cudaError_t cudaGetDeviceCount(int *n) { *n = number("FAKE_N", 1); return 0; }
cudaError_t cudaDriverGetVersion(int *v) { *v = 13000; return 0; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }
cudaError_t cudaGetLastError(void) { return 0; }
cudaError_t cudaPeekAtLastError(void) { return 0; }
cudaError_t cudaDeviceSynchronize(void) { return 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *x) { *x = 0; return 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *a, int *b) { *a = 0; *b = -5; return 0; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "Pretended");
  p->major = cc() / 10;
  p->minor = cc() % 10;
  p->totalGlobalMem = (size_t)40 << 30;
  p->multiProcessorCount = 108;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerMultiprocessor = 167936;
  p->sharedMemPerBlockOptin = 166912;
  p->regsPerBlock = 65536;
  return 0;
}
cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
  *v = a == cudaDevAttrComputeCapabilityMajor ? cc() / 10 : a == cudaDevAttrComputeCapabilityMinor ? cc() % 10 : 0;
  return 0;
}
