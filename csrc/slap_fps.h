// Farthest-point selection: the C interface of the native library.
//
// No PyTorch and no C++ types cross it, so the library is built without PyTorch and loaded by
// ctypes. slap_ds/ops/reference.py is the specification; the caller (slap_ds/ops/plan.py) has
// checked that features are finite and that no squared distance overflows. Ids that index memory
// are checked here.
#ifndef SLAP_FPS_H_
#define SLAP_FPS_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SLAP_FPS_API __attribute__((visibility("default")))
#define SLAP_FPS_ABI 1  // raised with every change of what follows

typedef struct {
  int64_t n;               // points
  int64_t d;               // dimensions
  int64_t k;               // strata
  int64_t g;               // groups; 0: none
  int64_t m;               // picks, the sum of the budgets
  int64_t first;           // the first pick
  int32_t across_strata;   // 1: distances to all picks; 0: to the picks of a point's own stratum
  int32_t bfloat16;        // 1: features are bfloat16; 0: float32
  const void* features;    // (n, d), row-major; on the GPU for slap_fps_cuda
  const int64_t* budgets;  // (k,), on the host like all that follow
  const int64_t* strata;   // (n,) in [0, k), or null: all 0
  const int64_t* groups;   // (n,) in [0, g), or null
  const int64_t* quotas;   // (g,), or null
} SlapFpsProblem;

typedef struct {
  int32_t path;     // a SlapFpsPath
  int32_t threads;  // at least 1
  int32_t block;    // points a pool round works on, 2 to 1024; 0: the default
} SlapFpsOptions;

typedef enum {
  SLAP_FPS_AUTO = 0,
  SLAP_FPS_PORTABLE = 1,
  SLAP_FPS_AVX2 = 2,
  SLAP_FPS_AVX512 = 3,
  SLAP_FPS_VNNI = 4,
} SlapFpsPath;

typedef enum {
  SLAP_FPS_OK = 0,
  SLAP_FPS_BAD_ARGUMENT = 1,  // a shape, an id, a budget or an option out of range
  SLAP_FPS_NO_SUCH_PATH = 2,  // this machine, or this build, has not got it
  SLAP_FPS_NO_MEMORY = 3,
  SLAP_FPS_CUDA_ERROR = 4,  // slap_fps_cuda_error() says which
} SlapFpsStatus;

// picks (m,), pick_squared (m,), squared (n,): host memory, written only on SLAP_FPS_OK.
SLAP_FPS_API int32_t slap_fps_cpu(const SlapFpsProblem* problem, const SlapFpsOptions* options,
                                  int64_t* picks, float* pick_squared, float* squared);

SLAP_FPS_API int32_t slap_fps_abi(void);
// 1 where this build and this processor have the path.
SLAP_FPS_API int32_t slap_fps_has_path(int32_t path);
// What SLAP_FPS_AUTO stands for; measured once, on the first call.
SLAP_FPS_API int32_t slap_fps_auto_path(void);

// In the CUDA library. `problem->features` and the outputs are on `device`, everything else on the
// host. Work is queued on `stream`; the host reads how far it got a few times a call, never a pick.
// workspace: slap_fps_cuda_workspace(problem) bytes on the device, aligned to 256.
SLAP_FPS_API int64_t slap_fps_cuda_workspace(const SlapFpsProblem* problem);
SLAP_FPS_API int32_t slap_fps_cuda(const SlapFpsProblem* problem, int32_t device, void* stream,
                                   void* workspace, int64_t* picks, float* pick_squared,
                                   float* squared);
// What the last SLAP_FPS_CUDA_ERROR of this thread was.
SLAP_FPS_API const char* slap_fps_cuda_error(void);

#ifdef __cplusplus
}
#endif

#endif  // SLAP_FPS_H_
