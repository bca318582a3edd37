// NVFP4: E2M1 elements, an E4M3 scale for a block of 16 and a divisor of the whole tensor; bit-equal to nvfp4.py.
//
// Included by cpu_kernels.cpp, after cpu_int4.hpp.

namespace {

constexpr int kNvBlock = 16;
const Grid kE2m1(MxFormat{4, 1, 0, 2, 6.0f, 0, 0});

inline float nv_element(float value, float effective) {
    const float scaled = value / effective;
    const uint32_t magnitude = min_of(as_bits(scaled) & kMagnitude, kE2m1.max_bits);
    const float magic = as_float(kE2m1.magic(magnitude));
    return as_float(as_bits((as_float(magnitude) + magic) - magic) | sign_of(scaled));
}

inline uint32_t nv_code(float value, float effective) {
    const float scaled = value / effective;
    const uint32_t magnitude = min_of(as_bits(scaled) & kMagnitude, kE2m1.max_bits);
    const uint32_t magic = kE2m1.magic(magnitude);
    const uint32_t steps = as_bits(as_float(magnitude) + as_float(magic)) - magic;
    const uint32_t binade = (magic - kE2m1.magic_offset - kE2m1.smallest_field) >> (kFp32MantissaBits - 1);
    return (steps + binade) | sign_of(scaled) >> 28;
}

inline float nv_error(const float* values, float effective) {
    float difference[kNvBlock];
    KEEP_LOOP for (int i = 0; i < kNvBlock; ++i) difference[i] = values[i] - nv_element(values[i], effective) * effective;
    return pairwise_sum_of_squares<kNvBlock>(difference);
}

inline float e4m3_value(uint32_t code) {  // of a positive finite number
    const uint32_t normal = (code << (kFp32MantissaBits - 3)) + kE4m3.smallest_field - (1u << kFp32MantissaBits);
    return code < 8 ? static_cast<float>(static_cast<int32_t>(code)) * 0x1p-9f : as_float(normal);
}

inline float nv_given_scale(uint8_t code) {
    const float magnitude = e4m3_value(code & 0x7Fu);
    return (code & 0x7F) == 0x7F ? as_float(kQuietNaN) : code & 0x80 ? -magnitude : magnitude;
}

inline float e2m1_value(uint32_t code) {
    const uint32_t magnitude = code & 7u;
    const uint32_t normal = (magnitude << (kFp32MantissaBits - 1)) + (126u << kFp32MantissaBits);
    const uint32_t half = magnitude ? as_bits(0.5f) : 0u;  // 0.5 is subnormal in E2M1
    return as_float((magnitude < 2 ? half : normal) | (code & 8u) << 28);
}

// Scales of several blocks, found together: a single one would leave most SIMD lanes empty.
constexpr int kNvBatch = 16;

struct NvBlocks {
    float values[kNvBatch][kNvBlock];
    float scale[kNvBatch];      // E4M3 numbers, NaN where the block is not finite
    float effective[kNvBatch];  // scale over the divisor of the tensor
};

// The better of each scale and its neighbours. Blocks that are not finite keep theirs, since no error is below a NaN.
inline void nv_search(NvBlocks* blocks, int count, float divisor) {
    float least[kNvBatch] = {}, scale[kNvBatch], effective[kNvBatch], error[kNvBatch] = {};
    for (int b = 0; b < count; ++b) least[b] = nv_error(blocks->values[b], blocks->effective[b]);
    uint32_t first[kNvBatch];
    KEEP_LOOP for (int b = 0; b < kNvBatch; ++b) first[b] = fp8_code(as_bits(blocks->scale[b]));
    for (int step = 1; step >= -1; step -= 2) {
        KEEP_LOOP for (int b = 0; b < kNvBatch; ++b) {
            scale[b] = e4m3_value(min_of(max_of(first[b] + step, 1u), kE4m3.max_code));
            effective[b] = scale[b] / divisor;
        }
        for (int b = 0; b < count; ++b) error[b] = nv_error(blocks->values[b], effective[b]);
        KEEP_LOOP for (int b = 0; b < kNvBatch; ++b) {
            const bool better = error[b] < least[b];
            least[b] = better ? error[b] : least[b];
            blocks->scale[b] = better ? scale[b] : blocks->scale[b];
            blocks->effective[b] = better ? effective[b] : blocks->effective[b];
        }
    }
}

// Reads `count` blocks, at most kNvBatch, and finds their scales. rule: 0 absmax, 1 absmax_native, 2 search.
template <class Stored, class View>
inline void nv_read(const typename Stored::Word* x, int count, float divisor, int rule, NvBlocks* blocks) {
    uint32_t amax[kNvBatch] = {};
    for (int b = 0; b < count; ++b)
        amax[b] = read_block<Stored, View, kNvBlock>(x + b * kNvBlock, blocks->values[b]);
    KEEP_LOOP for (int b = 0; b < kNvBatch; ++b) {
        const float sixth = as_float(amax[b]) / 6.0f;
        const float native = rounded_to<View>(sixth);
        const float wanted = divisor * (rule == 1 ? native : sixth);
        float scale = as_float(fp8_element(min_of(as_bits(wanted), kE4m3.max_bits)));
        scale = scale == 0.0f ? 0.125f : scale;
        scale = amax[b] >= kExponentField ? as_float(kQuietNaN) : scale;
        blocks->scale[b] = scale;
        blocks->effective[b] = scale / divisor;
    }
    if (rule == 2) nv_search(blocks, count, divisor);
}

template <class Stored, class View>
void nvfp4_fake_quantize(const typename Stored::Word* x, typename View::Word* y, int64_t blocks, float divisor, int rule,
                         int threads) {
    in_parallel(blocks, threads, [&](int64_t first, int64_t count) {
        for (int64_t block = first; block < first + count; block += kNvBatch) {
            NvBlocks batch;
            const int here = static_cast<int>(min_of<int64_t>(kNvBatch, first + count - block));
            nv_read<Stored, View>(x + block * kNvBlock, here, divisor, rule, &batch);
            for (int b = 0; b < here; ++b) {
                const float effective = batch.effective[b];
                auto* to = y + (block + b) * kNvBlock;
                KEEP_LOOP for (int i = 0; i < kNvBlock; ++i) {
                    const uint32_t value = as_bits(nv_element(batch.values[b][i], effective) * effective);
                    to[i] = static_cast<typename View::Word>(View::store(effective == effective ? value : kQuietNaN));
                }
            }
        }
    });
}

// The 16 codes of a block are one 64-bit word, the first in its lowest bits.
inline void nv_write_codes(const float* values, float effective, uint8_t* codes) {
    uint32_t code[kNvBlock];
    KEEP_LOOP for (int i = 0; i < kNvBlock; ++i) code[i] = nv_code(values[i], effective);
    uint64_t word = 0;
    KEEP_LOOP for (int i = 0; i < kNvBlock; ++i) word |= static_cast<uint64_t>(code[i]) << (4 * i);
    if (effective != effective) word = 0;  // a NaN block's codes are zero
    std::memcpy(codes, &word, sizeof word);
}

template <class Stored, class View>
void nvfp4_quantize(const typename Stored::Word* x, uint8_t* codes, uint8_t* scales, int64_t blocks, float divisor,
                    int rule, int threads) {
    in_parallel(blocks, threads, [&](int64_t first, int64_t count) {
        for (int64_t block = first; block < first + count; block += kNvBatch) {
            NvBlocks batch;
            const int here = static_cast<int>(min_of<int64_t>(kNvBatch, first + count - block));
            nv_read<Stored, View>(x + block * kNvBlock, here, divisor, rule, &batch);
            for (int b = 0; b < here; ++b) {
                const float scale = batch.scale[b];
                scales[block + b] = scale == scale ? static_cast<uint8_t>(fp8_code(as_bits(scale))) : 0x7F;
                nv_write_codes(batch.values[b], batch.effective[b], codes + (block + b) * kNvBlock / 2);
            }
        }
    });
}

template <class Stored, class View>
void nvfp4_quantize_to_scale(const typename Stored::Word* x, const uint8_t* scales, uint8_t* codes, int64_t blocks,
                             float divisor, int threads) {
    in_parallel(blocks, threads, [&](int64_t first, int64_t count) {
        for (int64_t block = first; block < first + count; ++block) {
            float values[kNvBlock];
            read_block<Stored, View, kNvBlock>(x + block * kNvBlock, values);
            nv_write_codes(values, nv_given_scale(scales[block]) / divisor, codes + block * kNvBlock / 2);
        }
    });
}

template <class View>
void nvfp4_dequantize(const uint8_t* codes, const uint8_t* scales, typename View::Word* y, int64_t blocks, float divisor,
                      int threads) {
    in_parallel(blocks, threads, [&](int64_t first, int64_t count) {
        for (int64_t block = first; block < first + count; ++block) {
            const float effective = nv_given_scale(scales[block]) / divisor;
            uint64_t word;
            std::memcpy(&word, codes + block * kNvBlock / 2, sizeof word);
            uint32_t elements[kNvBlock];
            KEEP_LOOP for (int i = 0; i < kNvBlock; ++i) elements[i] = static_cast<uint32_t>(word >> (4 * i)) & 0xFu;
            KEEP_LOOP for (int i = 0; i < kNvBlock; ++i) {
                const float value = e2m1_value(elements[i]) * effective;
                y[block * kNvBlock + i] =
                    static_cast<typename View::Word>(View::store(effective == effective ? as_bits(value) : kQuietNaN));
            }
        }
    });
}

}  // namespace

#define NVFP4_DEFINE_QUANTIZE(name, Stored, View)                                                                     \
    extern "C" void nvfp4_fake_quantize_##name(const void* x, void* y, int64_t blocks, float divisor, int rule,       \
                                               int threads) {                                                         \
        nvfp4_fake_quantize<Stored, View>(static_cast<const Stored::Word*>(x), static_cast<View::Word*>(y), blocks,   \
                                          divisor, rule, threads);                                                    \
    }                                                                                                                 \
    extern "C" void nvfp4_quantize_##name(const void* x, uint8_t* codes, uint8_t* scales, int64_t blocks,             \
                                          float divisor, int rule, int threads) {                                     \
        nvfp4_quantize<Stored, View>(static_cast<const Stored::Word*>(x), codes, scales, blocks, divisor, rule,       \
                                     threads);                                                                        \
    }                                                                                                                 \
    extern "C" void nvfp4_quantize_to_scale_##name(const void* x, const uint8_t* scales, uint8_t* codes,              \
                                                   int64_t blocks, float divisor, int threads) {                      \
        nvfp4_quantize_to_scale<Stored, View>(static_cast<const Stored::Word*>(x), scales, codes, blocks, divisor,    \
                                              threads);                                                               \
    }

#define NVFP4_DEFINE_DEQUANTIZE(name, View)                                                                           \
    extern "C" void nvfp4_dequantize_##name(const uint8_t* codes, const uint8_t* scales, void* y, int64_t blocks,     \
                                            float divisor, int threads) {                                             \
        nvfp4_dequantize<View>(codes, scales, static_cast<View::Word*>(y), blocks, divisor, threads);                 \
    }

NVFP4_DEFINE_QUANTIZE(float32_float32, Fp32, Fp32)
NVFP4_DEFINE_QUANTIZE(float32_bfloat16, Fp32, Bf16)
NVFP4_DEFINE_QUANTIZE(bfloat16_bfloat16, Bf16, Bf16)
NVFP4_DEFINE_QUANTIZE(float16_float16, Fp16, Fp16)
NVFP4_DEFINE_DEQUANTIZE(float32, Fp32)
NVFP4_DEFINE_DEQUANTIZE(bfloat16, Bf16)
NVFP4_DEFINE_DEQUANTIZE(float16, Fp16)
