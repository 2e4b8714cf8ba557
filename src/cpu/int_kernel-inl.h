// The driver that all integer kernels share: tiles of rows, K-blocks and their promotion. An instruction set gives
//
//   Ints, Floats             16 columns of int32 or float32
//   zero(), load, store, convert, broadcast, ...
//   kJoint, kSingle          most rows that fit its registers with two panels or one
//   dot<M, P>(acc, ...)      acc[m][p] += rows times columns over a run of K
//
// Included inside a target region (cpu/target.h) and an anonymous namespace by each kernel's file. The float steps are
// those of docs/schemes.md section 3: the first product stands alone, the others are fused.
template <class S>
struct IntDriver {
  using Ints = typename S::Ints;
  using Floats = typename S::Floats;

  // One call of a tile: rows and panel it begins at, K-blocks [begin, end) (without blocks: columns), and how much of
  // the next unit it fetches ahead.
  struct Tile {
    int row, panel;
    std::int64_t begin, end;
    const char* ahead;
    std::int64_t lines;
  };

  template <int M, int P>
  static OCTOMOE_INLINE void dot(const IntUnit& u, Tile& t, std::int64_t a_offset, std::int64_t first,
                                 std::int64_t length, Ints (&acc)[M][P]) {
    const char* a = static_cast<const char*>(u.a) + t.row * u.a_stride + a_offset * S::kRowBytes;
    const std::int8_t* w = u.w + t.panel * u.panel_bytes + first * kPanel;
    S::template dot<M, P>(acc, a, u.a_stride, w, u.panel_bytes, length, t.ahead, t.lines);
  }

  template <int M, int P>
  static OCTOMOE_INLINE void dot_block(const IntUnit& u, Tile& t, std::int64_t b, Ints (&acc)[M][P]) {
    const std::int64_t first = b * u.block_k;
    OCTOMOE_UNROLL
    for (int m = 0; m < M; ++m) {
      OCTOMOE_UNROLL
      for (int p = 0; p < P; ++p) acc[m][p] = S::zero();
    }
    dot<M, P>(u, t, b * u.a_block_stride, first, first + u.block_k <= u.k ? u.block_k : u.k - first, acc);
  }

  // Element (row m, panel p) of a [2][rows][16] result.
  template <class T>
  static OCTOMOE_INLINE T* at(T* c, const IntUnit& u, const Tile& t, int m, int p) {
    return c + ((t.panel + p) * u.rows + t.row + m) * kPanel;
  }

  template <int M, int P>
  static OCTOMOE_INLINE void run_none(const IntUnit& u, Tile& t) {
    auto* c = static_cast<std::int32_t*>(u.c);
    Ints acc[M][P];
    OCTOMOE_UNROLL
    for (int m = 0; m < M; ++m) {
      OCTOMOE_UNROLL
      for (int p = 0; p < P; ++p) acc[m][p] = t.begin == 0 ? S::zero() : S::load(at(c, u, t, m, p));
    }
    dot<M, P>(u, t, t.begin, t.begin, t.end - t.begin, acc);
    OCTOMOE_UNROLL
    for (int m = 0; m < M; ++m) {
      OCTOMOE_UNROLL
      for (int p = 0; p < P; ++p) S::store(at(c, u, t, m, p), acc[m][p]);
    }
  }

  template <int M, int P>
  static OCTOMOE_INLINE void run_block(const IntUnit& u, Tile& t) {
    for (std::int64_t b = t.begin; b < t.end; ++b) {
      Ints acc[M][P];
      dot_block<M, P>(u, t, b, acc);
      OCTOMOE_UNROLL
      for (int p = 0; p < P; ++p) {
        const Floats sw = S::weight_scale(u.sw + ((t.panel + p) * u.blocks + b) * u.width, u.width);
        OCTOMOE_UNROLL
        for (int m = 0; m < M; ++m) {
          float* v = at(static_cast<float*>(u.c), u, t, m, p);
          const Floats scale = S::mul(sw, S::broadcast(u.sa[(t.row + m) * u.blocks + b]));
          const Floats x = S::convert(acc[m][p]);
          S::store(v, b == 0 ? S::mul(x, scale) : S::fma(x, scale, S::load(v)));
        }
      }
    }
  }

  template <int M, int P>
  static OCTOMOE_INLINE void run_hybrid(const IntUnit& u, Tile& t) {
    for (std::int64_t b = t.begin; b < t.end; ++b) {
      const std::int64_t g = b / u.super_group, place = (b - g * u.super_group) % u.flush_blocks;
      const bool last = place == u.flush_blocks - 1 || b == u.blocks - 1 || (b + 1) % u.super_group == 0;
      Ints acc[M][P];
      dot_block<M, P>(u, t, b, acc);
      OCTOMOE_UNROLL
      for (int p = 0; p < P; ++p) {
        const Ints qw = S::weight_q(u.qw + ((t.panel + p) * u.blocks + b) * u.width, u.width);
        const Floats sw = S::weight_scale(u.sw + ((t.panel + p) * u.super_groups + g) * u.width, u.width);
        OCTOMOE_UNROLL
        for (int m = 0; m < M; ++m) {
          const Ints q = S::mul(qw, S::broadcast(u.qa[(t.row + m) * u.blocks + b]));
          std::int32_t* chunk = at(u.chunk, u, t, m, p);
          Ints sum = S::mul(q, acc[m][p]);
          if (place != 0) sum = S::add(sum, S::load(chunk));
          if (!last) {
            S::store(chunk, sum);
            continue;
          }
          float* v = at(static_cast<float*>(u.c), u, t, m, p);
          const Floats scale = S::mul(sw, S::broadcast(u.sa[(t.row + m) * u.super_groups + g]));
          const Floats x = S::convert(sum);
          S::store(v, b < u.flush_blocks && g == 0 ? S::mul(x, scale) : S::fma(x, scale, S::load(v)));
        }
      }
    }
  }

  template <int M, int P>
  static void run_tile(const IntUnit& u, Tile t) {
    switch (u.promote) {
      case Promote::none:
        return run_none<M, P>(u, t);
      case Promote::block:
        return run_block<M, P>(u, t);
      case Promote::hybrid:
        return run_hybrid<M, P>(u, t);
    }
  }

  template <int P, int M>
  static OCTOMOE_INLINE void dispatch(int m, const IntUnit& u, const Tile& t) {
    if constexpr (M > 0) {
      if (m == M) return run_tile<M, P>(u, t);
      dispatch<P, M - 1>(m, u, t);
    }
  }

  // Rows in tiles of nearly equal size (8 rows: 4 + 4, not 6 + 2), each fetching its share of the next unit. K is cut
  // so that a slice of a panel and of a tile's rows stay in the first-level cache while the tiles pass over it.
  static void run(const IntUnit& u) {
    constexpr bool kOnlyJoint = S::kSingle <= S::kJoint;
    const int most = u.rows <= S::kJoint || kOnlyJoint ? S::kJoint : S::kSingle;
    const bool joint = most == S::kJoint;
    const int tiles = (u.rows + most - 1) / most, passes = joint ? 1 : 2;
    const bool blocks = u.promote != Promote::none;
    const std::int64_t all = blocks ? u.blocks : u.k;
    const std::int64_t slice = tiles == 1 ? all : (blocks ? (S::kSlice + u.block_k - 1) / u.block_k : S::kSlice);
    const std::int64_t slices = (all + slice - 1) / slice;
    const std::int64_t lines = u.prefetch ? 2 * u.panel_bytes / 64 / (tiles * passes * slices) : 0;
    const char* ahead = u.prefetch;
    for (int p = 0; p < passes; ++p) {
      for (std::int64_t begin = 0; begin < all; begin += slice) {
        for (int i = 0, row = 0; i < tiles; ++i, ahead += lines * 64) {
          const int m = u.rows / tiles + (i < u.rows % tiles);
          const Tile t{row, p, begin, begin + slice < all ? begin + slice : all, ahead, lines};
          if constexpr (kOnlyJoint) {
            dispatch<2, S::kJoint>(m, u, t);
          } else {
            joint ? dispatch<2, S::kJoint>(m, u, t) : dispatch<1, S::kSingle>(m, u, t);
          }
          row += m;
        }
      }
    }
  }
};
