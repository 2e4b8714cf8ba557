// Tuned tables: which GEMM kernel was the fastest for a matrix stack and a number of rows on a device, as `octomoe
// tune` measured it. Where a table has nothing near, the cost model decides (cuda/gemm.cpp).
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "core/gemm_config.h"

namespace octomoe::plan {

const char* to_string(kernels::Promotion promotion);

// What a choice depends on, beside the rows.
struct TuneKey {
  std::string device;       // the driver's name of it
  int multiprocessors = 0;  // the same device may lend fewer
  kernels::Promotion promotion = kernels::Promotion::channel;
  kernels::Epilogue epilogue = kernels::Epilogue::store;
  int block_k = 0;  // columns of a scale block; channel: 0
  std::int64_t experts = 0, n = 0, k = 0;
  auto operator<=>(const TuneKey&) const = default;
};

struct TuneChoice {
  std::string kernel;                // the catalogue's id: the fastest, or another that is as good as that
  std::map<std::string, double> us;  // of every kernel that was measured

  // The one of `kernels` with that id, or if none has it (a family was asked for that it does not belong to), the
  // fastest that was measured; null if none was. Those of which `usable` is false do not count. One that is not
  // `preferred` must be faster by kMargin than those that are: a table has GEMMs alone, where launches do not overlap.
  template <class Kernel, class Usable, class Preferred>
  const Kernel* best_of(const std::vector<Kernel>& kernels, const Usable& usable, const Preferred& preferred) const {
    const auto fastest = [&](const auto& counts) {
      const Kernel* found = nullptr;
      double least = std::numeric_limits<double>::infinity();
      for (const Kernel& k : kernels) {
        const auto measured = us.find(k.id);
        if (!counts(k) || measured == us.end() || measured->second >= least) continue;
        least = measured->second;
        found = &k;
      }
      return found;
    };
    const auto named = std::find_if(kernels.begin(), kernels.end(), [&](const Kernel& k) { return k.id == kernel; });
    const Kernel* best = named != kernels.end() && usable(*named) ? &*named : fastest(usable);
    if (best == nullptr || preferred(*best) || us.count(best->id) == 0) return best;
    const Kernel* other = fastest([&](const Kernel& k) { return usable(k) && preferred(k); });
    return other != nullptr && us.at(other->id) <= kMargin * us.at(best->id) ? other : best;
  }
  static constexpr double kMargin = 1.06;
};

class TunedTable {
 public:
  // {"version": 1, "entries": [{"device", "multiprocessors", "promotion", "epilogue", "block_k", "experts", "n", "k",
  // "rows", "kernel", "us": {kernel: us}}]}. Error(format) naming `source` and the field. Entries with kernels that the
  // catalogue does not have (another version's) are left out.
  static TunedTable parse(const std::string& text, const std::string& source);
  static TunedTable read(const std::string& path);
  std::string text() const;  // the same, a line for each entry

  void set(const TuneKey& key, std::int64_t rows, TuneChoice choice);
  void merge(const TunedTable& newer);  // its entries win
  // Of the nearest measured number of rows, by ratio; null if none is within a factor of 2.
  const TuneChoice* find(const TuneKey& key, std::int64_t rows) const;
  // Kernels that `find` may answer for this key.
  std::vector<std::string> kernels(const TuneKey& key) const;
  const std::map<TuneKey, std::map<std::int64_t, TuneChoice>>& entries() const { return entries_; }
  bool empty() const { return entries_.empty(); }
  std::size_t size() const;
  std::size_t count(const std::string& device) const;  // entries of that device

 private:
  std::map<TuneKey, std::map<std::int64_t, TuneChoice>> entries_;
};

// The tables that the library takes, later ones winning: share/octomoe/tuned.json, found as the kernel pack is, then
// user_tuned_path(). Read once. A file that cannot be used is a logged warning.
struct TunedFile {
  std::string path = {}, problem = {};  // problem: why it is not used; empty: it is
  TunedTable table = {};
};
const std::vector<TunedFile>& tuned_files();  // those that exist
const TunedTable& tuned_table();              // all of them
// $OCTOMOE_TUNED, else tuned.json in the folder of the kernel cache; empty: no place for it.
std::string user_tuned_path();

}  // namespace octomoe::plan
