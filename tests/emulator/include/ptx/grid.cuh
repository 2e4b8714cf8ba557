// Stands for kernels/ptx/grid.cuh: kernels run one after another here, but what one sees of the one before is said by
// Launch::predecessor.
#pragma once

namespace octomoe::ptx {

inline void grid_dependency_wait() { emulator::grid_dependency_wait(); }
inline void grid_dependency_launch() {}
template <int kRegisters>
inline void raise_registers() {}
template <int kRegisters>
inline void lower_registers() {}

}  // namespace octomoe::ptx
