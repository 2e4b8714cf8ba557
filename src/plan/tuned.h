// Tuned tables: which GEMM kernel was the fastest for a matrix stack and a number of rows on a device, as `octomoe tune`
// measured it. Where a table has nothing near, the cost model decides (cuda/gemm.cpp).
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <tuple>
#include <vector>

#include "core/gemm_config.h"

namespace octomoe::plan {

// What a choice depends on, beside the rows.
struct TuneKey {
  std::string device;  // the driver's name of it
  kernels::Promotion promotion = kernels::Promotion::channel;
  kernels::Epilogue epilogue = kernels::Epilogue::store;
  int block_k = 0;  // columns of a scale block; channel: 0
  std::int64_t experts = 0, n = 0, k = 0;
  auto operator<=>(const TuneKey&) const = default;
};

struct TuneChoice {
  std::string kernel;               // the catalogue's id
  std::map<std::string, double> us;  // of every kernel that was measured
};

class TunedTable {
 public:
  // {"version": 1, "entries": [{"device", "promotion", "epilogue", "block_k", "experts", "n", "k", "rows", "kernel",
  // "us": {kernel: us}}]}. Error(format) naming `source` and the field. Entries with kernels that the catalogue does not
  // have (another version's) are left out.
  static TunedTable parse(const std::string& text, const std::string& source);
  static TunedTable read(const std::string& path);
  nlohmann::ordered_json json() const;

  void set(const TuneKey& key, std::int64_t rows, TuneChoice choice);
  void merge(const TunedTable& newer);  // its entries win
  // Of the nearest measured number of rows, by ratio; null if none is within a factor of 2.
  const TuneChoice* find(const TuneKey& key, std::int64_t rows) const;
  // Kernels that `find` may answer for this key.
  std::vector<std::string> kernels(const TuneKey& key) const;
  const std::map<TuneKey, std::map<std::int64_t, TuneChoice>>& entries() const { return entries_; }
  bool empty() const { return entries_.empty(); }

 private:
  std::map<TuneKey, std::map<std::int64_t, TuneChoice>> entries_;
};

// The table that came with the library (share/octomoe/tuned.json beside it), then $OCTOMOE_TUNED, else
// tuned.json in the folder of the kernel cache. Read once. A file that cannot be read is a logged warning.
const TunedTable& tuned_table();
std::string user_tuned_path();  // empty: no place for it

}  // namespace octomoe::plan
