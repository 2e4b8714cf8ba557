#include "cuda_fake/fake_driver.h"

#include <atomic>
#include <cstring>
#include <deque>
#include <mutex>
#include <vector>

#include "cuda/driver.h"

namespace {

using namespace octomoe::cuda;  // NOLINT: its types

constexpr int kCapability[] = {90, 90, 80, 75, 120};
constexpr int kDevices = 5;
FakeCudaState state;
std::mutex mutex;
thread_local std::vector<CuContext> stack;
char contexts[kDevices];

// A captured launch. Its argument struct has state.args_bytes.
struct FakeNode {
  CuFunction function;
  unsigned grid_x, block_x, shared_bytes;
  std::vector<char> args;
  void* parameters[1];
};
bool capturing = false;
std::deque<FakeNode> nodes;  // of the last capture; the executable graph's too

template <class T>
T handle(void* p) {
  return reinterpret_cast<T>(p);
}

}  // namespace

#define FAKE extern "C" __attribute__((visibility("default")))

FAKE FakeCudaState* fake_cuda_state() { return &state; }
FAKE void* fake_cuda_primary(int device) { return &contexts[device]; }

FAKE CuResult cuInit(unsigned) { return 0; }
FAKE CuResult cuDriverGetVersion(int* v) { return *v = 12040, 0; }
FAKE CuResult cuGetErrorName(CuResult rc, const char** out) {
  *out = rc == 200 ? "CUDA_ERROR_INVALID_IMAGE" : rc == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OTHER";
  return 0;
}
FAKE CuResult cuGetErrorString(CuResult, const char** out) { return *out = "made up", 0; }
FAKE CuResult cuDeviceGetCount(int* n) { return *n = kDevices, 0; }
FAKE CuResult cuDeviceGet(CuDevice* d, int i) { return *d = i, 0; }
FAKE CuResult cuDeviceGetName(char* out, int, CuDevice) { return out[0] = 'F', out[1] = 0, 0; }
FAKE CuResult cuDeviceGetAttribute(int* out, int which, CuDevice d) {
  switch (which) {
    case kComputeCapabilityMajor:
      *out = kCapability[d] / 10;
      break;
    case kComputeCapabilityMinor:
      *out = kCapability[d] % 10;
      break;
    case kMultiprocessorCount:
      *out = 132;
      break;
    case kMaxSharedPerBlockOptin:
      *out = d == 4 ? 49152 : 232448;
      break;
    default:
      *out = 1;
  }
  return 0;
}
FAKE CuResult cuDeviceTotalMem_v2(std::size_t* n, CuDevice) { return *n = std::size_t{80} << 30, 0; }
FAKE CuResult cuDevicePrimaryCtxRetain(CuContext* c, CuDevice d) {
  const std::lock_guard lock(mutex);
  ++state.retains;
  return *c = handle<CuContext>(&contexts[d]), 0;
}
FAKE CuResult cuCtxGetCurrent(CuContext* c) { return *c = stack.empty() ? nullptr : stack.back(), 0; }
FAKE CuResult cuCtxSetCurrent(CuContext c) {
  if (stack.empty()) stack.push_back(c);
  return stack.back() = c, 0;
}
FAKE CuResult cuCtxPushCurrent_v2(CuContext c) {
  const std::lock_guard lock(mutex);
  ++state.pushes;
  return stack.push_back(c), 0;
}
FAKE CuResult cuCtxPopCurrent_v2(CuContext* c) {
  const std::lock_guard lock(mutex);
  ++state.pops;
  *c = stack.back();
  return stack.pop_back(), 0;
}
FAKE CuResult cuModuleLoadData(CuModule* m, const void*) {
  const std::lock_guard lock(mutex);
  ++state.loads;
  if (stack.empty()) return 201;  // no current context
  if (const int rc = state.fail_next_load) return state.fail_next_load = 0, rc;
  return *m = handle<CuModule>(&state), 0;
}
FAKE CuResult cuModuleGetFunction(CuFunction* f, CuModule m, const char*) { return *f = handle<CuFunction>(m), 0; }
FAKE CuResult cuFuncGetAttribute(int* out, int which, CuFunction) {
  return *out = which == kFunctionSharedBytes ? 16 : 8, 0;
}
FAKE CuResult cuFuncSetAttribute(CuFunction, int which, int value) {
  if (which == kFunctionMaxDynamicShared) state.set_shared = value;
  return 0;
}
FAKE CuResult cuFuncGetParamInfo(CuFunction, std::size_t, std::size_t* offset, std::size_t* bytes) {
  return *offset = 0, *bytes = state.args_bytes, 0;
}
FAKE CuResult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CuFunction, int, std::size_t) { return *n = 2, 0; }
FAKE CuResult cuLaunchKernelEx(const CuLaunchConfig* c, CuFunction f, void** parameters, void**) {
  const std::lock_guard lock(mutex);
  ++state.launches;
  if (const int rc = state.fail_next_launch) return state.fail_next_launch = 0, rc;
  if (capturing) {
    const char* args = static_cast<const char*>(parameters[0]);
    FakeNode& node =
        nodes.emplace_back(FakeNode{f, c->grid_x, c->block_x, c->shared_bytes, {args, args + state.args_bytes}, {}});
    node.parameters[0] = node.args.data();
    return 0;
  }
  state.grid[0] = c->grid_x, state.grid[1] = c->grid_y, state.grid[2] = c->grid_z;
  state.block[0] = c->block_x, state.block[1] = c->block_y, state.block[2] = c->block_z;
  state.shared_bytes = c->shared_bytes;
  state.stream = c->stream;
  state.cluster = 0;
  state.pdl = false;
  for (unsigned i = 0; i < c->attribute_count; ++i) {
    const CuLaunchAttribute& a = c->attributes[i];
    if (a.id == kLaunchCluster) state.cluster = a.value.cluster.x;
    if (a.id == kLaunchProgrammaticStreamSerialization) state.pdl = a.value.programmatic_stream_serialization == 1;
  }
  state.first_argument = *static_cast<int*>(parameters[0]);
  state.context = stack.empty() ? nullptr : stack.back();
  return 0;
}

FAKE CuResult cuStreamCreate(CuStream* s, unsigned) { return *s = handle<CuStream>(&nodes), 0; }
FAKE CuResult cuStreamDestroy_v2(CuStream) { return 0; }
FAKE CuResult cuThreadExchangeStreamCaptureMode(int*) { return 0; }
FAKE CuResult cuStreamBeginCapture_v2(CuStream, int) { return nodes.clear(), capturing = true, 0; }
FAKE CuResult cuStreamEndCapture(CuStream, CuGraph* g) { return capturing = false, *g = handle<CuGraph>(&nodes), 0; }
FAKE CuResult cuGraphInstantiateWithFlags(CuGraphExec* e, CuGraph, unsigned long long) {
  return *e = handle<CuGraphExec>(&nodes), 0;
}
FAKE CuResult cuGraphGetNodes(CuGraph, CuGraphNode* out, std::size_t* n) {  // in an order of its own
  *n = nodes.size();
  for (std::size_t i = 0; out != nullptr && i < *n; ++i) out[i] = handle<CuGraphNode>(&nodes[*n - 1 - i]);
  return 0;
}
FAKE CuResult cuGraphKernelNodeGetParams_v2(CuGraphNode node, CuKernelNodeParams* p) {
  auto* n = reinterpret_cast<FakeNode*>(node);
  *p = {};
  p->function = n->function;
  p->grid_x = n->grid_x;
  p->parameters = n->parameters;
  return 0;
}
FAKE CuResult cuGraphExecKernelNodeSetParams_v2(CuGraphExec, CuGraphNode node, const CuKernelNodeParams* p) {
  if (const int rc = state.fail_next_update) return state.fail_next_update = 0, rc;
  auto* n = reinterpret_cast<FakeNode*>(node);
  if (p->function != n->function || p->grid_x != n->grid_x || p->grid_y != 1 || p->grid_z != 1 ||
      p->block_x != n->block_x || p->block_y != 1 || p->block_z != 1 || p->shared_bytes != n->shared_bytes) {
    return kCudaInvalidValue;
  }
  std::memcpy(n->args.data(), p->parameters[0], n->args.size());
  return ++state.node_updates, 0;
}
FAKE CuResult cuGraphLaunch(CuGraphExec, CuStream s) {
  ++state.graph_launches;
  state.stream = s;
  for (std::size_t i = 0; i < nodes.size(); ++i)
    std::memcpy(&state.node_arguments[i], nodes[i].args.data(), sizeof(int));
  return 0;
}
FAKE CuResult cuGraphDestroy(CuGraph) { return 0; }
FAKE CuResult cuGraphExecDestroy(CuGraphExec) { return 0; }

// NVRTC looks for a driver too and asks it this without a check for null.
FAKE CuResult cuGetExportTable(const void** table, const void*) { return *table = nullptr, 801; }

// The rest is there so that the table is complete.
#define STUB(name) \
  FAKE CuResult name() { return 801; }
STUB(cuCtxSynchronize);
STUB(cuModuleUnload);
STUB(cuOccupancyMaxActiveClusters);
STUB(cuMemAlloc_v2);
STUB(cuMemFree_v2);
STUB(cuMemGetInfo_v2);
STUB(cuMemHostAlloc);
STUB(cuMemFreeHost);
STUB(cuMemcpyHtoD_v2);
STUB(cuMemcpyDtoH_v2);
STUB(cuMemcpyDtoD_v2);
STUB(cuMemcpyAsync);
STUB(cuMemcpyHtoDAsync_v2);
STUB(cuMemcpyDtoHAsync_v2);
STUB(cuMemcpyDtoDAsync_v2);
STUB(cuMemsetD8_v2);
STUB(cuMemsetD8Async);
STUB(cuMemsetD32Async);
STUB(cuPointerGetAttribute);
STUB(cuStreamSynchronize);
STUB(cuStreamQuery);
STUB(cuStreamGetCtx);
STUB(cuStreamWaitEvent);
STUB(cuStreamIsCapturing);
STUB(cuEventCreate);
STUB(cuEventDestroy_v2);
STUB(cuEventRecord);
STUB(cuEventSynchronize);
STUB(cuEventElapsedTime);

FAKE CuResult cuTensorMapEncodeTiled(CuTensorMap* map, int, unsigned, void* base, const std::uint64_t* sizes,
                                     const std::uint64_t*, const std::uint32_t*, const std::uint32_t*, int, int, int,
                                     int) {
  const std::lock_guard lock(mutex);
  ++state.tensor_maps;
  if (const int rc = state.fail_next_map; rc != 0) return state.fail_next_map = 0, rc;
  auto* bytes = reinterpret_cast<char*>(map);
  std::memcpy(bytes, &base, sizeof base);
  std::memcpy(bytes + sizeof base, &sizes[1], sizeof sizes[1]);
  return 0;
}
