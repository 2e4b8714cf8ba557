// Programmatic dependent launch; nothing before SM90, where a kernel starts when its predecessor has ended.
#pragma once

namespace octomoe::ptx {

// Waits until the kernels this one depends on have ended and their writes are visible.
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the kernels that depend on this one start.
__device__ __forceinline__ void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace octomoe::ptx
