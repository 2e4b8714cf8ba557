// A peer to compare with, in a process of its own: bench/peer_torch.py, PyTorch's bf16 MoE layer on the CPU, in one or
// two ways. The line protocol is described there.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "cli/problem.h"
#include "cli/subprocess.h"

namespace octomoe::cli {

class Peer {
 public:
  // Starts the process; Error(unsupported) says what is missing: Python or the script.
  Peer();

  struct Routing {
    std::int64_t tokens = 0;
    Routes routes;
  };
  // Makes random weights. Error(unsupported) if the process cannot, e.g. without torch. Afterwards ways() is known.
  void prepare(const ProblemShape& shape, const std::vector<Routing>& routings, int threads, std::uint64_t seed);
  const std::vector<std::string>& ways() const { return ways_; }  // "loop", "grouped"
  const std::string& version() const { return version_; }         // of torch

  double run_us(const std::string& way, std::int64_t tokens);  // one forward call
  // What a call of octomoe from Python costs beside the call itself; unset if the package is not installed there.
  std::optional<double> python_overhead_us();

 private:
  nlohmann::json ask(const nlohmann::json& message, double timeout_s);  // Error if the answer is an error

  std::string python_;
  std::unique_ptr<Child> child_;
  std::vector<std::string> ways_;
  std::string version_;
};

}  // namespace octomoe::cli
