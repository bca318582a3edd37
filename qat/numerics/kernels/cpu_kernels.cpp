// MX and FP8 quantization on the CPU: one pass over memory, bit-equal to mx.py and fp8.py.
//
// Fake quantization moves a few bytes per element and computes little, so memory should be its limit. What keeps eager
// PyTorch from that limit is that each of its twenty operations is a pass of its own; here a block of 32 values is read,
// rounded in registers and written. The loops below have a fixed length of 32 and no branches, so that the compiler turns
// them into SIMD code for whatever CPU it runs on; there are no intrinsics.
//
// The arithmetic is that of mx.py: FP32, multiplications by powers of two only, rounding by adding and subtracting
// 1.5 * 2^(23 + k). Three remarks shorten it:
//   * No element exceeds 2^(emax + 1) in scaled units, because the scale comes from the block's maximum; so the exponent
//     needs no upper clamp.
//   * Magnitudes are compared as integers: FP32 bit patterns of non-negative numbers are ordered like the numbers, with
//     infinity and NaN on top. Clamping an element this way makes it finite even in a NaN block, so a NaN in the scale
//     that multiplies it back is all that such a block needs.
//   * Adding the magic number leaves the element's code in the sum's lowest bits: it counts in steps of 2^k.
//
// A block travels as its 16 even elements followed by its 16 odd ones. In that order 16-bit values and packed codes are
// taken apart and put together with shifts, where the natural order needs SIMD shuffles; and the neighbours whose squared
// errors the search rule adds first lie 16 lanes apart.
//
// Compile with -ffp-contract=off and without -ffast-math; otherwise bits change.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#ifdef __linux__
#include <sys/mman.h>
#endif

// GCC unrolls loops of 16 before it vectorizes, and then finds worse code than for the loop itself.
#define KEEP_LOOP _Pragma("GCC unroll 1")

namespace {

constexpr int kBlock = 32;
constexpr int kHalf = kBlock / 2;
constexpr int kFp32MantissaBits = 23;
constexpr int32_t kBias = 127;  // of FP32 and of E8M0 alike
constexpr uint32_t kMagnitude = 0x7FFFFFFF;
constexpr uint32_t kSign = 0x80000000;
constexpr uint32_t kExponentField = 0x7F800000;
constexpr uint32_t kQuietNaN = 0x7FC00000;
constexpr uint8_t kScaleNaN = 0xFF;

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

template <class T>
inline T min_of(T a, T b) {
    return a < b ? a : b;
}

template <class T>
inline T max_of(T a, T b) {
    return a > b ? a : b;
}

// Storage types: how a value is kept in memory, converted to and from FP32 bits, to nearest even.
// is_exact(exponent): whether every multiple of 2^exponent that quantization makes is a value of the type.

struct Fp32 {
    using Word = uint32_t;
    static uint32_t load(uint32_t word) { return word; }
    static uint32_t store(uint32_t bits) { return bits; }
    static uint32_t store_exact(uint32_t bits) { return bits; }
    static bool is_exact(int32_t) { return true; }
};

struct Bf16 {
    using Word = uint16_t;
    static uint32_t load(uint32_t word) { return word << 16; }
    // Right for every finite value, infinity and kQuietNaN; other NaNs may overflow, but none comes here.
    static uint32_t store(uint32_t bits) { return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16; }
    static uint32_t store_exact(uint32_t bits) { return bits >> 16; }
    static bool is_exact(int32_t exponent) { return exponent >= -133; }  // the smallest subnormal
};

struct Fp16 {
    using Word = uint16_t;
    static uint32_t load(uint32_t word) {
        // Multiplying by 2^(127 - 15) moves the exponent's bias, also for subnormals; infinity and NaN land at 2^16.
        uint32_t rebiased = as_bits(as_float((word & 0x7FFFu) << 13) * as_float((kBias + 112u) << kFp32MantissaBits));
        rebiased |= (word & 0x7C00u) == 0x7C00u ? kExponentField : 0u;
        return rebiased | (word & 0x8000u) << 16;
    }
    static uint32_t store(uint32_t bits) {
        uint32_t magnitude = bits & kMagnitude;
        // Below 2^-14 FP16 counts in steps of 2^-24, the lowest bit of 0.5 in FP32: an addition rounds.
        uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
        uint32_t normal = (magnitude - (112u << kFp32MantissaBits) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
        uint32_t half = magnitude < (113u << kFp32MantissaBits) ? subnormal : min_of(normal, 0x7C00u);
        half = magnitude > kExponentField ? 0x7E00u : half;
        return half | (bits >> 16 & 0x8000u);
    }
    static uint32_t store_exact(uint32_t bits) { return store(bits); }
    static bool is_exact(int32_t) { return true; }
};

// Two neighbours in memory, the even one in the low bits, at any address. (Copies through memcpy would be as right, but
// compilers turn them into copies on the stack.)
using Pair32 [[gnu::may_alias, gnu::aligned(1)]] = uint32_t;
using Pair16 [[gnu::may_alias, gnu::aligned(1)]] = uint16_t;

// One block in memory <-> its words, even elements first.

inline void read_words(const uint32_t* x, uint32_t* words) {
    KEEP_LOOP for (int i = 0; i < kHalf; ++i) {
        words[i] = x[2 * i];
        words[kHalf + i] = x[2 * i + 1];
    }
}

inline void read_words(const uint16_t* x, uint32_t* words) {
    const auto* pairs = reinterpret_cast<const Pair32*>(x);
    KEEP_LOOP for (int i = 0; i < kHalf; ++i) {
        words[i] = pairs[i] & 0xFFFF;
        words[kHalf + i] = pairs[i] >> 16;
    }
}

inline void write_words(const uint32_t* words, uint32_t* y) {
    KEEP_LOOP for (int i = 0; i < kHalf; ++i) {
        y[2 * i] = words[i];
        y[2 * i + 1] = words[kHalf + i];
    }
}

inline void write_words(const uint32_t* words, uint16_t* y) {
    auto* pairs = reinterpret_cast<Pair32*>(y);
    KEEP_LOOP for (int i = 0; i < kHalf; ++i) pairs[i] = words[i] | words[kHalf + i] << 16;
}

// Largest magnitude in a block, as FP32 bits. (FP16 needs its own conversion first.)
inline uint32_t largest(const uint32_t* x) {
    uint32_t amax = 0;
    for (int i = 0; i < kBlock; ++i) amax = max_of(amax, x[i] & kMagnitude);
    return amax;
}

inline uint16_t largest(const uint16_t* x) {
    uint16_t amax = 0;
    for (int i = 0; i < kBlock; ++i) amax = max_of<uint16_t>(amax, x[i] & 0x7FFF);
    return amax;
}

}  // namespace

// One MX format with one scale rule; filled by cpu.py from formats.py.
extern "C" struct MxFormat {
    int32_t bits;
    int32_t mantissa_bits;
    int32_t emin;
    int32_t emax;
    float max_normal;
    uint32_t mantissa_threshold;
    int32_t search;
};

namespace {

// Two neighbouring codes in memory.
template <int kBits>
struct CodePair;
template <>
struct CodePair<4> {
    using Word = uint8_t;
};
template <>
struct CodePair<8> {
    using Word = Pair16;
};

// What the inner loops need of a format.
struct Grid {
    uint32_t smallest_field;  // exponent field of the smallest normal element
    uint32_t magic_offset;    // from the exponent field of an element to 1.5 * 2^(23 + k)
    uint32_t max_bits;        // the largest element, as FP32 bits
    uint32_t max_code;
    int32_t mantissa_bits;
    int32_t step_exponent;  // of the smallest element
    int32_t emax;
    uint32_t mantissa_threshold;

    explicit Grid(const MxFormat& format)
        : smallest_field(static_cast<uint32_t>(kBias + format.emin) << kFp32MantissaBits),
          magic_offset((static_cast<uint32_t>(kFp32MantissaBits - format.mantissa_bits) << kFp32MantissaBits) +
                       (1u << (kFp32MantissaBits - 1))),
          max_bits(as_bits(format.max_normal)),
          max_code(((max_bits - smallest_field) >> (kFp32MantissaBits - format.mantissa_bits)) +
                   (1u << format.mantissa_bits)),
          mantissa_bits(format.mantissa_bits),
          step_exponent(format.emin - format.mantissa_bits),
          emax(format.emax),
          mantissa_threshold(format.mantissa_threshold) {}

    // The magic number for an element of the given magnitude (FP32 bits, scaled units).
    uint32_t magic(uint32_t magnitude) const {
        return (max_of(magnitude, smallest_field) & kExponentField) + magic_offset;
    }
};

inline float power_of_two(int32_t biased_exponent) {  // 1 .. 254
    return as_float(static_cast<uint32_t>(biased_exponent) << kFp32MantissaBits);
}

// 2^(code - 127), NaN for the NaN scale.
inline float scale_value(int32_t code) {
    uint32_t bits = code == 0 ? 1u << (kFp32MantissaBits - 1) : static_cast<uint32_t>(code) << kFp32MantissaBits;
    return as_float(code == kScaleNaN ? kQuietNaN : bits);
}

// Biased shared exponent of a block whose largest magnitude has these bits.
inline int32_t shared_exponent(uint32_t amax, const Grid& grid) {
    int32_t field = amax >> kFp32MantissaBits;
    int32_t rounds_up = (amax & ((1u << kFp32MantissaBits) - 1)) >= grid.mantissa_threshold;
    int32_t code = max_of(field - grid.emax + rounds_up, 0);
    return field == 0xFF ? kScaleNaN : code;
}

// 2^(127 - code): from a block's units to scaled units. Any number will do for the NaN scale.
inline float to_scaled_units(int32_t code) {
    return power_of_two(code == kScaleNaN ? kBias : 2 * kBias - code);
}

// The sign of an element: that of its value in scaled units, but zero and what underflows to zero are positive.
inline uint32_t sign_of(float scaled) {
    return as_bits(scaled + 0.0f) & kSign;
}

inline uint32_t round_to_element(float scaled, const Grid& grid) {
    uint32_t magnitude = as_bits(scaled) & kMagnitude;
    float magic = as_float(grid.magic(magnitude));
    uint32_t rounded = as_bits((as_float(magnitude) + magic) - magic);
    return min_of(rounded, grid.max_bits) | sign_of(scaled);
}

// The same rounding, ending in the element's code.
template <int kBits>
inline uint32_t round_to_code(float scaled, const Grid& grid) {
    uint32_t magnitude = as_bits(scaled) & kMagnitude;
    uint32_t magic = grid.magic(magnitude);
    uint32_t steps = as_bits(as_float(magnitude) + as_float(magic)) - magic;
    // `steps` counts from zero in steps of 2^k; each binade above the smallest starts one mantissa's range later.
    uint32_t binade = (magic - grid.magic_offset - grid.smallest_field) >> (kFp32MantissaBits - grid.mantissa_bits);
    return min_of(steps + binade, grid.max_code) | sign_of(scaled) >> (32 - kBits);
}

// Sum of squares, neighbours in pairs as in mx.py.
inline float block_error(const float* difference) {
    float total[kHalf];
    KEEP_LOOP for (int i = 0; i < kHalf; ++i)
        total[i] = difference[i] * difference[i] + difference[kHalf + i] * difference[kHalf + i];
    for (int i = 0; i < 8; ++i) total[i] = total[2 * i] + total[2 * i + 1];
    for (int i = 0; i < 4; ++i) total[i] = total[2 * i] + total[2 * i + 1];
    return (total[0] + total[1]) + (total[2] + total[3]);
}

// Whether floor + 1 rounds the block with less squared error than floor; both errors in units of the floor scale.
inline bool scale_up_is_better(const float* values, int32_t code, const Grid& grid) {
    const float to_scaled = to_scaled_units(code), to_scaled_up = to_scaled_units(code + 1);
    float error[kBlock], error_up[kBlock];
    for (int i = 0; i < kBlock; ++i) {
        float scaled = values[i] * to_scaled;
        error[i] = scaled - as_float(round_to_element(scaled, grid));
        error_up[i] = scaled - 2.0f * as_float(round_to_element(values[i] * to_scaled_up, grid));
    }
    return block_error(error_up) < block_error(error);
}

// Reads a block as FP32 values of its view.
template <class Stored, class View>
inline void read_values(const typename Stored::Word* x, float* values) {
    uint32_t words[kBlock];
    read_words(x, words);
    for (int i = 0; i < kBlock; ++i) {
        uint32_t bits = Stored::load(words[i]);
        values[i] = as_float(std::is_same<Stored, View>::value ? bits : View::load(View::store(bits)));
    }
}

// Writes a block, given as FP32 bits, under the scale with this biased exponent.
template <class View>
inline void write_bits(const uint32_t* bits, int32_t code, const Grid& grid, typename View::Word* y) {
    uint32_t words[kBlock];
    if (View::is_exact(code - kBias + grid.step_exponent)) {
        for (int i = 0; i < kBlock; ++i) words[i] = View::store_exact(bits[i]);
    } else {
        for (int i = 0; i < kBlock; ++i) words[i] = View::store(bits[i]);
    }
    write_words(words, y);
}

// Some blocks and what their scales are: first all scales are found, then all elements are rounded. Either loop
// has short chains of dependent instructions, of which the CPU runs several blocks' at a time.
struct Tile {
    static constexpr int kBlocks = 32;
    int32_t code[kBlocks];  // biased shared exponents
    float to_scaled[kBlocks];
    float scale[kBlocks];

    template <class Stored, class View, bool kSearch>
    void find_scales(const typename Stored::Word* x, int count, const Grid& grid) {
        uint32_t amax[kBlocks] = {};
        for (int block = 0; block < count; ++block) amax[block] = Stored::load(largest(x + block * kBlock));
        for (int block = 0; block < kBlocks; ++block) {
            // The maximum is taken before the view rounds: that finds every NaN, and rounding keeps the order of the rest.
            uint32_t viewed = std::is_same<Stored, View>::value ? amax[block] : View::load(View::store(amax[block]));
            code[block] = shared_exponent(amax[block] < kExponentField ? viewed : amax[block], grid);
        }
        for (int block = 0; kSearch && block < count; ++block) {
            float values[kBlock];
            read_values<Stored, View>(x + block * kBlock, values);
            if (code[block] < kScaleNaN - 1) code[block] += scale_up_is_better(values, code[block], grid);
        }
        for (int block = 0; block < kBlocks; ++block) {
            to_scaled[block] = to_scaled_units(code[block]);
            scale[block] = scale_value(code[block]);
        }
    }
};

template <class Stored, class View, bool kSearch>
void fake_quantize_range(const typename Stored::Word* x, typename View::Word* y, int64_t blocks, Grid grid) {
    for (; blocks > 0; blocks -= Tile::kBlocks) {
        const int count = static_cast<int>(min_of<int64_t>(blocks, Tile::kBlocks));
        Tile tile;
        tile.find_scales<Stored, View, kSearch>(x, count, grid);
        for (int block = 0; block < count; ++block, x += kBlock, y += kBlock) {
            const float to_scaled = tile.to_scaled[block], scale = tile.scale[block];
            auto round = [&](float value) {
                return as_bits(as_float(round_to_element(value * to_scaled, grid)) * scale);
            };
            if (std::is_same<Stored, Fp32>::value && std::is_same<View, Fp32>::value) {
                for (int i = 0; i < kBlock; ++i) y[i] = round(as_float(x[i]));
                continue;
            }
            float values[kBlock];
            read_values<Stored, View>(x, values);
            uint32_t bits[kBlock];
            for (int i = 0; i < kBlock; ++i) bits[i] = round(values[i]);
            write_bits<View>(bits, tile.code[block], grid, y);
        }
    }
}

template <class Stored, class View, bool kSearch, int kBits>
void quantize_range(const typename Stored::Word* x, uint8_t* packed, uint8_t* scales, int64_t blocks, Grid grid) {
    for (; blocks > 0; blocks -= Tile::kBlocks, scales += Tile::kBlocks) {
        const int count = static_cast<int>(min_of<int64_t>(blocks, Tile::kBlocks));
        Tile tile;
        tile.find_scales<Stored, View, kSearch>(x, count, grid);
        for (int block = 0; block < count; ++block, x += kBlock, packed += kBlock * kBits / 8) {
            scales[block] = static_cast<uint8_t>(tile.code[block]);
            float values[kBlock];
            read_values<Stored, View>(x, values);
            const float to_scaled = tile.to_scaled[block];
            const uint32_t keep = tile.code[block] == kScaleNaN ? 0 : ~0u;  // a NaN block's elements are zero
            auto* pairs = reinterpret_cast<typename CodePair<kBits>::Word*>(packed);
            uint32_t codes[kBlock];
            for (int i = 0; i < kBlock; ++i) codes[i] = round_to_code<kBits>(values[i] * to_scaled, grid);
            KEEP_LOOP for (int i = 0; i < kHalf; ++i) pairs[i] = (codes[i] | codes[kHalf + i] << kBits) & keep;
        }
    }
}

// Codes under given scales. Here elements may exceed the largest one by far, so they are cut off before rounding.
template <class Stored, class View, int kBits>
void quantize_to_scale_range(const typename Stored::Word* x, const uint8_t* scales, uint8_t* packed, int64_t blocks,
                             Grid grid) {
    const float max_normal = as_float(grid.max_bits);
    for (int64_t block = 0; block < blocks; ++block, x += kBlock, packed += kBlock * kBits / 8) {
        float values[kBlock];
        read_values<Stored, View>(x, values);
        // 2^-127, for the largest scale of all, which no rule gives, is subnormal.
        const float to_scaled = scales[block] == 254 ? scale_value(0) : to_scaled_units(scales[block]);
        const uint32_t keep = scales[block] == kScaleNaN ? 0 : ~0u;
        auto* pairs = reinterpret_cast<typename CodePair<kBits>::Word*>(packed);
        uint32_t codes[kBlock];
        for (int i = 0; i < kBlock; ++i) {
            float scaled = max_of(min_of(values[i] * to_scaled, max_normal), -max_normal);
            codes[i] = round_to_code<kBits>(scaled, grid);
        }
        KEEP_LOOP for (int i = 0; i < kHalf; ++i) pairs[i] = (codes[i] | codes[kHalf + i] << kBits) & keep;
    }
}

// (Nibbles become bytes a tile at a time, because 16 bytes fill only half a SIMD register.)
template <class View, int kBits>
void dequantize_range(const uint8_t* packed, const uint8_t* scales, typename View::Word* y, int64_t blocks, Grid grid) {
    constexpr uint32_t kSignBit = 1u << (kBits - 1);
    const uint32_t first_normal = 1u << grid.mantissa_bits;
    const uint32_t binades = grid.smallest_field - (1u << kFp32MantissaBits);
    const float step = power_of_two(grid.step_exponent + kBias);
    auto decode = [&](uint32_t code) {
        uint32_t magnitude = code & (kSignBit - 1);
        uint32_t normal = (magnitude << (kFp32MantissaBits - grid.mantissa_bits)) + binades;
        uint32_t subnormal = as_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * step);
        uint32_t element = magnitude < first_normal ? subnormal : normal;
        element = magnitude > grid.max_code ? kQuietNaN : element;
        return as_float(element | (code & kSignBit) << (32 - kBits));
    };
    for (; blocks > 0; blocks -= Tile::kBlocks, scales += Tile::kBlocks, packed += Tile::kBlocks * kBlock * kBits / 8) {
        const int count = static_cast<int>(min_of<int64_t>(blocks, Tile::kBlocks));
        uint16_t nibbles_as_bytes[Tile::kBlocks * kHalf];
        const auto* pairs = reinterpret_cast<const Pair16*>(packed);
        if (kBits == 4) {
            for (int i = 0; i < count * kHalf; ++i) nibbles_as_bytes[i] = (packed[i] & 0x0F) | (packed[i] & 0xF0) << 4;
            pairs = nibbles_as_bytes;
        }
        for (int block = 0; block < count; ++block, pairs += kHalf, y += kBlock) {
            uint32_t codes[kBlock], bits[kBlock];
            KEEP_LOOP for (int i = 0; i < kHalf; ++i) {
                codes[i] = pairs[i] & 0xFF;
                codes[kHalf + i] = pairs[i] >> 8;
            }
            const float scale = scale_value(scales[block]);
            for (int i = 0; i < kBlock; ++i) bits[i] = as_bits(decode(codes[i]) * scale);
            write_bits<View>(bits, scales[block], grid, y);
        }
    }
}

// Calls work(first_block, blocks) on pieces of the tensor, in parallel where that pays.
template <class Work>
void in_parallel(int64_t blocks, int threads, const Work& work) {
    constexpr int64_t kPiece = 512;  // blocks: 16,384 values, a few microseconds
    const int64_t pieces = (blocks + kPiece - 1) / kPiece;
    threads = static_cast<int>(min_of<int64_t>(threads, pieces));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t piece = 0; piece < pieces; ++piece)
        work(piece * kPiece, min_of(kPiece, blocks - piece * kPiece));
}

template <class Stored, class View>
void fake_quantize(const void* x_in, void* y_out, int64_t blocks, const MxFormat& format, int threads) {
    const auto* x = static_cast<const typename Stored::Word*>(x_in);
    auto* y = static_cast<typename View::Word*>(y_out);
    const Grid grid(format);
    const auto range = format.search ? fake_quantize_range<Stored, View, true> : fake_quantize_range<Stored, View, false>;
    in_parallel(blocks, threads,
                [&](int64_t first, int64_t count) { range(x + first * kBlock, y + first * kBlock, count, grid); });
}

template <class Stored, class View, int kBits>
void quantize(const void* x_in, uint8_t* packed, uint8_t* scales, int64_t blocks, const MxFormat& format, int threads) {
    const auto* x = static_cast<const typename Stored::Word*>(x_in);
    const Grid grid(format);
    const auto range =
        format.search ? quantize_range<Stored, View, true, kBits> : quantize_range<Stored, View, false, kBits>;
    in_parallel(blocks, threads, [&](int64_t first, int64_t count) {
        range(x + first * kBlock, packed + first * kBlock * kBits / 8, scales + first, count, grid);
    });
}

template <class Stored, class View>
void quantize(const void* x, uint8_t* packed, uint8_t* scales, int64_t blocks, const MxFormat& format, int threads) {
    const auto run = format.bits == 4 ? quantize<Stored, View, 4> : quantize<Stored, View, 8>;
    run(x, packed, scales, blocks, format, threads);
}

template <class Stored, class View>
void quantize_to_scale(const void* x_in, const uint8_t* scales, uint8_t* packed, int64_t blocks, const MxFormat& format,
                       int threads) {
    const auto* x = static_cast<const typename Stored::Word*>(x_in);
    const Grid grid(format);
    const auto range =
        format.bits == 4 ? quantize_to_scale_range<Stored, View, 4> : quantize_to_scale_range<Stored, View, 8>;
    in_parallel(blocks, threads, [&](int64_t first, int64_t count) {
        range(x + first * kBlock, scales + first, packed + first * kBlock * format.bits / 8, count, grid);
    });
}

template <class View, int kBits>
void dequantize(const uint8_t* packed, const uint8_t* scales, void* y_out, int64_t blocks, const MxFormat& format,
                int threads) {
    auto* y = static_cast<typename View::Word*>(y_out);
    const Grid grid(format);
    in_parallel(blocks, threads, [&](int64_t first, int64_t count) {
        dequantize_range<View, kBits>(packed + first * kBlock * kBits / 8, scales + first, y + first * kBlock, count, grid);
    });
}

template <class View>
void dequantize(const uint8_t* packed, const uint8_t* scales, void* y, int64_t blocks, const MxFormat& format,
                int threads) {
    const auto run = format.bits == 4 ? dequantize<View, 4> : dequantize<View, 8>;
    run(packed, scales, y, blocks, format, threads);
}

}  // namespace

// ---- FP8: E4M3 values, a scale a row ----
//
// Each row is read twice, once for its maximum and once to be rounded; the second time it comes from the cache. The
// arithmetic is that of fp8.py: scales are not powers of two, so divisions and products round.

// How the scale of a row follows from its maximum; filled by cpu_fp8.py.
extern "C" struct RowScale {
    int32_t bf16_scale;  // round the scale to BF16
    int32_t native;      // round scale and quotient to the view's dtype; `smallest` then replaces a scale of zero
    float smallest;
};

namespace {

const Grid kE4m3(MxFormat{8, 3, -6, 8, 448.0f, 0, 0});

template <class View>
inline float rounded_to(float value) {
    return as_float(View::load(View::store(as_bits(value))));
}

template <class Stored, class View>
inline float viewed(typename Stored::Word word) {
    const float value = as_float(Stored::load(word));
    return std::is_same<Stored, View>::value ? value : rounded_to<View>(value);
}

// The scale of a row, NaN where the row is not finite.
template <class Stored, class View>
float row_scale(const typename Stored::Word* x, int64_t columns, const RowScale& rule) {
    uint32_t largest_bits = 0;
    for (int64_t i = 0; i < columns; ++i) largest_bits = max_of(largest_bits, Stored::load(x[i]) & kMagnitude);
    if (largest_bits < kExponentField && !std::is_same<Stored, View>::value)
        largest_bits = View::load(View::store(largest_bits));  // rounding keeps the order
    if (largest_bits >= kExponentField) return as_float(kQuietNaN);
    const float scale = as_float(largest_bits) / 448.0f;
    if (rule.native) {
        const float native = rounded_to<View>(scale);
        return native == 0.0f ? rule.smallest : native;
    }
    return max_of(rule.bf16_scale ? rounded_to<Bf16>(scale) : scale, rule.smallest);
}

// Magnitude of x / scale as FP32 bits, at most the largest element. (A NaN becomes that too; its row has no codes.)
template <class View, bool kNative>
inline uint32_t scaled_magnitude(float value, float scale) {
    const float quotient = as_float(as_bits(value) & kMagnitude) / scale;
    return min_of(as_bits(kNative ? rounded_to<View>(quotient) : quotient) & kMagnitude, kE4m3.max_bits);
}

inline uint32_t fp8_element(uint32_t magnitude) {
    const float magic = as_float(kE4m3.magic(magnitude));
    return as_bits((as_float(magnitude) + magic) - magic);
}

inline uint32_t fp8_code(uint32_t magnitude) {
    const uint32_t magic = kE4m3.magic(magnitude);
    const uint32_t steps = as_bits(as_float(magnitude) + as_float(magic)) - magic;
    return steps + ((magic - kE4m3.magic_offset - kE4m3.smallest_field) >> (kFp32MantissaBits - kE4m3.mantissa_bits));
}

template <class Stored, class View, bool kNative>
void fp8_fake_quantize_row(const typename Stored::Word* x, typename View::Word* y, int64_t columns, float scale) {
    for (int64_t i = 0; i < columns; ++i) {
        const float value = viewed<Stored, View>(x[i]);
        const float element = as_float(fp8_element(scaled_magnitude<View, kNative>(value, scale)));
        y[i] = static_cast<typename View::Word>(View::store(as_bits(element * scale) | (as_bits(value) & kSign)));
    }
}

template <class Stored, class View, bool kNative>
void fp8_quantize_row(const typename Stored::Word* x, uint8_t* codes, int64_t columns, float scale) {
    const uint32_t keep = scale == scale ? ~0u : 0;  // a NaN row's codes are zero
    for (int64_t i = 0; i < columns; ++i) {
        const float value = viewed<Stored, View>(x[i]);
        const uint32_t code = fp8_code(scaled_magnitude<View, kNative>(value, scale));
        codes[i] = static_cast<uint8_t>((code | (as_bits(value) & kSign) >> 24) & keep);
    }
}

template <class View>
void fp8_dequantize_row(const uint8_t* codes, typename View::Word* y, int64_t columns, float scale) {
    const uint32_t binades = kE4m3.smallest_field - (1u << kFp32MantissaBits);
    for (int64_t i = 0; i < columns; ++i) {
        const uint32_t magnitude = codes[i] & 0x7Fu;
        const uint32_t normal = (magnitude << (kFp32MantissaBits - 3)) + binades;
        const uint32_t subnormal = as_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f);
        uint32_t element = magnitude < 8 ? subnormal : normal;
        element = magnitude > kE4m3.max_code ? kQuietNaN : element;
        const float value = as_float(element | (codes[i] & 0x80u) << 24) * scale;
        y[i] = static_cast<typename View::Word>(View::store(value == value ? as_bits(value) : kQuietNaN));
    }
}

template <class Work>
void over_rows(int64_t rows, int64_t columns, int threads, const Work& work) {
    threads = static_cast<int>(min_of<int64_t>(threads, rows));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows * columns > (1 << 14))
    for (int64_t row = 0; row < rows; ++row) work(row);
}

template <class Stored, class View>
void fp8_fake_quantize(const void* x_in, void* y_out, int64_t rows, int64_t columns, const RowScale& rule, int threads) {
    const auto* x = static_cast<const typename Stored::Word*>(x_in);
    auto* y = static_cast<typename View::Word*>(y_out);
    const auto run = rule.native ? fp8_fake_quantize_row<Stored, View, true> : fp8_fake_quantize_row<Stored, View, false>;
    over_rows(rows, columns, threads, [&](int64_t row) {
        const auto* from = x + row * columns;
        const float scale = row_scale<Stored, View>(from, columns, rule);
        if (scale == scale)
            run(from, y + row * columns, columns, scale);
        else
            for (int64_t i = 0; i < columns; ++i)
                y[row * columns + i] = static_cast<typename View::Word>(View::store(kQuietNaN));
    });
}

template <class Stored, class View>
void fp8_quantize(const void* x_in, uint8_t* codes, float* scales, int64_t rows, int64_t columns, const RowScale& rule,
                  int threads) {
    const auto* x = static_cast<const typename Stored::Word*>(x_in);
    const auto run = rule.native ? fp8_quantize_row<Stored, View, true> : fp8_quantize_row<Stored, View, false>;
    over_rows(rows, columns, threads, [&](int64_t row) {
        const auto* from = x + row * columns;
        scales[row] = row_scale<Stored, View>(from, columns, rule);
        run(from, codes + row * columns, columns, scales[row]);
    });
}

template <class View>
void fp8_dequantize(const uint8_t* codes, const float* scales, void* y_out, int64_t rows, int64_t columns, int threads) {
    auto* y = static_cast<typename View::Word*>(y_out);
    over_rows(rows, columns, threads, [&](int64_t row) {
        fp8_dequantize_row<View>(codes + row * columns, y + row * columns, columns, scales[row]);
    });
}

}  // namespace

// The entry points. Tensors are contiguous; `blocks` counts blocks of 32 values. Named <verb>_<stored>_<view>.

#define MX_DEFINE_QUANTIZE(name, Stored, View)                                                                       \
    extern "C" void mx_fake_quantize_##name(const void* x, void* y, int64_t blocks, const MxFormat* format,          \
                                            int threads) {                                                           \
        fake_quantize<Stored, View>(x, y, blocks, *format, threads);                                                 \
    }                                                                                                                \
    extern "C" void mx_quantize_##name(const void* x, uint8_t* packed, uint8_t* scales, int64_t blocks,              \
                                       const MxFormat* format, int threads) {                                        \
        quantize<Stored, View>(x, packed, scales, blocks, *format, threads);                                         \
    }                                                                                                                \
    extern "C" void mx_quantize_to_scale_##name(const void* x, const uint8_t* scales, uint8_t* packed,               \
                                                int64_t blocks, const MxFormat* format, int threads) {               \
        quantize_to_scale<Stored, View>(x, scales, packed, blocks, *format, threads);                                \
    }

#define MX_DEFINE_DEQUANTIZE(name, View)                                                                             \
    extern "C" void mx_dequantize_##name(const uint8_t* packed, const uint8_t* scales, void* y, int64_t blocks,      \
                                         const MxFormat* format, int threads) {                                      \
        dequantize<View>(packed, scales, y, blocks, *format, threads);                                               \
    }

// Asks for 2 MiB pages under memory that is about to be written for the first time. Filling 4 KiB pages one fault at a
// time costs several times what quantization costs.
extern "C" void mx_expect_large(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t kPage = uintptr_t{2} << 20;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may fail
#else
    (void)memory, (void)bytes;
#endif
}

MX_DEFINE_QUANTIZE(float32_float32, Fp32, Fp32)
MX_DEFINE_QUANTIZE(float32_bfloat16, Fp32, Bf16)
MX_DEFINE_QUANTIZE(bfloat16_bfloat16, Bf16, Bf16)
MX_DEFINE_QUANTIZE(float16_float16, Fp16, Fp16)
MX_DEFINE_DEQUANTIZE(float32, Fp32)
MX_DEFINE_DEQUANTIZE(bfloat16, Bf16)
MX_DEFINE_DEQUANTIZE(float16, Fp16)

// FP8: `rows` of `columns` values.

#define FP8_DEFINE_QUANTIZE(name, Stored, View)                                                                      \
    extern "C" void fp8_fake_quantize_##name(const void* x, void* y, int64_t rows, int64_t columns,                  \
                                             const RowScale* rule, int threads) {                                    \
        fp8_fake_quantize<Stored, View>(x, y, rows, columns, *rule, threads);                                        \
    }                                                                                                                \
    extern "C" void fp8_quantize_##name(const void* x, uint8_t* codes, float* scales, int64_t rows, int64_t columns, \
                                        const RowScale* rule, int threads) {                                         \
        fp8_quantize<Stored, View>(x, codes, scales, rows, columns, *rule, threads);                                 \
    }

#define FP8_DEFINE_DEQUANTIZE(name, View)                                                                            \
    extern "C" void fp8_dequantize_##name(const uint8_t* codes, const float* scales, void* y, int64_t rows,          \
                                          int64_t columns, int threads) {                                            \
        fp8_dequantize<View>(codes, scales, y, rows, columns, threads);                                              \
    }

FP8_DEFINE_QUANTIZE(float32_float32, Fp32, Fp32)
FP8_DEFINE_QUANTIZE(float32_bfloat16, Fp32, Bf16)
FP8_DEFINE_QUANTIZE(bfloat16_bfloat16, Bf16, Bf16)
FP8_DEFINE_QUANTIZE(float16_float16, Fp16, Fp16)
FP8_DEFINE_DEQUANTIZE(float32, Fp32)
FP8_DEFINE_DEQUANTIZE(bfloat16, Bf16)
FP8_DEFINE_DEQUANTIZE(float16, Fp16)

// ---- INT4 and NVFP4: scales that are no powers of two, for blocks ----

#include "cpu_int4.hpp"
#include "cpu_nvfp4.hpp"

// ---- Low-rank adapters ----

#include "cpu_merge.hpp"

// ---- Hadamard matrices ----

#include "cpu_hadamard.hpp"
