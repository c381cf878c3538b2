// NoMAD-Attention's look-ups in registers, for `hashml.attention.nomad_native`, which compiles this file.
//
//   codes [blocks, S, 16]   a block is 32 keys; byte t of quantiser s holds the code of key t below, of key t + 16 above
//   tables [S, 16]          uint8, one 128-bit register a quantiser, into which one shuffle looks 16 codes up
//   sums [32 blocks]        uint16, sum over s of tables[s, code of the key]; the caller's tables make them fit
//
// A shuffle of 512 bits looks 4 quantisers up for 16 keys. Bytes are added to 16-bit lanes twice, once whole and once
// shifted right by 8: the second are the odd keys' sums, and the first without 256 times the second the even keys'.
//
// Which instructions are used is decided when the program runs: a file compiled on one machine serves another.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "native_threads.h"
#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define NOMAD_X86 1
#define NOMAD_AVX2 __attribute__((target("avx2,fma")))
#define NOMAD_AVX512 __attribute__((target("avx512f,avx512bw,avx2,fma")))
#endif
#define NOMAD_INLINE inline __attribute__((always_inline))

namespace ffi = xla::ffi;

namespace {

using hashml::in_parallel;

constexpr int64_t kBlock = 32;        // keys of a block
constexpr int64_t kTable = 16;        // entries of a table, and bytes of a block and quantiser
constexpr int64_t kTile = 8;          // blocks that all queries of a group read before the next ones
constexpr int64_t kChunk = 2048;      // keys of a unit of work; fixed, so that threads change no bit of a result
enum Level : int32_t { kAuto = 0, kScalar = 1, kAvx2 = 2, kAvx512 = 3 };

using Scan = void (*)(const uint8_t* tables, const uint8_t* codes, int64_t blocks, int64_t quantisers, uint16_t* sums);

// --- sums of look-ups ---------------------------------------------------------------------------------

void scan_scalar(const uint8_t* tables, const uint8_t* codes, int64_t blocks, int64_t quantisers, uint16_t* sums) {
  for (int64_t b = 0; b < blocks; ++b, sums += kBlock) {
    uint32_t total[kBlock] = {};
    for (int64_t s = 0; s < quantisers; ++s, codes += kTable) {
      const uint8_t* table = tables + s * kTable;
      for (int t = 0; t < kTable; ++t) {
        total[t] += table[codes[t] & 15];
        total[t + 16] += table[codes[t] >> 4];
      }
    }
    for (int t = 0; t < kBlock; ++t) sums[t] = static_cast<uint16_t>(total[t]);
  }
}

#if NOMAD_X86
// Even and odd bytes' sums as keys 0..15 in order.
NOMAD_AVX2 NOMAD_INLINE void store_keys(__m128i whole, __m128i odd, uint16_t* sums) {
  const __m128i even = _mm_sub_epi16(whole, _mm_slli_epi16(odd, 8));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), _mm_unpacklo_epi16(even, odd));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + 8), _mm_unpackhi_epi16(even, odd));
}

NOMAD_AVX2 NOMAD_INLINE __m128i halves(__m256i x) {
  return _mm_add_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}

// The bytes of two quantisers, or of the last one beside zeros: in a table of zeros any code finds 0.
NOMAD_AVX2 NOMAD_INLINE __m256i load_pair(const uint8_t* p, bool pair) {
  return pair ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
              : _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

NOMAD_AVX2 void scan_avx2(const uint8_t* tables, const uint8_t* codes, int64_t blocks, int64_t quantisers,
                          uint16_t* sums) {
  const __m256i nibble = _mm256_set1_epi8(15);
  for (int64_t b = 0; b < blocks; ++b, sums += kBlock, codes += quantisers * kTable) {
    __m256i low = _mm256_setzero_si256(), low_odd = low, high = low, high_odd = low;
    for (int64_t s = 0; s < quantisers; s += 2) {
      const bool pair = s + 1 < quantisers;
      const __m256i c = load_pair(codes + s * kTable, pair), t = load_pair(tables + s * kTable, pair);
      const __m256i first = _mm256_shuffle_epi8(t, _mm256_and_si256(c, nibble));
      const __m256i second = _mm256_shuffle_epi8(t, _mm256_and_si256(_mm256_srli_epi16(c, 4), nibble));
      low = _mm256_add_epi16(low, first);
      low_odd = _mm256_add_epi16(low_odd, _mm256_srli_epi16(first, 8));
      high = _mm256_add_epi16(high, second);
      high_odd = _mm256_add_epi16(high_odd, _mm256_srli_epi16(second, 8));
    }
    store_keys(halves(low), halves(low_odd), sums);
    store_keys(halves(high), halves(high_odd), sums + 16);
  }
}

NOMAD_AVX512 NOMAD_INLINE __m128i quarters(__m512i x) {
  return halves(_mm256_add_epi16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1)));
}

struct Sums512 {
  __m512i low, low_odd, high, high_odd;
};

NOMAD_AVX512 NOMAD_INLINE void add_quad(Sums512& sums, __m512i c, __m512i t) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i first = _mm512_shuffle_epi8(t, _mm512_and_si512(c, nibble));
  const __m512i second = _mm512_shuffle_epi8(t, _mm512_and_si512(_mm512_srli_epi16(c, 4), nibble));
  sums.low = _mm512_add_epi16(sums.low, first);
  sums.low_odd = _mm512_add_epi16(sums.low_odd, _mm512_srli_epi16(first, 8));
  sums.high = _mm512_add_epi16(sums.high, second);
  sums.high_odd = _mm512_add_epi16(sums.high_odd, _mm512_srli_epi16(second, 8));
}

NOMAD_AVX512 void scan_avx512(const uint8_t* tables, const uint8_t* codes, int64_t blocks, int64_t quantisers,
                              uint16_t* sums) {
  const int64_t whole = quantisers / 4 * 4;
  const __mmask64 rest = (1ull << ((quantisers - whole) * kTable)) - 1;
  for (int64_t b = 0; b < blocks; ++b, sums += kBlock, codes += quantisers * kTable) {
    const __m512i zero = _mm512_setzero_si512();
    Sums512 total{zero, zero, zero, zero};
    for (int64_t s = 0; s < whole; s += 4) {
      add_quad(total, _mm512_loadu_si512(codes + s * kTable), _mm512_loadu_si512(tables + s * kTable));
    }
    if (rest) {
      add_quad(total, _mm512_maskz_loadu_epi8(rest, codes + whole * kTable),
               _mm512_maskz_loadu_epi8(rest, tables + whole * kTable));
    }
    store_keys(quarters(total.low), quarters(total.low_odd), sums);
    store_keys(quarters(total.high), quarters(total.high_odd), sums + 16);
  }
}
#endif

Level best_level() {
#if NOMAD_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kScalar;
}

// What is asked for, or the best that this machine has.
Level level_of(int32_t asked) {
  static const Level best = best_level();
  return asked == kAuto ? best : std::min(best, static_cast<Level>(asked));
}

Scan scan_of(Level level) {
#if NOMAD_X86
  if (level == kAvx512) return scan_avx512;
  if (level == kAvx2) return scan_avx2;
#endif
  return scan_scalar;
}

// --- tables -------------------------------------------------------------------------------------------

constexpr float kMost = 1e17f, kLeast = 1e-30f;  // `hashml.attention.nomad` has both, and says why

// One query's tables and their worth. No instructions beyond the least are used, so that all processors round alike.
void query_tables(const float* q, const float* book, int64_t quantisers, int64_t channels, float* products,
                  uint8_t* entries, float* step, float* bias) {
  float widest = 0.0f, spans = 0.0f, least_sum = 0.0f;
  bool number = true;
  for (int64_t s = 0; s < quantisers; ++s) {
    float* lut = products + s * kTable;
    std::fill(lut, lut + kTable, 0.0f);
    for (int64_t c = 0; c < channels; ++c) {
      const float own = std::clamp(q[s * channels + c], -kMost, kMost);
      for (int64_t r = 0; r < kTable; ++r) {
        lut[r] += own * std::clamp(book[(s * kTable + r) * channels + c], -kMost, kMost);
      }
    }
    float least = lut[0], most = lut[0];
    for (int64_t r = 0; r < kTable; ++r) {
      least = std::min(least, lut[r]);
      most = std::max(most, lut[r]);
      number &= lut[r] == lut[r];
    }
    for (int64_t r = 0; r < kTable; ++r) lut[r] -= least;
    widest = std::max(widest, most - least);
    spans += most - least;
    least_sum += least;
  }
  float unit = widest / 255;
  if (quantisers > 257) unit = std::max(unit, spans / (65535 - static_cast<float>(quantisers) / 2));
  unit = std::max(unit, kLeast);
  const float inverse = 1 / unit;
  for (int64_t i = 0; i < quantisers * kTable; ++i) {
    // What is cut off is the fraction of a number that is not negative.
    entries[i] = number ? static_cast<uint8_t>(std::min(products[i] * inverse + 0.5f, 255.0f)) : 0;
  }
  *step = number ? unit : std::numeric_limits<float>::quiet_NaN();
  *bias = least_sum;
}

// --- logits ------------------------------------------------------------------------------------------

using Scale = void (*)(const uint16_t* sums, int64_t keys, float step, float bias, float* out);

NOMAD_INLINE void scale_keys(const uint16_t* sums, int64_t keys, float step, float bias, float* out) {
  for (int64_t n = 0; n < keys; ++n) out[n] = step * static_cast<float>(sums[n]) + bias;
}

void scale_scalar(const uint16_t* sums, int64_t keys, float step, float bias, float* out) {
  scale_keys(sums, keys, step, bias, out);
}
#if NOMAD_X86
NOMAD_AVX2 void scale_avx2(const uint16_t* sums, int64_t keys, float step, float bias, float* out) {
  scale_keys(sums, keys, step, bias, out);
}
NOMAD_AVX512 void scale_avx512(const uint16_t* sums, int64_t keys, float step, float bias, float* out) {
  scale_keys(sums, keys, step, bias, out);
}
#endif

Scale scale_of(Level level) {
#if NOMAD_X86
  if (level == kAvx512) return scale_avx512;
  if (level == kAvx2) return scale_avx2;
#endif
  return scale_scalar;
}

// --- softmax and values -------------------------------------------------------------------------------

// exp(x) for x <= 0, to 2e-7 of it; 0 below -87.
NOMAD_INLINE float exp_negative(float x) {
  const float bounded = x > -87.0f ? x : -87.0f;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const float shifted = bounded * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits, power;
  std::memcpy(&bits, &p, 4);
  std::memcpy(&power, &shifted, 4);
  bits += (power - 0x4B400000) * (1 << 23);
  std::memcpy(&p, &bits, 4);
  return x > -87.0f ? p : 0.0f;
}

struct Problem {
  int64_t rows, group, quantisers, blocks, slots, width;
  const uint8_t *tables, *codes;
  const float *slope, *values;
  const int32_t* length;
};

// What a chunk of keys gives each query of a group, before the division.
struct Partial {
  int32_t top;    // the sum of look-ups that all others are taken relative to
  float mass;
  float* value;   // [width]
};

typedef float Lanes __attribute__((vector_size(64)));

// sum over keys of weight * value, `Vectors` times 16 coordinates of it.
template <int Vectors>
NOMAD_INLINE void add_values(const float* weights, const float* values, int64_t keys, int64_t width, float* out) {
  Lanes total[Vectors];
  std::memcpy(total, out, sizeof(total));
  for (int64_t n = 0; n < keys; ++n) {
    for (int i = 0; i < Vectors; ++i) {
      Lanes row;
      std::memcpy(&row, values + n * width + 16 * i, sizeof(row));
      total[i] += weights[n] * row;
    }
  }
  std::memcpy(out, total, sizeof(total));
}

NOMAD_INLINE void weighted_values(const float* weights, const float* values, int64_t keys, int64_t width, float* out) {
  int64_t at = 0;
  for (; at + 128 <= width; at += 128) add_values<8>(weights, values + at, keys, width, out + at);
  for (; at + 64 <= width; at += 64) add_values<4>(weights, values + at, keys, width, out + at);
  for (; at + 16 <= width; at += 16) add_values<1>(weights, values + at, keys, width, out + at);
  for (int64_t n = 0; n < keys; ++n) {
    for (int64_t i = at; i < width; ++i) out[i] += weights[n] * values[n * width + i];
  }
}

NOMAD_INLINE void attend_chunk(const Problem& p, Scan scan, int64_t row, int64_t first, int64_t keys, Partial* out) {
  const int64_t block_bytes = p.quantisers * kTable, blocks = (keys + kBlock - 1) / kBlock;
  std::vector<uint16_t> sums(p.group * blocks * kBlock);
  std::vector<float> weights(p.group * keys);
  const uint8_t* codes = p.codes + (row * p.blocks + first / kBlock) * block_bytes;
  for (int64_t b = 0; b < blocks; b += kTile) {
    for (int64_t j = 0; j < p.group; ++j) {
      scan(p.tables + (row * p.group + j) * block_bytes, codes + b * block_bytes, std::min(kTile, blocks - b),
           p.quantisers, sums.data() + (j * blocks + b) * kBlock);
    }
  }
  for (int64_t j = 0; j < p.group; ++j) {
    const float slope = p.slope[row * p.group + j];
    const uint16_t* sum = sums.data() + j * blocks * kBlock;
    float* weight = weights.data() + j * keys;
    uint16_t most = sum[0], least = sum[0];
    for (int64_t n = 0; n < keys; ++n) {
      most = std::max(most, sum[n]);
      least = std::min(least, sum[n]);
    }
    const int32_t top = slope >= 0 ? most : least;
    for (int64_t n = 0; n < keys; ++n) weight[n] = exp_negative(slope * static_cast<float>(sum[n] - top));
    float lanes[16] = {};
    int64_t n = 0;
    for (; n + 16 <= keys; n += 16) {
      for (int i = 0; i < 16; ++i) lanes[i] += weight[n + i];
    }
    float mass = 0;
    for (int i = 0; i < 16; ++i) mass += lanes[i];
    for (; n < keys; ++n) mass += weight[n];
    out[j].top = top;
    out[j].mass = mass;
    std::fill(out[j].value, out[j].value + p.width, 0.0f);
  }
  const float* values = p.values + (row * p.slots + first) * p.width;
  for (int64_t n = 0; n < keys; n += kBlock) {
    for (int64_t j = 0; j < p.group; ++j) {
      weighted_values(weights.data() + j * keys + n, values + n * p.width, std::min(kBlock, keys - n), p.width,
                      out[j].value);
    }
  }
}

using Chunk = void (*)(const Problem&, int64_t row, int64_t first, int64_t keys, Partial* out);

void chunk_scalar(const Problem& p, int64_t row, int64_t first, int64_t keys, Partial* out) {
  attend_chunk(p, scan_scalar, row, first, keys, out);
}
#if NOMAD_X86
NOMAD_AVX2 void chunk_avx2(const Problem& p, int64_t row, int64_t first, int64_t keys, Partial* out) {
  attend_chunk(p, scan_avx2, row, first, keys, out);
}
NOMAD_AVX512 void chunk_avx512(const Problem& p, int64_t row, int64_t first, int64_t keys, Partial* out) {
  attend_chunk(p, scan_avx512, row, first, keys, out);
}
#endif

Chunk chunk_of(Level level) {
#if NOMAD_X86
  if (level == kAvx512) return chunk_avx512;
  if (level == kAvx2) return chunk_avx2;
#endif
  return chunk_scalar;
}

// --- what XLA calls -----------------------------------------------------------------------------------

ffi::Error tables(ffi::Buffer<ffi::F32> queries, ffi::Buffer<ffi::F32> codebook, ffi::ResultBuffer<ffi::U8> entries,
                  ffi::ResultBuffer<ffi::F32> step, ffi::ResultBuffer<ffi::F32> bias) {
  const auto of_queries = queries.dimensions(), of_book = codebook.dimensions();
  const int64_t rows = of_queries[0], group = of_queries[1], width = of_queries[2];
  const int64_t heads = of_book[0], quantisers = of_book[1], channels = of_book[3];
  std::vector<float> products(quantisers * kTable);
  for (int64_t query = 0; query < rows * group; ++query) {
    const float* book = codebook.typed_data() + query / group % heads * width * kTable;
    query_tables(queries.typed_data() + query * width, book, quantisers, channels, products.data(),
                 entries->typed_data() + query * quantisers * kTable, step->typed_data() + query,
                 bias->typed_data() + query);
  }
  return ffi::Error::Success();
}

// `take(query, first, keys, scan)` for some blocks of a query's keys at a time, of which the first is the `first` number
// of the result; `scan(sums)` writes their sums.
template <typename Take>
void over_tiles(ffi::ThreadPool& pool, const ffi::Buffer<ffi::U8>& tables, const ffi::Buffer<ffi::U8>& codes,
                Scan scan, const Take& take) {
  const auto of_tables = tables.dimensions(), of_codes = codes.dimensions();
  const int64_t rows = of_tables[0], group = of_tables[1], quantisers = of_tables[2], blocks = of_codes[1];
  const int64_t block_bytes = quantisers * kTable, part = kChunk / kBlock, parts = (blocks + part - 1) / part;
  const uint8_t *table = tables.typed_data(), *code = codes.typed_data();
  in_parallel(pool, rows * parts, [&](int64_t unit) {
    const int64_t row = unit / parts, first = unit % parts * part, last = std::min(blocks, first + part);
    for (int64_t b = first; b < last; b += kTile) {
      for (int64_t j = 0; j < group; ++j) {
        const int64_t query = row * group + j, count = std::min(kTile, last - b);
        take(query, (query * blocks + b) * kBlock, count * kBlock, [&](uint16_t* sums) {
          scan(table + query * block_bytes, code + (row * blocks + b) * block_bytes, count, quantisers, sums);
        });
      }
    }
  });
}

ffi::Error scores(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> tables, ffi::Buffer<ffi::U8> codes,
                  ffi::ResultBuffer<ffi::U16> out, int32_t asked) {
  uint16_t* found = out->typed_data();
  over_tiles(pool, tables, codes, scan_of(level_of(asked)),
             [&](int64_t, int64_t first, int64_t, const auto& scan) { scan(found + first); });
  return ffi::Error::Success();
}

// step * sum + bias, in the pass that makes the sums: by itself it would take as long as they do.
ffi::Error logits(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> tables, ffi::Buffer<ffi::F32> step,
                  ffi::Buffer<ffi::F32> bias, ffi::Buffer<ffi::U8> codes, ffi::ResultBuffer<ffi::F32> out,
                  int32_t asked) {
  const Level level = level_of(asked);
  const Scale scale = scale_of(level);
  const float *steps = step.typed_data(), *biases = bias.typed_data();
  float* found = out->typed_data();
  over_tiles(pool, tables, codes, scan_of(level),
             [&](int64_t query, int64_t first, int64_t keys, const auto& scan) {
               uint16_t sums[kTile * kBlock];
               scan(sums);
               scale(sums, keys, steps[query], biases[query], found + first);
             });
  return ffi::Error::Success();
}

ffi::Error attend(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> tables, ffi::Buffer<ffi::F32> slope,
                  ffi::Buffer<ffi::U8> codes, ffi::Buffer<ffi::F32> values, ffi::Buffer<ffi::S32> length,
                  ffi::ResultBuffer<ffi::F32> out, int32_t asked) {
  const auto of_tables = tables.dimensions(), of_values = values.dimensions();
  const Problem p{of_tables[0],           of_tables[1],       of_tables[2],        codes.dimensions()[1],
                  of_values[1],           of_values[2],       tables.typed_data(), codes.typed_data(),
                  slope.typed_data(),     values.typed_data(), length.typed_data()};
  const int64_t room = std::min(p.slots, p.blocks * kBlock), chunks = std::max<int64_t>(1, (room + kChunk - 1) / kChunk);
  std::vector<float> value(p.rows * chunks * p.group * p.width);
  std::vector<Partial> partial(p.rows * chunks * p.group);
  for (size_t i = 0; i < partial.size(); ++i) partial[i] = {0, 0.0f, value.data() + i * p.width};
  const Chunk chunk = chunk_of(level_of(asked));
  const auto held = [&](int64_t row) { return std::clamp<int64_t>(p.length[row], 0, room); };
  in_parallel(pool, p.rows * chunks, [&](int64_t unit) {
    const int64_t row = unit / chunks, first = unit % chunks * kChunk, keys = std::min(kChunk, held(row) - first);
    if (keys > 0) chunk(p, row, first, keys, partial.data() + unit * p.group);
  });
  for (int64_t query = 0; query < p.rows * p.group; ++query) {
    const int64_t row = query / p.group, used = (held(row) + kChunk - 1) / kChunk;
    const float slope_of = p.slope[query];
    float* answer = out->typed_data() + query * p.width;
    const auto part = [&](int64_t c) { return partial[(row * chunks + c) * p.group + query % p.group]; };
    std::fill(answer, answer + p.width, std::isnan(slope_of) && used ? std::numeric_limits<float>::quiet_NaN() : 0.0f);
    if (!used || std::isnan(slope_of)) continue;
    int32_t top = part(0).top;
    for (int64_t c = 1; c < used; ++c) {
      top = slope_of >= 0 ? std::max(top, part(c).top) : std::min(top, part(c).top);
    }
    float mass = 0;
    for (int64_t c = 0; c < used; ++c) {
      const float factor = exp_negative(slope_of * static_cast<float>(part(c).top - top));
      mass += factor * part(c).mass;
      for (int64_t i = 0; i < p.width; ++i) answer[i] += factor * part(c).value[i];
    }
    for (int64_t i = 0; i < p.width; ++i) answer[i] /= mass;
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(hashml_nomad_tables, tables,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(hashml_nomad_scores, scores,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::U16>>()
                                  .Attr<int32_t>("level"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hashml_nomad_logits, logits,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("level"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hashml_nomad_attend, attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("level"));

// The best level of this machine, for tests.
extern "C" int32_t hashml_nomad_level() { return best_level(); }
