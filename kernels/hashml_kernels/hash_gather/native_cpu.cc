// Rows and bags of a virtual table on a CPU, for `hashml_kernels.hash_gather.native_cpu`, which compiles this file.
//
//   memory [budget]         circular: a block that begins near the end goes on at the beginning
//   bases [n, blocks]       where the blocks of a row begin, hashed by XLA; below 0 for a row that is not there
//   rows [n, features]      the blocks side by side; NaN for a row that is not there
//   bags [n, features]      sums of rows [n, members] in float32, each times its weight where there are weights
//
// XLA reads a block a number at a time and asks of every one of them whether the memory ends before it. Here a block
// is copied, or added, at once, by the widest registers that the processor has. Work is cut in units that do not depend
// on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "native_threads.h"
#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#define RUNS_X86 1
#define RUNS_AVX2 __attribute__((target("avx2,fma")))
#define RUNS_AVX512 __attribute__((target("avx512f,avx2,fma")))
#endif
#define RUNS_INLINE inline __attribute__((always_inline))

namespace ffi = xla::ffi;

namespace {

using hashml::in_parallel;

constexpr int64_t kUnit = 1 << 16;  // bytes that a unit of work writes, or a little more

struct Geometry {
  int64_t budget, features, block, blocks;
};

// --- rows ---------------------------------------------------------------------------------------------

// Copies `bytes`, which are kBytes unless that is 0: a length that the compiler knows needs no call.
template <int64_t kBytes>
RUNS_INLINE void copy(char* to, const char* from, int64_t bytes) {
  std::memcpy(to, from, kBytes ? kBytes : bytes);
}

template <int64_t kBytes>
RUNS_INLINE void copy_rows(const Geometry& g, const char* memory, const int32_t* bases, int64_t rows, int64_t item,
                           const char* nan, char* out) {
  const int64_t block = g.block * item, width = g.features * item, end = g.budget * item;
  for (int64_t row = 0; row < rows; ++row, out += width, bases += g.blocks) {
    if (bases[0] < 0) {
      for (int64_t i = 0; i < width; i += item) std::memcpy(out + i, nan, item);
      continue;
    }
    for (int64_t b = 0; b < g.blocks; ++b) {
      const int64_t from = bases[b] * item, bytes = std::min(block, width - b * block);
      char* to = out + b * block;
      if (bytes == block && from + block <= end) {
        copy<kBytes>(to, memory + from, block);
        continue;
      }
      const int64_t before = std::min(bytes, end - from);
      std::memcpy(to, memory + from, before);
      std::memcpy(to + before, memory, bytes - before);
    }
  }
}

using CopyRows = void (*)(const Geometry&, const char*, const int32_t*, int64_t, int64_t, const char*, char*);

#define RUNS_COPIES(NAME, TARGET)                                                                                   \
  template <int64_t kBytes>                                                                                         \
  TARGET void NAME(const Geometry& g, const char* memory, const int32_t* bases, int64_t rows, int64_t item,         \
                   const char* nan, char* out) {                                                                    \
    copy_rows<kBytes>(g, memory, bases, rows, item, nan, out);                                                      \
  }
RUNS_COPIES(copy_rows_plain, )
#if RUNS_X86
RUNS_COPIES(copy_rows_avx2, RUNS_AVX2)
RUNS_COPIES(copy_rows_avx512, RUNS_AVX512)
#endif

#define RUNS_OF_BYTES(NAME)         \
  switch (bytes) {                  \
    case 32: return NAME<32>;       \
    case 64: return NAME<64>;       \
    case 128: return NAME<128>;     \
    case 256: return NAME<256>;     \
    case 512: return NAME<512>;     \
    default: return NAME<0>;        \
  }

bool has_avx512() {
#if RUNS_X86
  static const bool found = __builtin_cpu_supports("avx512f");
  return found;
#else
  return false;
#endif
}

bool has_avx2() {
#if RUNS_X86
  static const bool found = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return found;
#else
  return false;
#endif
}

CopyRows copy_rows_of(int64_t bytes) {
#if RUNS_X86
  if (has_avx512()) RUNS_OF_BYTES(copy_rows_avx512)
  if (has_avx2()) RUNS_OF_BYTES(copy_rows_avx2)
#endif
  RUNS_OF_BYTES(copy_rows_plain)
}

ffi::Error gather(ffi::ThreadPool pool, ffi::AnyBuffer memory, ffi::Buffer<ffi::S32> bases,
                  ffi::Result<ffi::AnyBuffer> out, int64_t block) {
  const auto shape = out->dimensions();
  const int64_t rows = shape[0], item = ffi::ByteWidth(memory.element_type());
  const Geometry g{memory.dimensions()[0], shape[1], block, bases.dimensions()[1]};
  const float wide = std::numeric_limits<float>::quiet_NaN();
  const uint16_t half = memory.element_type() == ffi::BF16 ? 0x7fc0 : 0x7e00;
  const char* nan = item == 4 ? reinterpret_cast<const char*>(&wide) : reinterpret_cast<const char*>(&half);
  const CopyRows copy = copy_rows_of(block * item);
  const char* from = static_cast<const char*>(memory.untyped_data());
  char* to = static_cast<char*>(out->untyped_data());
  const int64_t each = std::max<int64_t>(1, kUnit / (g.features * item)), units = (rows + each - 1) / each;
  in_parallel(pool, units, [&](int64_t unit) {
    const int64_t first = unit * each, count = std::min(each, rows - first);
    copy(g, from, bases.typed_data() + first * g.blocks, count, item, nan, to + first * g.features * item);
  });
  return ffi::Error::Success();
}

// --- bags ---------------------------------------------------------------------------------------------

// Sums of one bag's members, block by block: kBlock numbers stay in registers until all members are added.
template <int64_t kBlock>
RUNS_INLINE void add_blocks(const Geometry& g, const float* memory, const int32_t* bases, const float* weights,
                            int64_t members, float* out) {
  for (int64_t b = 0; b < g.blocks; ++b) {
    const int64_t length = std::min(g.block, g.features - b * g.block);
    float* to = out + b * g.block;
    if (kBlock && length == kBlock) {
      float sum[kBlock ? kBlock : 1] = {};
      for (int64_t m = 0; m < members; ++m) {
        const int64_t base = bases[m * g.blocks + b];
        const float weight = weights ? weights[m] : 1.0f;
        if (base + kBlock <= g.budget) {
          for (int64_t t = 0; t < kBlock; ++t) sum[t] += weight * memory[base + t];
        } else {
          for (int64_t t = 0; t < kBlock; ++t) {
            const int64_t at = base + t;
            sum[t] += weight * memory[at < g.budget ? at : at - g.budget];
          }
        }
      }
      std::memcpy(to, sum, sizeof(sum));
      continue;
    }
    std::fill(to, to + length, 0.0f);
    for (int64_t m = 0; m < members; ++m) {
      const int64_t base = bases[m * g.blocks + b], before = std::min(length, g.budget - base);
      const float weight = weights ? weights[m] : 1.0f;
      for (int64_t t = 0; t < before; ++t) to[t] += weight * memory[base + t];
      for (int64_t t = before; t < length; ++t) to[t] += weight * memory[base + t - g.budget];
    }
  }
}

using AddBlocks = void (*)(const Geometry&, const float*, const int32_t*, const float*, int64_t, float*);

#define RUNS_SUMS(NAME, TARGET)                                                                                     \
  template <int64_t kBlock>                                                                                         \
  TARGET void NAME(const Geometry& g, const float* memory, const int32_t* bases, const float* weights,              \
                   int64_t members, float* out) {                                                                   \
    add_blocks<kBlock>(g, memory, bases, weights, members, out);                                                    \
  }
RUNS_SUMS(add_blocks_plain, )
#if RUNS_X86
RUNS_SUMS(add_blocks_avx2, RUNS_AVX2)
RUNS_SUMS(add_blocks_avx512, RUNS_AVX512)
#endif

#define RUNS_OF_BLOCK(NAME)         \
  switch (block) {                  \
    case 8: return NAME<8>;         \
    case 16: return NAME<16>;       \
    case 32: return NAME<32>;       \
    case 64: return NAME<64>;       \
    case 128: return NAME<128>;     \
    default: return NAME<0>;        \
  }

AddBlocks add_blocks_of(int64_t block) {
#if RUNS_X86
  if (has_avx512()) RUNS_OF_BLOCK(add_blocks_avx512)
  if (has_avx2()) RUNS_OF_BLOCK(add_blocks_avx2)
#endif
  RUNS_OF_BLOCK(add_blocks_plain)
}

// No weights are given as an empty array.
ffi::Error gather_bag(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> memory, ffi::Buffer<ffi::S32> bases,
                      ffi::Buffer<ffi::F32> weights, ffi::ResultBuffer<ffi::F32> out, int64_t block) {
  const auto shape = bases.dimensions();
  const int64_t bags = shape[0], members = shape[1];
  const Geometry g{memory.dimensions()[0], out->dimensions()[1], block, shape[2]};
  const AddBlocks add = add_blocks_of(block);
  const float* weight = weights.element_count() ? weights.typed_data() : nullptr;
  const int64_t each = std::max<int64_t>(1, kUnit / 4 / (g.features * std::max<int64_t>(1, members)));
  in_parallel(pool, (bags + each - 1) / each, [&](int64_t unit) {
    for (int64_t bag = unit * each; bag < std::min(bags, (unit + 1) * each); ++bag) {
      const int64_t first = bag * members;
      add(g, memory.typed_data(), bases.typed_data() + first * g.blocks, weight ? weight + first : nullptr, members,
          out->typed_data() + bag * g.features);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(hashml_hash_gather, gather,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("block"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hashml_hash_gather_bag, gather_bag,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("block"));
