// What this machine can do at most, measured: the yardsticks beside every CPU benchmark number.
#pragma once

namespace octomoe::cpu {

// Bytes a second that `threads` threads read together from a buffer larger than the last-level cache (1 GiB). Takes
// about a second. threads <= 0: default_threads().
double measure_read_bandwidth(int threads = 0);

// INT8 operations (2 per multiply-add) a second of a register-only loop of the instruction that the chosen instruction
// set (isa.h) multiplies with. Takes about 0.3 s. threads <= 0: default_threads().
double measure_int8_peak(int threads = 0);

}  // namespace octomoe::cpu
