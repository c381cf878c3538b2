// The lookup-table GEMM in registers, for `hashml.weights.lut_gemm_native`, which compiles this file.
//
//   out[m, n] = sum_k weight_level[w[n, k]] activation_level[a[m, k]]         exact in int32, whatever the levels
//
// Two kernels. `blocks` has 64 rows of weights side by side, [blocks, row_bytes, 64], each byte as the row is packed. An
// index of 4 or 6 bits is a run of weights' codes; the activations they meet pick one of few tables, which holds the
// run's sums of products, and one shuffle looks 64 rows up (32 with AVX2):
//
//   nibble    4 bits, 16 entries: 2 codes of 2 bits or one of 4                          pshufb
//   triplet   3 bits, 8 entries: one code of 3 bits                                      pshufb
//   sextet    6 bits, 64 entries: 3 codes of 2 bits or 2 of 3                            AVX-512 VBMI's vpermb
//
// `rows` is the paper's own, for 2 bits: both packed along k, an index is a weight's code beside an activation's, and
// one shuffle looks 64 products up. Neighbours in a byte of the weights have changed places offline, so that no code
// has to be shifted towards its partner: of one pair the weight lies above, of the other the activation.
//
// Entries are bytes above the least entry of all; where they range beyond a byte, each byte of theirs is a plane of
// tables with sums of its own. Bytes are added as long as none can overflow, then widened to 16 bits and to 32. Which
// instructions are used is decided when the program runs: a file compiled on one machine serves another.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "native_threads.h"
#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define LUT_X86 1
#define LUT_AVX2 __attribute__((target("avx2")))
#define LUT_AVX512 __attribute__((target("avx512f,avx512bw,avx512vbmi,avx2")))
#endif
#define LUT_INLINE inline __attribute__((always_inline))

namespace ffi = xla::ffi;

namespace {

using hashml::in_parallel;

constexpr int64_t kBlock = 64;    // rows of weights of a block
constexpr int64_t kTile = 4;      // rows of activations that read the same weights
constexpr int64_t kShare = 64;    // rows of activations of a unit of work
constexpr int64_t kWidened = 240;  // sums of bytes, each below 256, that 16 bits hold, with room for a group of 8
constexpr size_t kLevelOne = 24 << 10;  // bytes of tables that are still at hand beside the weights
enum Level : int32_t { kAuto = 0, kScalar = 1, kAvx2 = 2, kAvx512 = 3 };
enum Index { kNibble, kSextet, kTriplet };

constexpr int bits_of(Index x) { return x == kNibble ? 4 : x == kSextet ? 6 : 3; }
constexpr int bytes_of(Index x) { return x == kNibble ? 1 : 3; }        // of a group of whole indices
constexpr int lookups_of(Index x) { return 8 * bytes_of(x) / bits_of(x); }
constexpr int64_t entries_of(Index x) { return x == kSextet ? 64 : 16; }  // a table of 8 has room for 16

Level best_level() {
#if LUT_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vbmi")) {
    return kAvx512;
  }
  if (__builtin_cpu_supports("avx2")) return kAvx2;
#endif
  return kScalar;
}

// What is asked for, or the best that this machine has.
Level level_of(int32_t asked) {
  static const Level best = best_level();
  return asked == kAuto ? best : std::min(best, static_cast<Level>(asked));
}

// --- tables -------------------------------------------------------------------------------------------

// Entries above the least one, byte by byte: planes[p][i] = (entry[i] - least) >> 8 p.
struct Planes {
  int64_t least = 0;
  std::vector<std::vector<uint8_t>> bytes;
  std::vector<int64_t> largest;  // byte of a plane
};

Planes split(const std::vector<int64_t>& entries) {
  Planes found;
  found.least = *std::min_element(entries.begin(), entries.end());
  const int64_t range = *std::max_element(entries.begin(), entries.end()) - found.least;
  for (int shift = 0; shift == 0 || (shift < 32 && range >> shift); shift += 8) {  // results are modulo 2^32
    std::vector<uint8_t> plane(entries.size());
    for (size_t i = 0; i < entries.size(); ++i) plane[i] = static_cast<uint8_t>((entries[i] - found.least) >> shift);
    found.largest.push_back(*std::max_element(plane.begin(), plane.end()));
    found.bytes.push_back(std::move(plane));
  }
  return found;
}

// Bytes that can be added in a byte.
int64_t room(int64_t largest) { return 255 / std::max<int64_t>(1, largest); }

// --- blocks: 64 rows beside each other ------------------------------------------------------------------

struct Reading {
  int64_t row_bytes;     // of the weights
  int64_t groups;        // of whole indices in a row
  int64_t stride;        // of the selections of a row of activations
  const uint8_t* tables;
  int64_t room;          // look-ups that a byte holds
};

using Block = void (*)(const Reading&, const uint8_t* codes, const uint16_t* selections, uint32_t* sums);

// The bytes of a group of one row; those beyond the row are zeros.
template <Index X>
LUT_INLINE void scalar_indices(const uint8_t* codes, int64_t group, int64_t row_bytes, uint8_t* index) {
  uint32_t word = 0;
  for (int b = 0; b < bytes_of(X); ++b) {
    const int64_t at = group * bytes_of(X) + b;
    if (at < row_bytes) word |= static_cast<uint32_t>(codes[at * kBlock]) << (8 * b);
  }
  for (int j = 0; j < lookups_of(X); ++j) index[j] = (word >> (bits_of(X) * j)) & ((1 << bits_of(X)) - 1);
}

template <Index X, int M>
void block_scalar(const Reading& r, const uint8_t* codes, const uint16_t* selections, uint32_t* sums) {
  for (int64_t n = 0; n < kBlock; ++n) {
    uint32_t total[M] = {};
    uint8_t index[lookups_of(X)];
    for (int64_t g = 0; g < r.groups; ++g) {
      scalar_indices<X>(codes + n, g, r.row_bytes, index);
      for (int m = 0; m < M; ++m) {
        const uint16_t* selected = selections + m * r.stride + g * lookups_of(X);
        for (int j = 0; j < lookups_of(X); ++j) total[m] += r.tables[selected[j] + index[j]];
      }
    }
    for (int m = 0; m < M; ++m) sums[m * kBlock + n] = total[m];
  }
}

#if LUT_X86
// 32 rows, or 64: sums of bytes, of pairs of bytes as 16-bit numbers, and of the upper bytes of these.
template <int M>
struct Sums256 {
  __m256i bytes[M], whole[M], odd[M];
};
template <int M>
struct Sums512 {
  __m512i bytes[M], whole[M], odd[M];
};

template <int M>
LUT_AVX2 LUT_INLINE void widen(Sums256<M>& s, int m) {
  s.whole[m] = _mm256_add_epi16(s.whole[m], s.bytes[m]);
  s.odd[m] = _mm256_add_epi16(s.odd[m], _mm256_srli_epi16(s.bytes[m], 8));
  s.bytes[m] = _mm256_setzero_si256();
}
template <int M>
LUT_AVX512 LUT_INLINE void widen(Sums512<M>& s, int m) {
  s.whole[m] = _mm512_add_epi16(s.whole[m], s.bytes[m]);
  s.odd[m] = _mm512_add_epi16(s.odd[m], _mm512_srli_epi16(s.bytes[m], 8));
  s.bytes[m] = _mm512_setzero_si512();
}

// Even bytes' sums are the whole without 256 times the odd bytes', modulo 2^16.
LUT_INLINE void spill_words(const uint16_t* whole, const uint16_t* odd, int64_t pairs, uint32_t* sums) {
  for (int64_t i = 0; i < pairs; ++i) {
    sums[2 * i] += static_cast<uint16_t>(whole[i] - (odd[i] << 8));
    sums[2 * i + 1] += odd[i];
  }
}
template <int M>
LUT_AVX2 LUT_INLINE void spill(Sums256<M>& s, int m, uint32_t* sums) {
  uint16_t whole[16], odd[16];
  std::memcpy(whole, &s.whole[m], 32);
  std::memcpy(odd, &s.odd[m], 32);
  spill_words(whole, odd, 16, sums);
  s.whole[m] = s.odd[m] = _mm256_setzero_si256();
}
template <int M>
LUT_AVX512 LUT_INLINE void spill(Sums512<M>& s, int m, uint32_t* sums) {
  uint16_t whole[32], odd[32];
  std::memcpy(whole, &s.whole[m], 64);
  std::memcpy(odd, &s.odd[m], 64);
  spill_words(whole, odd, 32, sums);
  s.whole[m] = s.odd[m] = _mm512_setzero_si512();
}

LUT_AVX2 LUT_INLINE __m256i load_256(const uint8_t* codes, int64_t at, int64_t row_bytes) {
  return at < row_bytes ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + at * kBlock))
                        : _mm256_setzero_si256();
}
LUT_AVX512 LUT_INLINE __m512i load_512(const uint8_t* codes, int64_t at, int64_t row_bytes) {
  return at < row_bytes ? _mm512_loadu_si512(codes + at * kBlock) : _mm512_setzero_si512();
}

// Bits that a shift of 16-bit lanes moves in from the neighbour are masked away.
#define LUT_256(shift, mask, x) _mm256_and_si256(_mm256_srli_epi16(x, shift), _mm256_set1_epi8(mask))
#define LUT_256_LEFT(shift, mask, x) _mm256_and_si256(_mm256_slli_epi16(x, shift), _mm256_set1_epi8(mask))
#define LUT_512(shift, mask, x) _mm512_and_si512(_mm512_srli_epi16(x, shift), _mm512_set1_epi8(mask))
#define LUT_512_LEFT(shift, mask, x) _mm512_and_si512(_mm512_slli_epi16(x, shift), _mm512_set1_epi8(mask))

template <Index X>
LUT_AVX2 LUT_INLINE void indices_256(const uint8_t* codes, int64_t g, int64_t row_bytes, __m256i* index) {
  if constexpr (X == kNibble) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + g * kBlock));
    index[0] = LUT_256(0, 15, a);
    index[1] = LUT_256(4, 15, a);
  } else {
    const __m256i a = load_256(codes, 3 * g, row_bytes), b = load_256(codes, 3 * g + 1, row_bytes),
                  c = load_256(codes, 3 * g + 2, row_bytes);
    index[0] = LUT_256(0, 7, a);
    index[1] = LUT_256(3, 7, a);
    index[2] = _mm256_or_si256(LUT_256(6, 3, a), LUT_256_LEFT(2, 4, b));
    index[3] = LUT_256(1, 7, b);
    index[4] = LUT_256(4, 7, b);
    index[5] = _mm256_or_si256(LUT_256(7, 1, b), LUT_256_LEFT(1, 6, c));
    index[6] = LUT_256(2, 7, c);
    index[7] = LUT_256(5, 7, c);
  }
}

template <Index X>
LUT_AVX512 LUT_INLINE void indices_512(const uint8_t* codes, int64_t g, int64_t row_bytes, __m512i* index) {
  if constexpr (X == kNibble) {
    const __m512i a = _mm512_loadu_si512(codes + g * kBlock);
    index[0] = LUT_512(0, 15, a);
    index[1] = LUT_512(4, 15, a);
  } else {
    const __m512i a = load_512(codes, 3 * g, row_bytes), b = load_512(codes, 3 * g + 1, row_bytes),
                  c = load_512(codes, 3 * g + 2, row_bytes);
    if constexpr (X == kSextet) {  // vpermb reads six bits, so those above need no mask
      index[0] = a;
      index[1] = _mm512_or_si512(LUT_512(6, 3, a), LUT_512_LEFT(2, static_cast<char>(0xFC), b));
      index[2] = _mm512_or_si512(LUT_512(4, 15, b), LUT_512_LEFT(4, static_cast<char>(0xF0), c));
      index[3] = LUT_512(2, 63, c);
    } else {
      index[0] = LUT_512(0, 7, a);
      index[1] = LUT_512(3, 7, a);
      index[2] = _mm512_or_si512(LUT_512(6, 3, a), LUT_512_LEFT(2, 4, b));
      index[3] = LUT_512(1, 7, b);
      index[4] = LUT_512(4, 7, b);
      index[5] = _mm512_or_si512(LUT_512(7, 1, b), LUT_512_LEFT(1, 6, c));
      index[6] = LUT_512(2, 7, c);
      index[7] = LUT_512(5, 7, c);
    }
  }
}

template <Index X>
LUT_AVX512 LUT_INLINE __m512i look_up_512(const uint8_t* table, __m512i index) {
  if constexpr (X == kSextet) return _mm512_permutexvar_epi8(index, _mm512_loadu_si512(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), index);
}
LUT_AVX2 LUT_INLINE __m256i look_up_256(const uint8_t* table, __m256i index) {
  return _mm256_shuffle_epi8(
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), index);
}

// Both kernels: look up, add as bytes; widen before a byte is full, spill to 32 bits before 16 bits are. `Careful`
// widens after each look-up, where a byte has no room for the look-ups of a group.
#define LUT_BLOCK(NAME, TARGET, VECTOR, SUMS, ZERO, ADD, INDICES, LOOK_UP, ROWS)                                      \
  template <Index X, int M, bool Careful>                                                                             \
  TARGET void NAME(const Reading& r, const uint8_t* codes, const uint16_t* selections, uint32_t* sums) {              \
    constexpr int lookups = lookups_of(X);                                                                            \
    std::fill(sums, sums + M * kBlock, 0u);                                                                           \
    for (int64_t first = 0; first < kBlock; first += ROWS) {                                                          \
      SUMS<M> s;                                                                                                      \
      for (int m = 0; m < M; ++m) s.bytes[m] = s.whole[m] = s.odd[m] = ZERO();                                        \
      int64_t left = r.room / lookups, widened = 0;                                                                   \
      for (int64_t g = 0; g < r.groups; ++g) {                                                                        \
        VECTOR index[lookups];                                                                                        \
        INDICES<X>(codes + first, g, r.row_bytes, index);                                                             \
        for (int j = 0; j < lookups; ++j) {                                                                           \
          for (int m = 0; m < M; ++m) {                                                                               \
            const uint8_t* table = r.tables + selections[m * r.stride + g * lookups + j];                             \
            s.bytes[m] = ADD(s.bytes[m], LOOK_UP(table, index[j]));                                                   \
            if (Careful) widen(s, m);                                                                                 \
          }                                                                                                           \
        }                                                                                                             \
        if (!Careful && --left) continue;                                                                             \
        if (!Careful) {                                                                                               \
          for (int m = 0; m < M; ++m) widen(s, m);                                                                    \
          left = r.room / lookups;                                                                                    \
        }                                                                                                             \
        widened += Careful ? lookups : 1;                                                                             \
        if (widened < kWidened) continue;                                                                             \
        for (int m = 0; m < M; ++m) spill(s, m, sums + m * kBlock + first);                                           \
        widened = 0;                                                                                                  \
      }                                                                                                               \
      for (int m = 0; m < M; ++m) {                                                                                   \
        widen(s, m);                                                                                                  \
        spill(s, m, sums + m * kBlock + first);                                                                       \
      }                                                                                                               \
    }                                                                                                                 \
  }
LUT_BLOCK(block_avx2, LUT_AVX2, __m256i, Sums256, _mm256_setzero_si256, _mm256_add_epi8, indices_256, look_up_256, 32)
LUT_BLOCK(block_avx512, LUT_AVX512, __m512i, Sums512, _mm512_setzero_si512, _mm512_add_epi8, indices_512,
          look_up_512<X>, 64)
#endif

template <Index X, int M>
Block block_of(Level level, int64_t room) {
#if LUT_X86
  const bool careful = room < lookups_of(X);
  if (level == kAvx512) return careful ? block_avx512<X, M, true> : block_avx512<X, M, false>;
  if constexpr (X != kSextet) {
    if (level == kAvx2) return careful ? block_avx2<X, M, true> : block_avx2<X, M, false>;
  }
#endif
  return block_scalar<X, M>;
}

Block block_of(Index x, bool tile, Level level, int64_t room) {
  switch (x) {
    case kNibble: return tile ? block_of<kNibble, kTile>(level, room) : block_of<kNibble, 1>(level, room);
    case kSextet: return tile ? block_of<kSextet, kTile>(level, room) : block_of<kSextet, 1>(level, room);
    default: return tile ? block_of<kTriplet, kTile>(level, room) : block_of<kTriplet, 1>(level, room);
  }
}

// Sums of products of a run of codes, for every run of activations' codes, of which `activations.size()` is none. Runs
// grow by a code: a longer one's entry is a shorter one's and the last product.
std::vector<int64_t> run_tables(Index x, int bits, const std::vector<int64_t>& activations,
                                const std::vector<int64_t>& weights) {
  const int64_t choices = static_cast<int64_t>(activations.size()) + 1, levels = int64_t{1} << bits;
  std::vector<int64_t> found(entries_of(x), 0);
  int64_t tables = 1, entries = 1;
  for (int i = 0; i < bits_of(x) / bits; ++i, tables *= choices, entries *= levels) {
    std::vector<int64_t> longer(tables * choices * entries_of(x), 0);
    for (int64_t a = 0; a < choices; ++a) {
      for (int64_t t = 0; t < tables; ++t) {
        int64_t* to = longer.data() + (a * tables + t) * entries_of(x);
        for (int64_t w = 0; w < levels; ++w) {
          const int64_t last = a < choices - 1 ? activations[a] * weights[w] : 0;
          for (int64_t e = 0; e < entries; ++e) to[w * entries + e] = found[t * entries_of(x) + e] + last;
        }
      }
    }
    found = std::move(longer);
  }
  return found;
}

// Where the table of each index of a row of activations begins; codes beyond the last level are read as the last.
void select_tables(Index x, int bits, const uint8_t* codes, int64_t columns, int64_t levels, int64_t count,
                   uint16_t* selections) {
  const int run = bits_of(x) / bits;
  for (int64_t i = 0; i < count; ++i) {
    int64_t table = 0, place = 1;
    for (int64_t k = i * run; k < (i + 1) * run; ++k, place *= levels + 1) {
      table += place * (k < columns ? std::min<int64_t>(codes[k], levels - 1) : levels);
    }
    selections[i] = static_cast<uint16_t>(table * entries_of(x));
  }
}

// Of two that a level serves, the one with the longer runs where its tables are few beside the look-ups.
Index index_of(int bits, size_t levels, Level level, int64_t products) {
  const size_t choices = levels + 1, runs = bits == 2 ? choices * choices * choices : choices * choices;
  const size_t entries = runs * entries_of(kSextet);
  const int64_t lookups = products / (kBlock * 6 / bits);
  const bool pays = entries <= kLevelOne && lookups > 4 * static_cast<int64_t>(entries);
  if (bits != 4 && level == kAvx512 && pays) return kSextet;
  return bits == 3 ? kTriplet : kNibble;
}

// --- rows: the paper's ----------------------------------------------------------------------------------

using Dot = void (*)(const uint8_t* activations, const uint8_t* weights, int64_t bytes, const uint8_t* tables,
                     int64_t room, uint64_t* sums);

// Tables for an index with the weight above, then for one with the activation above.
template <int M>
void dot_scalar(const uint8_t* activations, const uint8_t* weights, int64_t bytes, const uint8_t* tables, int64_t,
                uint64_t* sums) {
  for (int m = 0; m < M; ++m) {
    uint64_t total = 0;
    for (int64_t i = 0; i < bytes; ++i) {
      const uint8_t a = activations[m * bytes + i], w = weights[i];
      const uint8_t first = (a & 0x33) | (w & 0xCC), second = (w & 0x33) | (a & 0xCC);
      total += tables[first & 15] + tables[first >> 4] + tables[16 + (second & 15)] + tables[16 + (second >> 4)];
    }
    sums[m] = total;
  }
}

#if LUT_X86
// `_mm256_sad_epu8` adds eight bytes into 64 bits.
template <int M>
LUT_AVX2 void dot_avx2(const uint8_t* activations, const uint8_t* weights, int64_t bytes, const uint8_t* tables,
                       int64_t room, uint64_t* sums) {
  const __m256i zero = _mm256_setzero_si256(), low = _mm256_set1_epi8(15), keep = _mm256_set1_epi8(0x33);
  const __m256i above = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tables)));
  const __m256i below = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tables + 16)));
  __m256i part[M], total[M];
  for (int m = 0; m < M; ++m) part[m] = total[m] = zero;
  const int64_t rounds = room / 4;
  int64_t left = rounds;
  for (int64_t i = 0; i < bytes; i += 32) {
    const int64_t here = std::min<int64_t>(32, bytes - i);
    alignas(32) uint8_t last[32] = {};
    if (here < 32) std::memcpy(last, weights + i, here);
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(here < 32 ? last : weights + i));
    for (int m = 0; m < M; ++m) {
      alignas(32) uint8_t rest[32] = {};
      const uint8_t* from = activations + m * bytes + i;
      if (here < 32) std::memcpy(rest, from, here);
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(here < 32 ? rest : from));
      const __m256i first = _mm256_or_si256(_mm256_and_si256(keep, a), _mm256_andnot_si256(keep, w));
      const __m256i second = _mm256_or_si256(_mm256_and_si256(keep, w), _mm256_andnot_si256(keep, a));
      const __m256i products[4] = {
          _mm256_shuffle_epi8(above, _mm256_and_si256(first, low)),
          _mm256_shuffle_epi8(above, _mm256_and_si256(_mm256_srli_epi16(first, 4), low)),
          _mm256_shuffle_epi8(below, _mm256_and_si256(second, low)),
          _mm256_shuffle_epi8(below, _mm256_and_si256(_mm256_srli_epi16(second, 4), low))};
      for (int j = 0; j < 4; ++j) {
        if (rounds) part[m] = _mm256_add_epi8(part[m], products[j]);
        else total[m] = _mm256_add_epi64(total[m], _mm256_sad_epu8(products[j], zero));
      }
    }
    if (!rounds || --left) continue;
    for (int m = 0; m < M; ++m) {
      total[m] = _mm256_add_epi64(total[m], _mm256_sad_epu8(part[m], zero));
      part[m] = zero;
    }
    left = rounds;
  }
  for (int m = 0; m < M; ++m) {
    uint64_t lanes[4];
    total[m] = _mm256_add_epi64(total[m], _mm256_sad_epu8(part[m], zero));
    std::memcpy(lanes, &total[m], 32);
    sums[m] = lanes[0] + lanes[1] + lanes[2] + lanes[3];
  }
}

template <int M>
LUT_AVX512 void dot_avx512(const uint8_t* activations, const uint8_t* weights, int64_t bytes, const uint8_t* tables,
                           int64_t room, uint64_t* sums) {
  const __m512i zero = _mm512_setzero_si512(), low = _mm512_set1_epi8(15), keep = _mm512_set1_epi8(0x33);
  const __m512i above = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tables)));
  const __m512i below = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tables + 16)));
  __m512i part[M], total[M];
  for (int m = 0; m < M; ++m) part[m] = total[m] = zero;
  const int64_t rounds = room / 4;
  int64_t left = rounds;
  for (int64_t i = 0; i < bytes; i += 64) {
    const __mmask64 here = bytes - i >= 64 ? ~0ull : (1ull << (bytes - i)) - 1;
    const __m512i w = _mm512_maskz_loadu_epi8(here, weights + i);
    for (int m = 0; m < M; ++m) {
      const __m512i a = _mm512_maskz_loadu_epi8(here, activations + m * bytes + i);
      const __m512i first = _mm512_ternarylogic_epi64(keep, a, w, 0xCA);  // keep ? a : w
      const __m512i second = _mm512_ternarylogic_epi64(keep, w, a, 0xCA);
      const __m512i products[4] = {
          _mm512_shuffle_epi8(above, _mm512_and_si512(first, low)),
          _mm512_shuffle_epi8(above, _mm512_and_si512(_mm512_srli_epi16(first, 4), low)),
          _mm512_shuffle_epi8(below, _mm512_and_si512(second, low)),
          _mm512_shuffle_epi8(below, _mm512_and_si512(_mm512_srli_epi16(second, 4), low))};
      for (int j = 0; j < 4; ++j) {
        if (rounds) part[m] = _mm512_add_epi8(part[m], products[j]);
        else total[m] = _mm512_add_epi64(total[m], _mm512_sad_epu8(products[j], zero));
      }
    }
    if (!rounds || --left) continue;
    for (int m = 0; m < M; ++m) {
      total[m] = _mm512_add_epi64(total[m], _mm512_sad_epu8(part[m], zero));
      part[m] = zero;
    }
    left = rounds;
  }
  for (int m = 0; m < M; ++m) {
    sums[m] = _mm512_reduce_add_epi64(_mm512_add_epi64(total[m], _mm512_sad_epu8(part[m], zero)));
  }
}
#endif

Dot dot_of(Level level, bool tile) {
#if LUT_X86
  if (level == kAvx512) return tile ? dot_avx512<kTile> : dot_avx512<1>;
  if (level == kAvx2) return tile ? dot_avx2<kTile> : dot_avx2<1>;
#endif
  return tile ? dot_scalar<kTile> : dot_scalar<1>;
}

// Bytes of a row that a kernel reads, zeros beyond it included.
int64_t read_bytes(Level level, int64_t bytes) {
  const int64_t vector = level == kAvx512 ? 64 : level == kAvx2 ? 32 : 1;
  return (bytes + vector - 1) / vector * vector;
}

// --- what XLA calls -----------------------------------------------------------------------------------

std::vector<int64_t> levels_of(const ffi::Buffer<ffi::S32>& levels) {
  return {levels.typed_data(), levels.typed_data() + levels.element_count()};
}

ffi::Error blocks(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> activations, ffi::Buffer<ffi::U8> codes,
                  ffi::Buffer<ffi::S32> activation_levels, ffi::Buffer<ffi::S32> weight_levels,
                  ffi::ResultBuffer<ffi::S32> out, int32_t bits, int32_t asked) {
  const int64_t count = activations.dimensions()[0], columns = activations.dimensions()[1];
  const int64_t row_bytes = codes.dimensions()[1], rows = out->dimensions()[1];
  const Level level = level_of(asked);
  const std::vector<int64_t> levels = levels_of(activation_levels);
  const Index index = index_of(bits, levels.size(), level, count * rows * columns);
  const Planes planes = split(run_tables(index, bits, levels, levels_of(weight_levels)));
  const int64_t groups = (row_bytes + bytes_of(index) - 1) / bytes_of(index), stride = groups * lookups_of(index);
  std::vector<uint16_t> selections(count * stride);
  const int64_t shares = (count + kShare - 1) / kShare, row_blocks = (rows + kBlock - 1) / kBlock;
  in_parallel(pool, shares, [&](int64_t share) {
    for (int64_t m = share * kShare; m < std::min(count, (share + 1) * kShare); ++m) {
      select_tables(index, bits, activations.typed_data() + m * columns, columns,
                    static_cast<int64_t>(levels.size()), stride, selections.data() + m * stride);
    }
  });
  const uint32_t least = static_cast<uint32_t>(planes.least * stride);
  in_parallel(pool, row_blocks * shares, [&](int64_t unit) {
    const int64_t block = unit / shares, first = unit % shares * kShare, last = std::min(count, first + kShare);
    const int64_t here = std::min(kBlock, rows - block * kBlock);
    for (int64_t m = first; m < last;) {
      const bool tile = last - m >= kTile;
      uint32_t sums[kTile * kBlock];
      for (size_t p = 0; p < planes.bytes.size(); ++p) {
        const Reading reading{row_bytes, groups, stride, planes.bytes[p].data(), room(planes.largest[p])};
        block_of(index, tile, level, reading.room)(reading, codes.typed_data() + block * row_bytes * kBlock,
                                                   selections.data() + m * stride, sums);
        for (int64_t i = 0; i < (tile ? kTile : 1); ++i) {
          int32_t* answer = out->typed_data() + (m + i) * rows + block * kBlock;
          for (int64_t n = 0; n < here; ++n) {
            const uint32_t before = p ? static_cast<uint32_t>(answer[n]) : least;
            answer[n] = static_cast<int32_t>(before + (sums[i * kBlock + n] << (8 * p)));
          }
        }
      }
      m += tile ? kTile : 1;
    }
  });
  return ffi::Error::Success();
}

ffi::Error rows(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> activations, ffi::Buffer<ffi::U8> codes,
                ffi::Buffer<ffi::S32> activation_levels, ffi::Buffer<ffi::S32> weight_levels,
                ffi::ResultBuffer<ffi::S32> out, int32_t columns, int32_t asked) {
  const int64_t count = activations.dimensions()[0], bytes = activations.dimensions()[1];
  const int64_t rows = codes.dimensions()[0];
  const Level level = level_of(asked);
  const std::vector<int64_t> a = levels_of(activation_levels), w = levels_of(weight_levels);
  std::vector<int64_t> entries(32);
  for (int i = 0; i < 16; ++i) {
    entries[i] = w[i >> 2] * a[i & 3];
    entries[16 + i] = a[i >> 2] * w[i & 3];
  }
  const Planes planes = split(entries);
  // Bits beyond the last column are zeros, so their products are that of the first codes.
  const int64_t read = 4 * read_bytes(level, bytes), padded = read - columns;
  const uint32_t least = static_cast<uint32_t>(planes.least * read - padded * entries[0]);
  const int64_t row_blocks = (rows + kBlock - 1) / kBlock;
  in_parallel(pool, row_blocks, [&](int64_t block) {
    for (int64_t m = 0; m < count;) {
      const bool tile = count - m >= kTile;
      const Dot dot = dot_of(level, tile);
      for (int64_t n = block * kBlock; n < std::min(rows, (block + 1) * kBlock); ++n) {
        for (size_t p = 0; p < planes.bytes.size(); ++p) {
          uint64_t sums[kTile];
          dot(activations.typed_data() + m * bytes, codes.typed_data() + n * bytes, bytes, planes.bytes[p].data(),
              room(planes.largest[p]), sums);
          for (int64_t i = 0; i < (tile ? kTile : 1); ++i) {
            int32_t& answer = out->typed_data()[(m + i) * rows + n];
            const uint32_t before = p ? static_cast<uint32_t>(answer) : least;
            answer = static_cast<int32_t>(before + (static_cast<uint32_t>(sums[i]) << (8 * p)));
          }
        }
      }
      m += tile ? kTile : 1;
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(hashml_lut_blocks, blocks,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int32_t>("bits")
                                  .Attr<int32_t>("level"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hashml_lut_rows, rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int32_t>("columns")
                                  .Attr<int32_t>("level"));

// The best level of this machine, for tests.
extern "C" int32_t hashml_lut_level() { return best_level(); }
