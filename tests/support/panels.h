// Weights in panels (WeightLayout) for tests.
#pragma once

#include <utility>

#include "octomoe/weights.h"
#include "quant/matrix.h"

namespace octomoe::testing {

inline QuantizedMatrix in_panels(QuantizedMatrix m) {
  m.values = to_panels(m.values);
  m.layout = WeightLayout::panels;
  return m;
}

// Either matrix, or both.
inline MoeWeights in_panels(MoeWeights w, bool w13 = true, bool w2 = true) {
  if (w13) w.w13 = in_panels(std::move(w.w13));
  if (w2) w.w2 = in_panels(std::move(w.w2));
  return w;
}

}  // namespace octomoe::testing
