#include "cli/peer.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <chrono>
#include <filesystem>
#include <span>
#include <thread>

#include "cli/machine.h"
#include "octomoe/error.h"

namespace octomoe::cli {
namespace {

constexpr double kPrepareSeconds = 600, kRunSeconds = 600;

// The threads of OpenMP spin for some milliseconds after a call, ours for less: let them go to sleep before the next
// one is timed.
void settle() { std::this_thread::sleep_for(std::chrono::milliseconds(10)); }

}  // namespace

Peer::Peer() : python_(find_python()) {
  namespace fs = std::filesystem;
  if (python_.empty())
    throw Error(ErrorCode::unsupported, fmt::format("--peer torch: no Python found (looked at {})", kPythonSearch));
  std::vector<std::string> places;
  if (const std::string root = source_root(); !root.empty()) places.push_back(root + "/bench/peer_torch.py");
  if (const std::string bin = executable_folder(); !bin.empty()) {
    places.push_back((fs::path(bin).parent_path() / "share/octomoe/peer_torch.py").string());
  }
  places.emplace_back("bench/peer_torch.py");
  for (const std::string& script : places) {
    std::error_code ec;
    if (!fs::exists(script, ec)) continue;
    child_ = std::make_unique<Child>(std::vector<std::string>{python_, script, "--serve"}, python_environment());
    return;
  }
  throw Error(ErrorCode::unsupported,
              fmt::format("--peer torch: peer_torch.py not found (looked at {})", fmt::join(places, ", ")));
}

nlohmann::json Peer::ask(const nlohmann::json& message, double timeout_s) {
  std::optional<std::string> line;
  if (child_->write_line(message.dump())) line = child_->read_line(timeout_s);
  if (!line) {
    throw Error(ErrorCode::unsupported, child_->timed_out()
                                            ? fmt::format("--peer torch: no answer within {:.0f} s", timeout_s)
                                            : fmt::format("--peer torch: {} ended: {}", python_, child_->error_text()));
  }
  nlohmann::json answer = nlohmann::json::parse(*line, nullptr, false);
  if (!answer.is_object()) throw Error(ErrorCode::format, "--peer torch: not an answer: " + line->substr(0, 200));
  if (answer.contains("error")) {
    throw Error(ErrorCode::unsupported,
                fmt::format("--peer torch: {}: {} (OCTOMOE_PYTHON points to another Python)", python_,
                            answer["error"].is_string() ? answer["error"].get<std::string>() : answer["error"].dump()));
  }
  return answer;
}

void Peer::prepare(const ProblemShape& s, const std::vector<Routing>& routings, int threads, std::uint64_t seed) {
  nlohmann::json ids = nlohmann::json::object();
  for (const Routing& r : routings) {
    const Tensor& t = r.routes.ids;
    ids[std::to_string(r.tokens)] = std::span(t.as<std::int32_t>(), static_cast<std::size_t>(t.elems()));
  }
  const nlohmann::json answer = ask({{"prepare",
                                      {{"experts", s.experts},
                                       {"hidden", s.hidden},
                                       {"intermediate", s.intermediate},
                                       {"top_k", s.top_k},
                                       {"threads", threads},
                                       {"seed", seed & 0x7fffffff},
                                       {"topk_ids", ids}}}},
                                    kPrepareSeconds);
  try {
    ways_ = answer.at("peers").get<std::vector<std::string>>();
    version_ = answer.at("torch").get<std::string>();
  } catch (const nlohmann::json::exception&) {
    throw Error(ErrorCode::format, "--peer torch: not an answer to prepare: " + answer.dump().substr(0, 200));
  }
}

double Peer::run_us(const std::string& way, std::int64_t tokens) {
  settle();
  const nlohmann::json answer = ask({{"time", tokens}, {"peer", way}}, kRunSeconds);
  settle();
  if (!answer.contains("us") || !answer["us"].is_number()) {
    throw Error(ErrorCode::format, "--peer torch: not a time: " + answer.dump().substr(0, 200));
  }
  return answer["us"].get<double>();
}

std::optional<double> Peer::python_overhead_us() {
  try {
    const nlohmann::json answer = ask({{"overhead", true}}, kRunSeconds);
    if (answer.contains("call_us") && answer["call_us"].is_number()) return answer["call_us"].get<double>();
  } catch (const Error&) {  // the package is not there, or has no such function: then it is simply not reported
  }
  return std::nullopt;
}

}  // namespace octomoe::cli
