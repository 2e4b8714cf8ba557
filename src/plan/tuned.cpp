#include "plan/tuned.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <span>

#include "base/log.h"
#include "jit/cache.h"
#include "jit/catalogue.h"
#include "jit/kernel_store.h"
#include "plan/catalogue.h"
#include "tensor/check.h"

namespace octomoe::plan {
namespace {

using kernels::Epilogue;
using kernels::Promotion;

constexpr int kVersion = 1;

// Kernels that add have no entries of their own: they are chosen as those that store.
constexpr auto kTunedEpilogues = std::span(kEpilogueNames).first<3>();

template <class Enum>
Enum named(const std::string& text, std::span<const char* const> names, const std::string& where) {
  const auto at = std::find(names.begin(), names.end(), text);
  if (at == names.end()) fail(ErrorCode::format, "{}: \"{}\" is not known", where, text);
  return static_cast<Enum>(at - names.begin());
}

}  // namespace

const char* to_string(Promotion promotion) { return kPromotionNames[static_cast<int>(promotion)]; }

TunedTable TunedTable::parse(const std::string& text, const std::string& source) {
  TunedTable table;
  try {
    const auto json = nlohmann::json::parse(text);
    if (const int version = json.at("version"); version != kVersion) {
      fail(ErrorCode::format, "{}: version: expected {}, got {}", source, kVersion, version);
    }
    for (const auto& e : json.at("entries")) {
      const TuneKey key{.device = e.at("device"),
                        .multiprocessors = e.at("multiprocessors"),
                        .promotion = named<Promotion>(e.at("promotion"), kPromotionNames, source + ": promotion"),
                        .epilogue = named<Epilogue>(e.at("epilogue"), kTunedEpilogues, source + ": epilogue"),
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

std::string TunedTable::text() const {
  std::string lines;
  for (const auto& [key, by_rows] : entries_) {
    for (const auto& [rows, choice] : by_rows) {
      const nlohmann::ordered_json entry{{"device", key.device},
                                         {"multiprocessors", key.multiprocessors},
                                         {"promotion", to_string(key.promotion)},
                                         {"epilogue", kTunedEpilogues[static_cast<std::size_t>(key.epilogue)]},
                                         {"block_k", key.block_k},
                                         {"experts", key.experts},
                                         {"n", key.n},
                                         {"k", key.k},
                                         {"rows", rows},
                                         {"kernel", choice.kernel},
                                         {"us", choice.us}};
      lines += (lines.empty() ? "\n" : ",\n") + entry.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    }
  }
  return fmt::format("{{\"version\": {}, \"entries\": [{}\n]}}\n", kVersion, lines);
}

std::size_t TunedTable::size() const {
  std::size_t n = 0;
  for (const auto& [key, by_rows] : entries_) n += by_rows.size();
  return n;
}

std::size_t TunedTable::count(const std::string& device) const {
  std::size_t n = 0;
  for (const auto& [key, by_rows] : entries_) n += key.device == device ? by_rows.size() : 0;
  return n;
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

const std::vector<TunedFile>& tuned_files() {
  static const std::vector<TunedFile>* files = [] {
    auto* all = new std::vector<TunedFile>;
    // Of the installed ones the nearest.
    std::vector<std::string> paths;
    std::error_code ignored;
    for (std::string& path : jit::installed_files("tuned.json")) {
      if (paths.empty() && std::filesystem::exists(path, ignored)) paths.push_back(std::move(path));
    }
    if (std::string user = user_tuned_path(); !user.empty() && std::filesystem::exists(user, ignored)) {
      paths.push_back(std::move(user));
    }
    for (const std::string& path : paths) {
      TunedFile file{.path = path};
      try {
        file.table = TunedTable::read(path);
      } catch (const Error& e) {
        file.problem = e.what();
        log(LogLevel::warning, fmt::format("the tuned table is not used: {}", file.problem));
      }
      all->push_back(std::move(file));
    }
    return all;
  }();
  return *files;
}

const TunedTable& tuned_table() {
  static const TunedTable* table = [] {
    auto* all = new TunedTable;
    for (const TunedFile& file : tuned_files()) all->merge(file.table);
    return all;
  }();
  return *table;
}

}  // namespace octomoe::plan
