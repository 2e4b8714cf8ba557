// All kernels of kernels/, for the host compiler. Without a change: include/ comes before kernels/ in the include path,
// so that its ptx/ headers stand for the real ones, and cuda.h has what CUDA C++ has built in.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "emulator/cuda.h"
#include "emulator/machine.h"

// The host's float steps (src/quant/numerics.h) live in octomoe::num as well, and tests compare the two.
#define num device_num
#include "quant/activate_rows.cuh"
#include "quant/panels.cuh"
#include "quant/quantize_rows.cuh"
#include "route/combine.cuh"
#include "route/group_index.cuh"
#include "route/route.cuh"
#include "route/shared_gate.cuh"
#include "route/sort.cuh"
#include "sm80/grouped_gemm.cuh"
#include "sm90/few_down.cuh"
#include "sm90/few_gate_up.cuh"
#include "sm90/grouped_gemm.cuh"
#include "sm90/sort.cuh"
#include "sm90/token_major.cuh"
#undef num
