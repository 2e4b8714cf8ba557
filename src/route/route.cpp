// Routing: logits -> top-k experts and weights (docs/schemes.md section 7).
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/thread_pool.h"
#include "cuda/engine.h"
#include "layer/check.h"
#include "octomoe/layer.h"
#include "quant/numerics.h"

namespace octomoe {

RouteOptions RouteOptions::ernie45(TensorView bias) {
  RouteOptions o;
  o.correction_bias = bias;
  o.renormalize_min = 1e-12f;
  return o;
}

RouteOptions RouteOptions::deepseek_v3(TensorView bias) {
  RouteOptions o;
  o.scoring = Scoring::sigmoid;
  o.groups = 8;
  o.topk_groups = 4;
  o.correction_bias = bias;
  o.renormalize = Renormalize::add_eps;
  o.renormalize_min = 1e-20f;
  o.scaling_factor = 2.5f;
  return o;
}

namespace {

constexpr std::size_t kLanes = 32;  // partial sums of the softmax: one a lane of a GPU's warp

struct Scratch {
  explicit Scratch(std::size_t experts, std::size_t groups)
      : score(experts), choice(experts), group(groups), kept(groups) {}
  std::vector<float> score, choice, group;
  std::vector<char> kept;
};

void softmax(std::vector<float>& s) {
  float m = s[0];
  for (const float v : s) m = v > m ? v : m;
  float lane[kLanes] = {};
  for (std::size_t i = 0; i < s.size(); ++i) {
    s[i] = num::exp(s[i] - m);
    lane[i % kLanes] += s[i];
  }
  for (std::size_t w = kLanes / 2; w >= 1; w /= 2) {
    for (std::size_t j = 0; j < w; ++j) lane[j] += lane[j + w];
  }
  for (float& v : s) v /= lane[0];
}

// Index of the largest value, the lower one of equals; `taken` values are -Inf already.
std::size_t arg_max(const std::vector<float>& v) {
  std::size_t best = 0;
  for (std::size_t i = 1; i < v.size(); ++i) {
    if (v[i] > v[best]) best = i;
  }
  return best;
}

// Selection scores outside the best groups become -Inf.
void keep_best_groups(Scratch& s, const RouteOptions& o) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  const std::size_t size = s.choice.size() / s.group.size();
  for (std::size_t g = 0; g < s.group.size(); ++g) {
    float first = kLowest, second = kLowest;
    for (std::size_t i = g * size; i < (g + 1) * size; ++i) {
      const float v = s.choice[i];
      if (v > first) {
        second = first;
        first = v;
      } else if (v > second) {
        second = v;
      }
    }
    s.group[g] = o.correction_bias.defined() && size > 1 ? first + second : first;
  }
  std::fill(s.kept.begin(), s.kept.end(), 0);
  for (int n = 0; n < o.topk_groups; ++n) {
    std::size_t best = s.group.size();
    for (std::size_t g = 0; g < s.group.size(); ++g) {
      if (!s.kept[g] && (best == s.group.size() || s.group[g] > s.group[best])) best = g;
    }
    s.kept[best] = 1;
  }
  for (std::size_t i = 0; i < s.choice.size(); ++i) {
    if (!s.kept[i / size]) s.choice[i] = kLowest;
  }
}

void route_token(Scratch& s, const RouteOptions& o, std::size_t k, float* weights, std::int32_t* ids) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  if (o.scoring == Scoring::softmax) {
    softmax(s.score);
  } else {
    for (float& v : s.score) v = num::sigmoid(v);
  }
  for (std::size_t i = 0; i < s.score.size(); ++i) {
    s.choice[i] = o.correction_bias.defined() ? s.score[i] + o.correction_bias.as<float>()[i] : s.score[i];
  }
  if (!std::ranges::all_of(s.choice, num::is_finite)) {  // NaN, or Inf that softmax turned into NaN
    for (std::size_t j = 0; j < k; ++j) {
      weights[j] = num::nan();
      ids[j] = static_cast<std::int32_t>(j);
    }
    return;
  }
  if (o.groups > 1) keep_best_groups(s, o);
  float sum = 0;
  for (std::size_t j = 0; j < k; ++j) {
    const std::size_t best = arg_max(s.choice);
    s.choice[best] = kLowest;
    ids[j] = static_cast<std::int32_t>(best);
    weights[j] = s.score[best];
    sum += weights[j];
  }
  for (std::size_t j = 0; j < k; ++j) {
    if (o.renormalize == Renormalize::divide) weights[j] /= std::max(sum, o.renormalize_min);
    if (o.renormalize == Renormalize::add_eps) weights[j] /= sum + o.renormalize_min;
    weights[j] *= o.scaling_factor;
  }
}

float load(const TensorView& t, std::int64_t row, std::int64_t column) {
  const std::int64_t i = row * t.strides()[0] + column * t.strides()[1];
  if (t.dtype() == DType::float32) return t.as<float>()[i];
  return t.dtype() == DType::bfloat16 ? num::bf16_to_float(t.as<std::uint16_t>()[i])
                                      : num::fp16_to_float(t.as<std::uint16_t>()[i]);
}

}  // namespace

void route(TensorView logits, TensorView topk_weights, TensorView topk_ids, const RouteOptions& o, Stream stream) {
  check_route(logits, topk_weights, topk_ids, o);
  if (logits.device().type == DeviceType::cuda) return cuda::route(logits, topk_weights, topk_ids, o, stream);
  const std::int64_t tokens = logits.dim(0), experts = logits.dim(1), k = topk_ids.dim(1);
  constexpr std::int64_t kTokens = 64;
  ThreadPool::shared().parallel_for((tokens + kTokens - 1) / kTokens, [&](std::int64_t run, int) {
    Scratch s(static_cast<std::size_t>(experts), static_cast<std::size_t>(o.groups));
    for (std::int64_t t = run * kTokens; t < std::min(tokens, (run + 1) * kTokens); ++t) {
      for (std::int64_t e = 0; e < experts; ++e) s.score[static_cast<std::size_t>(e)] = load(logits, t, e);
      route_token(s, o, static_cast<std::size_t>(k), topk_weights.as<float>() + t * topk_weights.strides()[0],
                  topk_ids.as<std::int32_t>() + t * topk_ids.strides()[0]);
    }
  });
}

}  // namespace octomoe
