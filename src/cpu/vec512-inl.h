// 16 columns in one AVX-512 register, for IntDriver. Included inside a target region.
struct Vec512 {
  struct Ints {
    __m512i v;
  };
  struct Floats {
    __m512 v;
  };
  static OCTOMOE_INLINE Ints zero() { return {_mm512_setzero_si512()}; }
  static OCTOMOE_INLINE Ints broadcast(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
  static OCTOMOE_INLINE Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static OCTOMOE_INLINE Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static OCTOMOE_INLINE Ints load(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
  static OCTOMOE_INLINE void store(float* p, const Floats& x) { _mm512_storeu_ps(p, x.v); }
  static OCTOMOE_INLINE void store(std::int32_t* p, const Ints& x) { _mm512_storeu_si512(p, x.v); }
  static OCTOMOE_INLINE Floats convert(const Ints& x) { return {_mm512_cvtepi32_ps(x.v)}; }
  static OCTOMOE_INLINE Floats mul(const Floats& a, const Floats& b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static OCTOMOE_INLINE Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
  }
  static OCTOMOE_INLINE Ints mul(const Ints& a, const Ints& b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
  static OCTOMOE_INLINE Ints add(const Ints& a, const Ints& b) { return {_mm512_add_epi32(a.v, b.v)}; }
  static OCTOMOE_INLINE Floats weight_scale(const float* p, int width) { return width == 1 ? broadcast(*p) : load(p); }
  static OCTOMOE_INLINE Ints weight_q(const std::uint8_t* p, int width) {
    if (width == 1) return broadcast(static_cast<std::int32_t>(*p));
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
};
