// The CUDA driver's functions that Triton calls, for a GPU that is not there. A launch computes nothing: the device is
// a queue whose clock each launch moves on by the time that it is told. Built by gpu.py.
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef int CUresult;
enum { OK = 0, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700 };
enum { NO_FAULT, LOSE, HANG, KILL };

static double launch_us = 10.0, idle_at = 0.0;  // when the device will have done what is queued, in seconds
static char fault_kernel[128];
static int fault_kind = NO_FAULT, lost = 0, hung = 0;
static long launches = 0;
static char (*names)[96] = 0;
static long names_room = 0;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

void fake_set_launch_us(double us) { launch_us = us; }
void fake_set_fault(const char *kernel, int kind) {
  strncpy(fault_kernel, kernel, sizeof fault_kernel - 1);
  fault_kind = kind;
}
void fake_lose(void) { lost = 1; }
int fake_is_lost(void) { return lost; }
int fake_is_hung(void) { return hung; }
long fake_launches(void) { return launches; }
const char *fake_name(long i) { return names[i]; }
double fake_launch_us(void) { return launch_us; }
double fake_now(void) { return now(); }
double fake_idle_at(void) { return idle_at > now() ? idle_at : now(); }
void fake_queue(double us) { idle_at = fake_idle_at() + 1e-6 * us; }

CUresult cuInit(unsigned flags) { return OK; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return OK; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return OK; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 16: *value = 132; break;      // multiprocessors
    case 97: *value = 232448; break;   // shared memory that a program may opt into
    case 12: case 82: *value = 65536; break;  // registers of a program, of a multiprocessor
    case 10: *value = 32; break;       // lanes of a warp
    case 75: *value = 9; break;        // compute capability 9.0
    case 76: *value = 0; break;
    default: *value = 1;
  }
  return OK;
}
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = &launches; return OK; }
CUresult cuCtxGetCurrent(void **context) { *context = &launches; return OK; }
CUresult cuCtxSetCurrent(void *context) { return OK; }
CUresult cuCtxGetDevice(int *device) { *device = 0; return OK; }
CUresult cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return OK; }
CUresult cuCtxSetLimit(int limit, size_t value) { return OK; }
CUresult cuModuleLoadData(void **module, const void *image) { *module = &launches; return lost ? ILLEGAL_ADDRESS : OK; }
CUresult cuModuleUnload(void *module) { return OK; }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) { *function = strdup(name); return OK; }
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0;  // threads, registers; no local memory
  return OK;
}
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return OK; }
CUresult cuFuncSetCacheConfig(void *function, int config) { return OK; }
CUresult cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) {
  *(unsigned long long *)data = pointer;
  return OK;
}
CUresult cuStreamIsCapturing(void *stream, int *status) { *status = 0; return OK; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { *clusters = 1; return OK; }
CUresult cuTensorMapEncodeTiled(void) { return OK; }
CUresult cuTensorMapEncodeIm2col(void) { return OK; }
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "an error";
  return OK;
}

CUresult cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) {
  if (lost) return ILLEGAL_ADDRESS;
  if (fault_kind && strstr((const char *)function, fault_kernel)) {
    if (fault_kind == KILL) kill(getpid(), SIGKILL);
    if (fault_kind == LOSE) lost = 1;  // as on a GPU, where the next call learns of it
    if (fault_kind == HANG) hung = 1;  // whoever waits for the device waits for ever
  }
  if (launches == names_room) names = realloc(names, sizeof *names * (names_room = 2 * names_room + 1024));
  strncpy(names[launches], (const char *)function, sizeof *names - 1);
  names[launches++][sizeof *names - 1] = 0;
  fake_queue(launch_us);
  return OK;
}
CUresult cuLaunchKernel(void *function) { return cuLaunchKernelEx(0, function, 0, 0); }
