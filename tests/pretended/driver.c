/* As much of libcuda.so.1 as torch asks for before the first kernel */
#include <string.h>
int cuInit(unsigned f) { return 0; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) { *f = 0; *a = 1; return 0; }
int cuCtxGetCurrent(void **c) { *c = 0; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "pretended"; return 0; }
int cuGetErrorName(int e, const char **s) { *s = "pretended"; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = 0; return 0; }
int cuGetProcAddress_v2(const char *name, void **p, int version, unsigned long long flags, void *q) {
  *p = strcmp(name, "cuDevicePrimaryCtxGetState") ? 0 : (void *)cuDevicePrimaryCtxGetState;
  return *p ? 0 : 500;
}
