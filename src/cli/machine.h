// The machine as the results describe it: no host name, no paths.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace octomoe::cli {

struct Cache {
  int level = 0;
  std::string type;  // "data", "instruction", "unified"
  std::int64_t bytes = 0;
};

struct Machine {
  std::string cpu = "unknown";
  std::string isa;                                     // of the CPU engine
  std::vector<std::string> features;                   // those that matter to the engine, in the kernel's spelling
  int cores = 0;                                       // hardware threads this process may run on
  int physical_cores = 0;                              // 0 = not known
  int threads = 0;                                     // what the engine uses by default
  std::vector<Cache> caches;                           // of the first core
  std::int64_t memory_bytes = 0, available_bytes = 0;  // the smaller of the machine's and the control group's

  static Machine read();
};

nlohmann::ordered_json to_json(const Machine& machine, int threads);

std::string commit();    // of the source tree the command was built in; "unknown" elsewhere
std::string date_utc();  // "2026-01-31T12:00:00Z"

// The source tree that holds the running executable, "" if it is installed elsewhere.
std::string source_root();
std::string executable_folder();

}  // namespace octomoe::cli
