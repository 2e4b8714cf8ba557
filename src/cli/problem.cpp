#include "cli/problem.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "base/thread_pool.h"
#include "cli/usage_error.h"
#include "octomoe/checkpoint.h"
#include "octomoe/layer.h"
#include "quant/matrix.h"
#include "quant/numerics.h"

namespace octomoe::cli {
namespace {

// splitmix64 (public domain, S. Vigna): a hash of (seed, stream), and a generator when iterated.
std::uint64_t mix(std::uint64_t z) {
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
struct Random {
  using result_type = std::uint64_t;
  std::uint64_t state;
  Random(std::uint64_t seed, std::uint64_t stream) : state(mix(seed) ^ mix(~stream)) {}
  static constexpr std::uint64_t min() { return 0; }
  static constexpr std::uint64_t max() { return ~std::uint64_t{0}; }
  std::uint64_t operator()() { return mix(state += 0x9e3779b97f4a7c15u); }
  double uniform() { return (static_cast<double>((*this)() >> 11) + 0.5) * 0x1p-53; }  // in (0, 1)
};

// The value below which a part p of the standard normal distribution lies.
double normal_quantile(double p) {
  double low = -8, high = 8;
  for (int i = 0; i < 50; ++i) {
    const double mid = 0.5 * (low + high);
    (0.5 * std::erfc(-mid / std::sqrt(2.0)) < p ? low : high) = mid;
  }
  return 0.5 * (low + high);
}

// N equally likely values of a normal distribution, converted: a random index then costs one load per value.
template <class T, int N, class Convert>
std::array<T, N> normal_table(const Convert& convert) {
  std::array<T, N> table;
  for (int i = 0; i < N; ++i) table[static_cast<std::size_t>(i)] = convert(normal_quantile((i + 0.5) / N));
  return table;
}

constexpr std::int64_t kChunkBytes = 1 << 20;

// fill(bytes, count, random) for every chunk of the tensor, in parallel; the chunks do not depend on the threads.
template <class Fill>
void fill_chunks(const Tensor& t, std::uint64_t seed, int threads, const Fill& fill) {
  const auto bytes = static_cast<std::int64_t>(t.bytes());
  ThreadPool::shared(threads).parallel_for(ceil_div(bytes, kChunkBytes), [&](std::int64_t chunk, int) {
    const std::int64_t begin = chunk * kChunkBytes;
    Random random(seed, static_cast<std::uint64_t>(chunk));
    fill(t.as<char>() + begin, std::min(kChunkBytes, bytes - begin), random);
  });
}

// One table entry per byte of the tensor.
void fill_bytes(const Tensor& t, const std::array<std::uint8_t, 256>& table, std::uint64_t seed, int threads) {
  fill_chunks(t, seed, threads, [&](char* out, std::int64_t count, Random& random) {
    for (std::int64_t i = 0; i < count; i += 8) {
      std::uint64_t word = random();
      std::uint8_t values[8];
      for (std::uint8_t& v : values) v = table[word & 0xff], word >>= 8;
      std::memcpy(out + i, values, static_cast<std::size_t>(std::min<std::int64_t>(8, count - i)));
    }
  });
}

void fill_halves(const Tensor& t, const std::array<std::uint16_t, 4096>& table, std::uint64_t seed, int threads) {
  fill_chunks(t, seed, threads, [&](char* out, std::int64_t count, Random& random) {
    for (std::int64_t i = 0; i < count; i += 8) {
      std::uint64_t word = random();
      std::uint16_t values[4];
      for (std::uint16_t& v : values) v = table[word & 0xfff], word >>= 16;
      std::memcpy(out + i, values, static_cast<std::size_t>(std::min<std::int64_t>(8, count - i)));
    }
  });
}

std::uint8_t int8_byte(double x, double sigma, double limit) {
  return static_cast<std::uint8_t>(static_cast<std::int8_t>(std::clamp(std::nearbyint(x * sigma), -limit, limit)));
}

// Bytes with two signed 4-bit values, each from 16 equally likely quantiles.
std::array<std::uint8_t, 256> int4_table(double sigma) {
  const auto nibble = normal_table<std::uint8_t, 16>([&](double x) { return int8_byte(x, sigma, 7) & 0xf; });
  std::array<std::uint8_t, 256> table;
  for (std::size_t i = 0; i < 256; ++i) table[i] = static_cast<std::uint8_t>(nibble[i & 15] | nibble[i >> 4] << 4);
  return table;
}

double layout_bytes(const Scheme& scheme, std::int64_t e, std::int64_t n, std::int64_t k, int segments) {
  const MatrixLayout l = layout_of(scheme, e, n, k, segments);
  const double q = scheme.kind == SchemeKind::int8_hybrid ? static_cast<double>(e * l.blocks_n * l.blocks_k) : 0.0;
  const double scales = l.scale.rank() > 0 ? 4.0 * static_cast<double>(l.scale.elems()) : 0.0;
  return static_cast<double>(l.values.elems()) * static_cast<double>(size_bytes(l.value_dtype)) + scales + q +
         (scheme.asymmetric ? 4.0 * static_cast<double>(e * n) : 0.0);
}

// The k best of weight_e * Exp(1)^-1 (exponential races): sampling without replacement by popularity.
void draw_experts(const std::vector<double>& popularity, int k, Random& random, std::vector<std::int32_t>& order,
                  std::int32_t* ids) {
  static thread_local std::vector<double> key;
  key.resize(popularity.size());
  for (std::size_t e = 0; e < popularity.size(); ++e) key[e] = -std::log(random.uniform()) / popularity[e];
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](std::int32_t a, std::int32_t b) {
    return key[static_cast<std::size_t>(a)] < key[static_cast<std::size_t>(b)];
  });
  std::copy_n(order.begin(), k, ids);
}

// Routes of a file, repeated when it has fewer tokens.
void read_routes(const std::string& path, const ProblemShape& shape, std::int64_t tokens, const Tensor& ids,
                 const Tensor& weights) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  const int k = shape.top_k;
  Tensor from_ids, from_weights;
  if (file.find("topk_ids")) {
    const Tensor t = file.tensor("topk_ids");
    if (t.view().rank() != 2 || t.dim(1) != k || (t.dtype() != DType::int32 && t.dtype() != DType::int64)) {
      throw Error(ErrorCode::format, fmt::format("{}: topk_ids: expected int32 or int64 [T, {}], got {} {}", path, k,
                                                 to_string(t.dtype()), to_string(t.shape())));
    }
    from_ids = Tensor::empty(DType::int32, t.shape());
    from_weights = Tensor::empty(DType::float32, t.shape());
    for (std::int64_t i = 0; i < t.elems(); ++i) {
      const std::int64_t id = t.dtype() == DType::int32 ? t.as<std::int32_t>()[i] : t.as<std::int64_t>()[i];
      if (id < -1 || id >= shape.experts) {
        throw Error(ErrorCode::format, fmt::format("{}: topk_ids: expected -1 to {}, got {} at element {}", path,
                                                   shape.experts - 1, id, i));
      }
      from_ids.as<std::int32_t>()[i] = static_cast<std::int32_t>(id);
      from_weights.as<float>()[i] = 1.0f / static_cast<float>(k);
    }
  } else {
    std::string name;
    for (const auto& info : file.tensors()) {
      if (name.empty() && (info.name == "router_logits" || info.name.ends_with(".router_logits"))) name = info.name;
    }
    if (name.empty()) throw Error(ErrorCode::format, path + ": expected a tensor topk_ids or router_logits");
    const Tensor logits = file.tensor(name);
    if (logits.view().rank() != 2 || logits.dim(1) != shape.experts) {
      throw Error(ErrorCode::format, fmt::format("{}: {}: expected [T, {}], got {}", path, name, shape.experts,
                                                 to_string(logits.shape())));
    }
    from_ids = Tensor::empty(DType::int32, {logits.dim(0), k});
    from_weights = Tensor::empty(DType::float32, {logits.dim(0), k});
    route(logits, from_weights, from_ids);
  }
  if (from_ids.dim(0) < 1) throw Error(ErrorCode::format, path + ": expected at least one token");
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int64_t row = t % from_ids.dim(0) * k;
    std::copy_n(from_ids.as<std::int32_t>() + row, k, ids.as<std::int32_t>() + t * k);
    std::copy_n(from_weights.as<float>() + row, k, weights.as<float>() + t * k);
  }
}

}  // namespace

double ProblemShape::weight_bytes(const Scheme& scheme) const {
  return layout_bytes(scheme, experts_local, 2 * intermediate, hidden, 2) +
         layout_bytes(scheme, experts_local, hidden, intermediate, 1);
}

Tensor ProblemShape::expert_map() const {
  if (experts_local == experts) return {};
  Tensor map = Tensor::empty(DType::int32, {experts});
  for (std::int64_t e = 0; e < experts; ++e) {
    map.as<std::int32_t>()[e] = e < experts_local ? static_cast<std::int32_t>(e) : -1;
  }
  return map;
}

QuantizedMatrix random_matrix(const Scheme& scheme, Shape shape, int segments, std::uint64_t seed, int threads) {
  // A channel's largest of some thousand Gaussian weights is about 4.5 sigma (int4 groups of 128: 2.8).
  constexpr double kInt8Sigma = 127 / 4.5, kInt4Sigma = 7 / 2.8;
  const MatrixLayout layout = layout_of(scheme, shape[0], shape[1], shape[2], segments);
  QuantizedMatrix m;
  m.scheme = scheme;
  m.experts = shape[0];
  m.n = shape[1];
  m.k = shape[2];
  m.segments = segments;
  m.values = Tensor::empty(layout.value_dtype, layout.values);
  const double weight_sigma = 1.0 / std::sqrt(static_cast<double>(m.k));  // keeps products of order one
  double unit = 1.0;                                                      // one step of the stored integer
  if (scheme.kind == SchemeKind::bf16 || scheme.kind == SchemeKind::fp16) {
    const bool bf16 = scheme.kind == SchemeKind::bf16;
    fill_halves(m.values, normal_table<std::uint16_t, 4096>([&](double x) {
                  const float w = static_cast<float>(x * weight_sigma);
                  return bf16 ? num::float_to_bf16(w) : num::float_to_fp16(w);
                }),
                seed, threads);
  } else if (scheme.kind == SchemeKind::w4a8_fp8) {
    unit = weight_sigma / kInt4Sigma;
    fill_bytes(m.values, int4_table(kInt4Sigma), seed, threads);
  } else {
    unit = weight_sigma / kInt8Sigma;
    fill_bytes(m.values, normal_table<std::uint8_t, 256>([&](double x) { return int8_byte(x, kInt8Sigma, 127); }), seed,
               threads);
  }
  Random random(seed, ~std::uint64_t{0});
  if (scheme.kind == SchemeKind::int8_hybrid) {
    // Block maxima of Gaussian weights lie within a quarter of the largest: Q from 3/4 q_max to q_max.
    m.q = Tensor::empty(DType::uint8, {m.experts, layout.blocks_n, layout.blocks_k});
    const int low = std::max(1, scheme.q_max * 3 / 4), span = scheme.q_max - low + 1;
    for (std::int64_t i = 0; i < m.q.elems(); ++i) {
      m.q.as<std::uint8_t>()[i] =
          static_cast<std::uint8_t>(low + static_cast<int>(random() % static_cast<unsigned>(span)));
    }
    unit /= 0.875 * scheme.q_max;
  }
  if (layout.scale.rank() > 0) {
    m.scale = Tensor::empty(DType::float32, layout.scale);
    for (std::int64_t i = 0; i < m.scale.elems(); ++i) {
      m.scale.as<float>()[i] = static_cast<float>(unit * (0.9 + 0.2 * random.uniform()));
    }
  }
  if (scheme.activation_scale == ActivationScale::static_) {
    const bool fp8 = scheme.kind == SchemeKind::w4a8_fp8;
    m.activation_scale = Tensor::empty(DType::float32, {fp8 ? m.experts : 1});
    std::fill_n(m.activation_scale.as<float>(), m.activation_scale.elems(), fp8 ? 4.5f / 448 : 4.5f / 127);
  }
  finish_matrix(m, segments == 2 ? "w13" : "w2", threads);
  return m;
}

MoeWeights random_weights(const Scheme& scheme, const ProblemShape& shape, std::uint64_t seed, int threads) {
  MoeWeights w;
  w.scheme = scheme;
  w.w13 = random_matrix(scheme, {shape.experts_local, 2 * shape.intermediate, shape.hidden}, 2, mix(seed + 1), threads);
  w.w2 = random_matrix(scheme, {shape.experts_local, shape.hidden, shape.intermediate}, 1, mix(seed + 2), threads);
  return w;
}

Tensor random_activations(std::int64_t rows, std::int64_t columns, std::uint64_t seed) {
  Tensor x = Tensor::empty(DType::bfloat16, {rows, columns});
  const auto table =
      normal_table<std::uint16_t, 4096>([](double v) { return num::float_to_bf16(static_cast<float>(v)); });
  fill_halves(x, table, mix(seed + 3), 0);
  return x;
}

Routing Routing::parse(const std::string& text) {
  Routing r;
  const std::size_t colon = text.find(':');
  const std::string name = text.substr(0, colon), value = colon == std::string::npos ? "" : text.substr(colon + 1);
  const bool bare = colon == std::string::npos;
  if (name == "uniform" && bare) return r;
  if (name == "single" && bare) {
    r.kind = Kind::single;
    return r;
  }
  if (name == "zipf" && !bare) {
    r.kind = Kind::zipf;
    const auto [end, ec] = std::from_chars(value.data(), value.data() + value.size(), r.exponent);
    if (ec == std::errc() && end == value.data() + value.size() && r.exponent >= 0 && r.exponent <= 10) return r;
    throw UsageError(fmt::format("--routing: zipf: expected an exponent of 0 to 10, got '{}'", value));
  }
  if (name == "from-file" && !value.empty()) {
    r.kind = Kind::from_file;
    r.file = value;
    return r;
  }
  throw UsageError(fmt::format("--routing: expected uniform, zipf:S, single or from-file:FILE, got '{}'", text));
}

void Routes::mark(std::vector<bool>& touched) const {
  for (std::int64_t i = 0; i < ids.elems(); ++i) {
    const std::int64_t id = ids.as<std::int32_t>()[i];
    if (id >= 0 && id < static_cast<std::int64_t>(touched.size())) touched[static_cast<std::size_t>(id)] = true;
  }
}

Routes make_routes(const Routing& routing, const ProblemShape& shape, std::int64_t tokens, std::uint64_t seed) {
  const int k = shape.top_k;
  Routes r{Tensor::empty(DType::int32, {tokens, k}), Tensor::empty(DType::float32, {tokens, k})};
  std::int32_t* ids = r.ids.as<std::int32_t>();
  float* weights = r.weights.as<float>();
  Random random(seed, 4);
  if (routing.kind == Routing::Kind::from_file) {
    read_routes(routing.file, shape, tokens, r.ids, r.weights);
  } else {
    const double exponent = routing.kind == Routing::Kind::zipf ? routing.exponent : 0.0;
    std::vector<double> popularity(static_cast<std::size_t>(shape.experts));
    for (std::size_t e = 0; e < popularity.size(); ++e) popularity[e] = std::pow(static_cast<double>(e + 1), -exponent);
    std::shuffle(popularity.begin(), popularity.end(), random);
    std::vector<std::int32_t> order(popularity.size());
    for (std::int64_t t = 0; t < tokens; ++t) {
      if (routing.kind == Routing::Kind::single) {
        std::iota(ids + t * k, ids + (t + 1) * k, 0);
      } else {
        draw_experts(popularity, k, random, order, ids + t * k);
      }
      double sum = 0;
      for (int j = 0; j < k; ++j) sum += weights[t * k + j] = static_cast<float>(-std::log(random.uniform()));
      for (int j = 0; j < k; ++j) weights[t * k + j] = static_cast<float>(weights[t * k + j] / sum);
    }
  }
  for (std::int64_t i = 0; i < tokens * k; ++i) r.local += ids[i] >= 0 && ids[i] < shape.experts_local;
  std::vector<bool> touched(static_cast<std::size_t>(shape.experts_local));
  r.mark(touched);
  r.touched_experts = std::count(touched.begin(), touched.end(), true);
  return r;
}

}  // namespace octomoe::cli
