#include "cli/machine.h"

#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

#include "base/thread_pool.h"
#include "cli/subprocess.h"
#include "cpu/isa.h"

namespace octomoe::cli {
namespace {

namespace fs = std::filesystem;

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// "name : value" lines of /proc files; "" if absent.
std::string proc_value(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const std::size_t end = line.find_last_not_of(" \t", colon == 0 ? 0 : colon - 1);
    if (line.compare(0, end + 1, name) != 0) continue;
    const std::size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

std::int64_t size_of(const std::string& text) {  // "32K", "1024 kB", "max"
  try {
    std::size_t end = 0;
    const std::int64_t value = std::stoll(text, &end);
    while (end < text.size() && text[end] == ' ') ++end;
    const char unit = end < text.size() ? static_cast<char>(std::toupper(text[end])) : 'B';
    return unit == 'K' ? value << 10 : unit == 'M' ? value << 20 : unit == 'G' ? value << 30 : value;
  } catch (const std::exception&) {
    return 0;
  }
}

std::vector<std::string> interesting_features() {
  std::string flags = proc_value("/proc/cpuinfo", "flags");            // x86
  if (flags.empty()) flags = proc_value("/proc/cpuinfo", "Features");  // Arm
  static constexpr std::array kNames = {"sse4_1",   "avx",           "avx2",        "fma",         "f16c",
                                        "avx_vnni", "avx_vnni_int8", "avx512f",     "avx512bw",    "avx512vl",
                                        "avx512dq", "avx512_vnni",   "avx512_bf16", "avx512_fp16", "avx512_vbmi",
                                        "amx_tile", "amx_int8",      "amx_bf16",    "amx_fp16",    "asimd",
                                        "asimddp",  "i8mm",          "bf16",        "sve",         "sve2"};
  std::set<std::string> present;
  std::istringstream words(flags);
  for (std::string word; words >> word;) present.insert(word);
  std::vector<std::string> found;
  for (const char* name : kNames) {
    if (present.contains(name)) found.emplace_back(name);
  }
  return found;
}

std::vector<Cache> read_caches() {
  std::vector<Cache> caches;
  for (int i = 0; i < 8; ++i) {
    const std::string folder = fmt::format("/sys/devices/system/cpu/cpu0/cache/index{}/", i);
    const std::int64_t bytes = size_of(first_line(folder + "size"));
    if (bytes <= 0) continue;
    std::string type = first_line(folder + "type");
    std::transform(type.begin(), type.end(), type.begin(), [](unsigned char c) { return std::tolower(c); });
    caches.push_back({static_cast<int>(size_of(first_line(folder + "level"))), type, bytes});
  }
  return caches;
}

int count_physical_cores() {
  std::set<std::string> cores;
  const int configured = static_cast<int>(sysconf(_SC_NPROCESSORS_CONF));
  for (int i = 0; i < configured; ++i) {
    const std::string folder = fmt::format("/sys/devices/system/cpu/cpu{}/topology/", i);
    const std::string core = first_line(folder + "core_id");
    if (!core.empty()) cores.insert(fmt::format("{}:{}", first_line(folder + "physical_package_id"), core));
  }
  return static_cast<int>(cores.size());
}

}  // namespace

Machine Machine::read() {
  Machine m;
  for (const char* name : {"model name", "Model", "cpu model", "Hardware"}) {
    const std::string value = proc_value("/proc/cpuinfo", name);
    if (!value.empty()) {
      m.cpu = value;
      break;
    }
  }
  m.isa = cpu::isa_name();
  m.features = interesting_features();
  cpu_set_t set;
  CPU_ZERO(&set);
  m.cores =
      sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  m.physical_cores = count_physical_cores();
  m.threads = default_threads();
  m.caches = read_caches();
  m.memory_bytes = size_of(proc_value("/proc/meminfo", "MemTotal"));
  m.available_bytes = size_of(proc_value("/proc/meminfo", "MemAvailable"));
  const std::int64_t limit = size_of(first_line("/sys/fs/cgroup/memory.max"));
  if (limit > 0 && limit < m.memory_bytes) {
    const std::int64_t used = size_of(first_line("/sys/fs/cgroup/memory.current"));
    m.memory_bytes = limit;
    m.available_bytes = std::min(m.available_bytes, std::max<std::int64_t>(0, limit - used));
  }
  return m;
}

nlohmann::ordered_json to_json(const Machine& m, int threads) {
  nlohmann::ordered_json caches = nlohmann::ordered_json::array();
  for (const Cache& c : m.caches) caches.push_back({{"level", c.level}, {"type", c.type}, {"bytes", c.bytes}});
  return {{"cpu", m.cpu},
          {"isa", m.isa},
          {"features", m.features},
          {"cores", m.cores},
          {"physical_cores", m.physical_cores},
          {"threads", threads},
          {"caches", caches},
          {"memory_bytes", m.memory_bytes}};
}

std::string executable_folder() {
  std::error_code ec;
  const fs::path self = fs::read_symlink("/proc/self/exe", ec);
  return ec ? "" : self.parent_path().string();
}

std::string source_root() {
  for (fs::path p = executable_folder(); !p.empty() && p != p.root_path(); p = p.parent_path()) {
    std::error_code ec;
    if (fs::exists(p / ".git", ec) && fs::exists(p / "include/octomoe/octomoe.h", ec)) return p.string();
  }
  return "";
}

std::string commit() {
  const std::string root = source_root();
  if (root.empty()) return "unknown";
  std::string hash = capture({"git", "-C", root, "rev-parse", "--short=12", "HEAD"}).value_or("");
  while (!hash.empty() && std::isspace(static_cast<unsigned char>(hash.back()))) hash.pop_back();
  if (hash.empty() || hash.find_first_not_of("0123456789abcdef") != std::string::npos) return "unknown";
  const auto changes = capture({"git", "-C", root, "status", "--porcelain", "--untracked-files=no"});
  return changes && !changes->empty() ? hash + "-dirty" : hash;
}

std::string date_utc() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[32];
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

}  // namespace octomoe::cli
