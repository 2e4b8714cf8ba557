// A libcuda.so.1 that runs nothing and writes down what it was asked. Its devices: 0 and 1 are SM90, 2 is SM80, 3 is
// SM75, 4 is SM120 with 48 KB of shared memory.
#pragma once

#include <cstddef>

struct FakeCudaState {
  int retains = 0, loads = 0, launches = 0, pushes = 0, pops = 0, set_shared = 0;
  int tensor_maps = 0;         // encoded; a map's first bytes are its base, then its rows
  int fail_next_map = 0;       // result of the next cuTensorMapEncodeTiled; 0: works
  int fail_next_load = 0;      // result of the next cuModuleLoadData; 0: works
  int fail_next_launch = 0;    // the same of cuLaunchKernelEx
  std::size_t args_bytes = 0;  // what cuFuncGetParamInfo answers
  // The last launch.
  unsigned grid[3] = {}, block[3] = {};
  unsigned shared_bytes = 0;
  void* stream = nullptr;
  unsigned cluster = 0;
  bool pdl = false;
  int first_argument = 0;
  void* context = nullptr;  // current at the launch
  // Graphs: of the one that was captured last.
  int graph_launches = 0, node_updates = 0;
  int fail_next_update = 0;    // result of the next cuGraphExecKernelNodeSetParams
  int node_arguments[8] = {};  // the first argument of each node, in the order of capture, at the last graph launch
};

extern "C" FakeCudaState* fake_cuda_state();
extern "C" void* fake_cuda_primary(int device);
