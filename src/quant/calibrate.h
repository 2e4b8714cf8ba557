// Calibration one expert at a time, for callers that do not hold all of w13.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "octomoe/calibrate.h"

namespace octomoe {

// Bits of the largest magnitudes that one expert saw; 0 = none.
struct Peaks {
  std::uint32_t x = 0, act = 0;
};

// The rows of x, by expert.
class CalibrationRows {
 public:
  // Error as calibrate(); `experts` bounds the ids.
  CalibrationRows(TensorView x, TensorView topk_ids, std::int64_t experts, TensorView topk_weights = {});

  std::int64_t hidden() const { return x_.dim(1); }
  // w: [N, H] of `expert`, or its halves (`second` [N/2, H] behind `first`), whose rows are contiguous. `name` names
  // the weights in errors.
  Peaks peaks(std::int64_t expert, TensorView first, TensorView second, const CalibrateOptions& options,
              const std::string& name) const;

 private:
  struct Row {
    std::int64_t token;
    float weight;  // 1 unless the router's weight multiplies the input
  };
  Tensor x_;                            // float32, contiguous
  std::vector<std::uint32_t> x_peak_;   // by token
  std::vector<std::vector<Row>> rows_;  // by expert
};

// The scales of all experts of a layer from what each saw.
ActivationScales scales_of(const Scheme& scheme, const std::vector<Peaks>& peaks);

}  // namespace octomoe
