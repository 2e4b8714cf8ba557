#include "plan/tuned.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "base/log.h"
#include "jit/catalogue.h"
#include "jit/cache.h"
#include "jit/kernel_store.h"
#include "tensor/check.h"

namespace octomoe::plan {
namespace {

using kernels::Epilogue;
using kernels::Promotion;

constexpr const char* kPromotions[] = {"channel", "block", "hybrid", "hybrid_flush"};
constexpr const char* kEpilogues[] = {"store", "swiglu", "swiglu_block"};
constexpr int kVersion = 1;

template <class Enum, std::size_t kCount>
Enum named(const std::string& text, const char* const (&names)[kCount], const std::string& where) {
  const auto at = std::find(std::begin(names), std::end(names), text);
  if (at == std::end(names)) fail(ErrorCode::format, "{}: \"{}\" is not known", where, text);
  return static_cast<Enum>(at - std::begin(names));
}

}  // namespace

TunedTable TunedTable::parse(const std::string& text, const std::string& source) {
  TunedTable table;
  try {
    const auto json = nlohmann::json::parse(text);
    if (const int version = json.at("version"); version != kVersion) {
      fail(ErrorCode::format, "{}: version: expected {}, got {}", source, kVersion, version);
    }
    for (const auto& e : json.at("entries")) {
      const TuneKey key{.device = e.at("device"),
                        .promotion = named<Promotion>(e.at("promotion"), kPromotions, source + ": promotion"),
                        .epilogue = named<Epilogue>(e.at("epilogue"), kEpilogues, source + ": epilogue"),
                        .block_k = e.at("block_k"),
                        .experts = e.at("experts"),
                        .n = e.at("n"),
                        .k = e.at("k")};
      const std::int64_t rows = e.at("rows");
      if (rows <= 0) fail(ErrorCode::format, "{}: rows: expected a positive number, got {}", source, rows);
      TuneChoice choice{e.at("kernel"), e.at("us").get<std::map<std::string, double>>()};
      if (find_kernel(choice.kernel) != nullptr) table.set(key, rows, std::move(choice));
    }
  } catch (const nlohmann::json::exception& e) {
    fail(ErrorCode::format, "{}: {}", source, e.what());
  }
  return table;
}

TunedTable TunedTable::read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(ErrorCode::io, "{}: cannot be opened", path);
  return parse({std::istreambuf_iterator<char>(file), {}}, path);
}

nlohmann::ordered_json TunedTable::json() const {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const auto& [key, by_rows] : entries_) {
    for (const auto& [rows, choice] : by_rows) {
      list.push_back({{"device", key.device},
                      {"promotion", kPromotions[static_cast<int>(key.promotion)]},
                      {"epilogue", kEpilogues[static_cast<int>(key.epilogue)]},
                      {"block_k", key.block_k},
                      {"experts", key.experts},
                      {"n", key.n},
                      {"k", key.k},
                      {"rows", rows},
                      {"kernel", choice.kernel},
                      {"us", choice.us}});
    }
  }
  return {{"version", kVersion}, {"entries", list}};
}

void TunedTable::set(const TuneKey& key, std::int64_t rows, TuneChoice choice) {
  entries_[key][rows] = std::move(choice);
}

void TunedTable::merge(const TunedTable& newer) {
  for (const auto& [key, by_rows] : newer.entries_) {
    for (const auto& [rows, choice] : by_rows) set(key, rows, choice);
  }
}

const TuneChoice* TunedTable::find(const TuneKey& key, std::int64_t rows) const {
  const auto found = entries_.find(key);
  if (found == entries_.end() || rows <= 0) return nullptr;
  const TuneChoice* best = nullptr;
  double least = 2.0;
  const auto consider = [&](const auto& entry) {
    const double a = static_cast<double>(entry.first), b = static_cast<double>(rows);
    const double ratio = a > b ? a / b : b / a;
    if (ratio <= least) {
      least = ratio;
      best = &entry.second;
    }
  };
  const auto above = found->second.lower_bound(rows);
  if (above != found->second.end()) consider(*above);
  if (above != found->second.begin()) consider(*std::prev(above));
  return best;
}

std::vector<std::string> TunedTable::kernels(const TuneKey& key) const {
  std::vector<std::string> ids;
  const auto found = entries_.find(key);
  if (found == entries_.end()) return ids;
  for (const auto& [rows, choice] : found->second) {
    if (std::find(ids.begin(), ids.end(), choice.kernel) == ids.end()) ids.push_back(choice.kernel);
  }
  return ids;
}

std::string user_tuned_path() {
  if (const char* path = std::getenv("OCTOMOE_TUNED"); path != nullptr && *path != 0) return path;
  const std::string folder = jit::DiskCache::default_folder();
  return folder.empty() ? "" : (std::filesystem::path(folder) / "tuned.json").string();
}

const TunedTable& tuned_table() {
  static const TunedTable* table = [] {
    auto* all = new TunedTable;
    std::vector<std::string> paths = jit::installed_files("tuned.json");
    std::reverse(paths.begin(), paths.end());  // the nearest one wins
    if (std::string user = user_tuned_path(); !user.empty()) paths.push_back(std::move(user));
    for (const std::string& path : paths) {
      std::error_code ignored;
      if (!std::filesystem::exists(path, ignored)) continue;
      try {
        all->merge(TunedTable::read(path));
      } catch (const Error& e) {
        log(LogLevel::warning, fmt::format("the tuned table is not used: {}", e.what()));
      }
    }
    return all;
  }();
  return *table;
}

}  // namespace octomoe::plan
