// Huffman chunks on one core, for `hashml.coding.huffman_native`, which compiles this file.
//
//   words     the stream from the highest bit, lanes of `steps` units of four symbols, see huffman_chunks.py
//   table     length << 8 | symbol for every value of the next `max_length` bits
//   pairs     the same for two symbols: bits of both << 16 | second << 8 | first, made here
//
// A code begins where the one before it ends, so that a lane alone waits for one look-up after another. Eight lanes
// take turns here: a processor that runs ahead has the look-ups of all of them in flight. A window of 64 bits holds a
// unit, four words of at most 14 bits, which two look-ups of pairs answer unless their words are long. Symbols go to a
// tile that stays in the cache, and leave it row by row, joined with the rest of their numbers (a sign above, some bits
// below), so that no array of symbols is written and read.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "units are written as little-endian words"
#endif

namespace {

constexpr int64_t kUnit = 4;          // symbols of a unit
constexpr int kTogether = 8;          // lanes that take turns
constexpr int64_t kTile = 1 << 17;    // bytes of a tile, roughly: rows of some pages, all in the second cache
constexpr int64_t kPad = 64;          // bytes between rows, lest they all fall into few sets of a cache
constexpr int64_t kLongest = 14;      // bits of the longest word
constexpr int kPairBits = 15;         // of the largest table of pairs, 128 KB
constexpr uint32_t kLong = 1u << 31;  // a pair whose words do not fit in a look-up

struct Lanes {
  const uint32_t* words;
  int64_t size;
  const uint32_t* bases;
  const uint16_t* starts;
  int64_t group;  // lanes that share a base
  int64_t steps;
  const uint16_t* table;
  int max_length;
  std::vector<uint32_t> pairs;  // empty where too many are long
  int pair_bits;

  uint64_t first_bit(int64_t lane) const { return uint64_t{bases[lane / group]} * 32 + starts[lane]; }

  // Whether a lane that begins at this bit never looks beyond the stream, whatever it reads.
  bool inside(uint64_t bit) const {
    return static_cast<int64_t>((bit + kUnit * kLongest * static_cast<uint64_t>(steps)) >> 5) + 3 <= size;
  }
};

// 64 bits from this one on; what lies beyond the stream is zero.
template <bool kInside>
inline uint64_t window(const Lanes& lanes, uint64_t bit) {
  const int64_t at = static_cast<int64_t>(bit >> 5);
  const int shift = static_cast<int>(bit & 31);
  const auto word = [&](int64_t i) -> uint64_t { return kInside || i < lanes.size ? lanes.words[i] : 0; };
  return (word(at) << 32 | word(at + 1)) << shift | word(at + 2) >> (32 - shift);
}

// Tables of pairs from as many bits as a word may have, up to the size at which one of 32 look-ups finds a long pair
// when bits are fair coins.
void add_pairs(Lanes& lanes) {
  for (int bits = lanes.max_length; bits <= kPairBits; ++bits) {
    std::vector<uint32_t> pairs(size_t{1} << bits);
    const uint32_t mask = (1u << bits) - 1;
    size_t longs = 0;
    for (uint32_t i = 0; i <= mask; ++i) {
      const uint32_t first = lanes.table[i >> (bits - lanes.max_length)];
      const uint32_t after = (i << (first >> 8)) & mask;
      const uint32_t second = lanes.table[after >> (bits - lanes.max_length)];
      const uint32_t used = (first >> 8) + (second >> 8);
      const bool fits = used <= static_cast<uint32_t>(bits);
      pairs[i] = fits ? used << 16 | (second & 255) << 8 | (first & 255) : kLong;
      longs += !fits;
    }
    if (longs * 32 <= pairs.size()) {
      lanes.pairs = std::move(pairs);
      lanes.pair_bits = bits;
      return;
    }
  }
}

// Two symbols as in `pairs`, and the window after them.
inline uint32_t two(const uint16_t* table, int shift, uint64_t& ahead) {
  const uint32_t first = table[ahead >> shift];
  ahead <<= first >> 8;
  const uint32_t second = table[ahead >> shift];
  ahead <<= second >> 8;
  return ((first >> 8) + (second >> 8)) << 16 | (second & 255) << 8 | (first & 255);
}

// All symbols of `n` neighbouring lanes, unit t of each in row t of the tile.
template <int n, bool kInside, bool kPairs>
void decode_lanes(const Lanes& lanes, int64_t lane, uint8_t* tile, int64_t row_bytes) {
  uint64_t bit[n];
  for (int i = 0; i < n; ++i) bit[i] = lanes.first_bit(lane + i);
  const uint16_t* table = lanes.table;
  const uint32_t* pairs = lanes.pairs.data();
  const int shift = 64 - lanes.max_length, pair_shift = 64 - lanes.pair_bits;
  for (int64_t t = 0; t < lanes.steps; ++t, tile += row_bytes) {
    for (int i = 0; i < n; ++i) {
      uint64_t ahead = window<kInside>(lanes, bit[i]);
      uint32_t half[2];
      for (uint32_t& found : half) {
        if (kPairs) {
          found = pairs[ahead >> pair_shift];
          if (__builtin_expect(found & kLong, 0)) {
            found = two(table, shift, ahead);
          } else {
            ahead <<= found >> 16;
          }
        } else {
          found = two(table, shift, ahead);
        }
      }
      bit[i] += (half[0] >> 16) + (half[1] >> 16);
      const uint32_t unit = (half[0] & 0xFFFF) | half[1] << 16;
      std::memcpy(tile + kUnit * i, &unit, kUnit);
    }
  }
}

template <int n>
void decode_lanes(const Lanes& lanes, int64_t lane, uint8_t* tile, int64_t row_bytes) {
  bool inside = true;
  for (int i = 0; i < n; ++i) inside = inside && lanes.inside(lanes.first_bit(lane + i));
  if (!inside) {
    decode_lanes<n, false, false>(lanes, lane, tile, row_bytes);
  } else if (lanes.pairs.empty()) {
    decode_lanes<n, true, false>(lanes, lane, tile, row_bytes);
  } else {
    decode_lanes<n, true, true>(lanes, lane, tile, row_bytes);
  }
}

// --- symbols and rests as numbers ---------------------------------------------------------------------
// `begin` is a multiple of 4, so that rests of a nibble or of two bits begin with a byte there.

struct Bytes {
  uint8_t* out;
  void operator()(const uint8_t* symbols, int64_t begin, int64_t n) const { std::memcpy(out + begin, symbols, n); }
};

struct Words16 {  // bfloat16, float16: a rest is a byte
  const uint8_t* rest;
  uint16_t* out;
  void operator()(const uint8_t* symbols, int64_t begin, int64_t n) const {
    const uint8_t* r = rest + begin;
    uint16_t* o = out + begin;
    for (int64_t i = 0; i < n; ++i) {
      o[i] = static_cast<uint16_t>((r[i] & 0x80) << 8 | symbols[i] << 7 | (r[i] & 0x7F));
    }
  }
};

inline uint8_t e4m3(uint32_t symbol, uint32_t nibble) {
  return static_cast<uint8_t>((nibble & 8) << 4 | symbol << 3 | (nibble & 7));
}

struct Nibbles {  // float8_e4m3fn, a symbol a code
  const uint8_t* rest;
  uint8_t* out;
  void operator()(const uint8_t* symbols, int64_t begin, int64_t n) const {
    const uint8_t* r = rest + begin / 2;
    uint8_t* o = out + begin;
    for (int64_t i = 0; i < n / 2; ++i) {
      o[2 * i] = e4m3(symbols[2 * i], r[i] >> 4);
      o[2 * i + 1] = e4m3(symbols[2 * i + 1], r[i] & 15);
    }
    if (n % 2) o[n - 1] = e4m3(symbols[n - 1], r[n / 2] >> 4);
  }
};

struct Pairs {  // float8_e4m3fn, two symbols a code
  const uint8_t* rest;
  uint8_t* out;
  int64_t numbers;
  void operator()(const uint8_t* symbols, int64_t begin, int64_t n) const {
    const uint8_t* r = rest + begin;
    uint8_t* o = out + 2 * begin;
    const int64_t whole = std::min(n, numbers / 2 - begin);
    for (int64_t i = 0; i < whole; ++i) {
      o[2 * i] = e4m3(symbols[i] >> 4, r[i] >> 4);
      o[2 * i + 1] = e4m3(symbols[i] & 15, r[i] & 15);
    }
    if (whole < n) o[2 * whole] = e4m3(symbols[whole] >> 4, r[whole] >> 4);
  }
};

inline uint8_t e5m2(uint32_t symbol, uint32_t two) {
  return static_cast<uint8_t>((two & 2) << 6 | symbol << 1 | (two & 1));
}

struct Quarters {  // float8_e5m2: a rest is two bits
  const uint8_t* rest;
  uint8_t* out;
  void operator()(const uint8_t* symbols, int64_t begin, int64_t n) const {
    const uint8_t* r = rest + begin / 4;
    uint8_t* o = out + begin;
    for (int64_t i = 0; i < n / 4; ++i) {
      const uint32_t four = r[i];
      const uint8_t* s = symbols + 4 * i;
      o[4 * i] = e5m2(s[0], four >> 6);
      o[4 * i + 1] = e5m2(s[1], four >> 4);
      o[4 * i + 2] = e5m2(s[2], four >> 2);
      o[4 * i + 3] = e5m2(s[3], four);
    }
    for (int64_t i = n / 4 * 4; i < n; ++i) o[i] = e5m2(symbols[i], r[i / 4] >> (6 - 2 * (i % 4)));
  }
};

template <typename Join>
void decode(const Lanes& lanes, int64_t lane_count, int64_t symbols, const Join& join) {
  const int64_t fit = kTile / (kUnit * std::max<int64_t>(lanes.steps, 1)) / kTogether * kTogether;
  const int64_t width = std::min<int64_t>(lane_count, std::max<int64_t>(fit, 2 * kTogether));
  const int64_t row_bytes = kUnit * width + kPad;
  std::vector<uint8_t> tile(row_bytes * lanes.steps);
  for (int64_t lane = 0; lane < lane_count; lane += width) {
    const int64_t n = std::min(width, lane_count - lane);
    int64_t i = 0;
    for (; i + kTogether <= n; i += kTogether) {
      decode_lanes<kTogether>(lanes, lane + i, tile.data() + kUnit * i, row_bytes);
    }
    for (; i < n; ++i) decode_lanes<1>(lanes, lane + i, tile.data() + kUnit * i, row_bytes);
    for (int64_t t = 0; t < lanes.steps; ++t) {
      const int64_t begin = kUnit * (t * lane_count + lane), end = std::min(begin + kUnit * n, symbols);
      if (begin < end) join(tile.data() + t * row_bytes, begin, end - begin);
    }
  }
}

}  // namespace

// Writes `numbers` numbers of a kind of huffman_native.py. Returns 0, or 1 where there is no memory for a tile.
extern "C" int32_t hashml_huffman_decode(const uint32_t* words, int64_t size, const uint32_t* bases,
                                         const uint16_t* starts, int64_t lane_count, int64_t group, int64_t steps,
                                         const uint16_t* table, int32_t max_length, int32_t kind, const uint8_t* rest,
                                         int64_t numbers, void* out) try {
  Lanes lanes{words, size, bases, starts, group, steps, table, max_length, {}, max_length};
  add_pairs(lanes);
  uint8_t* bytes = static_cast<uint8_t*>(out);
  switch (kind) {
    case 1: decode(lanes, lane_count, numbers, Words16{rest, static_cast<uint16_t*>(out)}); break;
    case 2: decode(lanes, lane_count, numbers, Nibbles{rest, bytes}); break;
    case 3: decode(lanes, lane_count, (numbers + 1) / 2, Pairs{rest, bytes, numbers}); break;
    case 4: decode(lanes, lane_count, numbers, Quarters{rest, bytes}); break;
    default: decode(lanes, lane_count, numbers, Bytes{bytes}); break;
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
