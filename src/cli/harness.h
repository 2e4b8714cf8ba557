// How run and bench measure: contenders take turns, round by round, so that a clock that drifts, or a neighbour that
// wakes up, hits all of them; medians with a spread are reported, never a mean of the lucky ones.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

namespace octomoe::cli {

// Linear interpolation between order statistics (the "type 7" quantile of R and NumPy). NaN when there is no sample.
inline double quantile(std::vector<double> samples, double q) {
  if (samples.empty()) return std::numeric_limits<double>::quiet_NaN();
  std::sort(samples.begin(), samples.end());
  const double position = std::clamp(q, 0.0, 1.0) * static_cast<double>(samples.size() - 1);
  const auto low = static_cast<std::size_t>(position);
  const std::size_t high = std::min(low + 1, samples.size() - 1);
  return samples[low] + (position - static_cast<double>(low)) * (samples[high] - samples[low]);
}

struct Timing {
  double median_us = 0, p10_us = 0, p90_us = 0, min_us = 0;
  int rounds = 0;

  static Timing of(const std::vector<double>& samples_us) {
    return {quantile(samples_us, 0.5), quantile(samples_us, 0.1), quantile(samples_us, 0.9), quantile(samples_us, 0.0),
            static_cast<int>(samples_us.size())};
  }
  // Half of p10..p90 as a part of the median: what "+-" shows.
  double spread() const { return median_us > 0 ? 0.5 * (p90_us - p10_us) / median_us : 0.0; }
};

template <class Fn>
double time_us(const Fn& fn) {
  const auto begin = std::chrono::steady_clock::now();
  fn();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
}

struct Contender {
  std::string name;
  std::function<double()> once;  // runs once and returns microseconds of a call
  int calls = 1;                 // that `once` makes
};

struct HarnessOptions {
  int warmup = 2;  // untimed rounds
  int iters = 0;   // timed rounds; 0: until min_time_s has passed for every contender
  double min_time_s = 0.5;
  int min_rounds = 5;  // with iters == 0
  int max_rounds = 500;
};

using RoundCallback = std::function<void(int round, double fraction)>;

// One round = every contender once; odd rounds go backwards, so that nobody always follows the same neighbour.
inline std::vector<Timing> interleave(const std::vector<Contender>& contenders, const HarnessOptions& options,
                                      const RoundCallback& on_round = {}) {
  for (int w = 0; w < options.warmup; ++w) {
    for (const Contender& c : contenders) c.once();
  }
  std::vector<std::vector<double>> samples(contenders.size());
  std::vector<double> total_us(contenders.size(), 0.0);
  const auto progress = [&](int done) {
    if (options.iters > 0) return static_cast<double>(done) / options.iters;
    double slowest = 1.0;  // the contender that has had the least time so far decides
    for (const double t : total_us) slowest = std::min(slowest, t / (options.min_time_s * 1e6));
    const double by_rounds = static_cast<double>(done) / options.min_rounds;
    return std::max(std::min(slowest, by_rounds), static_cast<double>(done) / options.max_rounds);
  };
  for (int round = 0; !contenders.empty() && progress(round) < 1.0; ++round) {
    for (std::size_t i = 0; i < contenders.size(); ++i) {
      const std::size_t c = round % 2 ? contenders.size() - 1 - i : i;
      const double us = contenders[c].once();
      samples[c].push_back(us);
      total_us[c] += us * contenders[c].calls;
    }
    if (on_round) on_round(round + 1, std::min(1.0, progress(round + 1)));
  }
  std::vector<Timing> result;
  for (const auto& s : samples) result.push_back(Timing::of(s));
  return result;
}

// The least time any implementation needs: every byte once at the measured bandwidth, every operation at the measured
// peak; whichever is longer.
struct Floor {
  double us = 0;
  bool by_memory = true;
};
inline Floor floor_of(double bytes, double bytes_per_s, double ops, double ops_per_s) {
  const double memory_us = bytes_per_s > 0 ? 1e6 * bytes / bytes_per_s : 0;
  const double compute_us = ops_per_s > 0 ? 1e6 * ops / ops_per_s : 0;
  return {std::max(memory_us, compute_us), memory_us >= compute_us};
}

}  // namespace octomoe::cli
