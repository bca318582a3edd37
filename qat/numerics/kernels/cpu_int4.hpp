// INT4: values of -8 to 7 and a BF16 scale for a block of 32 or 128; bit-equal to integer.py.
//
// Included by cpu_kernels.cpp. The quotient is clamped before it is rounded, which gives the same integer, so that adding
// and subtracting 1.5 * 2^23 rounds it.

namespace {

constexpr float kRoundInteger = 12582912.0f;  // 1.5 * 2^23
constexpr int kInt4Offset = 8;

inline float int4_element(float value, float scale) {
    const float clamped = max_of(min_of(value / scale, 7.0f), -8.0f);
    return (clamped + kRoundInteger) - kRoundInteger;
}

// Sum over a block, neighbours in pairs as in integer.py. Each level has an array of its own, so that it is SIMD code.
template <int kCount>
inline float pairwise_sum(const float* terms) {
    if constexpr (kCount == 1) {
        return terms[0];
    } else {
        float sums[kCount / 2];
        KEEP_LOOP for (int i = 0; i < kCount / 2; ++i) sums[i] = terms[2 * i] + terms[2 * i + 1];
        return pairwise_sum<kCount / 2>(sums);
    }
}

template <int kCount>
inline float pairwise_sum_of_squares(float* difference) {
    KEEP_LOOP for (int i = 0; i < kCount; ++i) difference[i] *= difference[i];
    return pairwise_sum<kCount>(difference);
}

// The values of a block as seen in the view, and the bits of the largest magnitude; FP32 infinity or more where one of
// them is not finite.
template <class Stored, class View, int kCount>
inline uint32_t read_block(const typename Stored::Word* x, float* values) {
    uint32_t amax = 0;
    for (int i = 0; i < kCount; ++i) amax = max_of(amax, Stored::load(x[i]) & kMagnitude);
    for (int i = 0; i < kCount; ++i) values[i] = viewed<Stored, View>(x[i]);
    if (std::is_same<Stored, View>::value || amax >= kExponentField) return amax;
    return View::load(View::store(amax));  // rounding keeps the order
}

inline float int4_scale(uint32_t amax, float divisor) {
    if (amax >= kExponentField) return as_float(kQuietNaN);
    return max_of(rounded_to<Bf16>(as_float(amax) / divisor), 0x1p-126f);
}

template <int kCount>
inline float int4_find_scale(const float* values, uint32_t amax, bool search) {
    if (!search) return int4_scale(amax, 7.5f);
    constexpr float kDivisors[] = {8.0f, 7.5f, 7.0f};
    float best = int4_scale(amax, kDivisors[0]), least = 0.0f;
    for (int candidate = 0; candidate < 3; ++candidate) {
        const float scale = int4_scale(amax, kDivisors[candidate]);
        float difference[kCount];
        for (int i = 0; i < kCount; ++i) difference[i] = values[i] - int4_element(values[i], scale) * scale;
        const float error = pairwise_sum_of_squares<kCount>(difference);
        if (candidate == 0 || error < least) {
            least = error;
            best = scale;
        }
    }
    return best;
}

template <class Stored, class View, int kCount>
void int4_fake_quantize(const typename Stored::Word* x, typename View::Word* y, int64_t blocks, bool search, int threads) {
    in_parallel(blocks, threads, [&](int64_t first, int64_t count) {
        for (int64_t block = first; block < first + count; ++block) {
            float values[kCount];
            const uint32_t amax = read_block<Stored, View, kCount>(x + block * kCount, values);
            const float scale = int4_find_scale<kCount>(values, amax, search);
            for (int i = 0; i < kCount; ++i)
                y[block * kCount + i] =
                    static_cast<typename View::Word>(View::store(as_bits(int4_element(values[i], scale) * scale)));
        }
    });
}

template <int kCount>
inline void int4_write_codes(const float* values, float scale, uint8_t* codes) {
    const bool finite = scale == scale;  // a NaN block's elements are zero
    for (int i = 0; i < kCount / 2; ++i) {
        const int low = static_cast<int>(int4_element(values[2 * i], scale)) + kInt4Offset;
        const int high = static_cast<int>(int4_element(values[2 * i + 1], scale)) + kInt4Offset;
        codes[i] = static_cast<uint8_t>(finite ? low | high << 4 : kInt4Offset | kInt4Offset << 4);
    }
}

template <class Stored, class View, int kCount>
void int4_quantize(const typename Stored::Word* x, uint8_t* codes, uint16_t* scales, int64_t blocks, bool search,
                   int threads) {
    in_parallel(blocks, threads, [&](int64_t first, int64_t count) {
        for (int64_t block = first; block < first + count; ++block) {
            float values[kCount];
            const uint32_t amax = read_block<Stored, View, kCount>(x + block * kCount, values);
            const float scale = int4_find_scale<kCount>(values, amax, search);
            scales[block] = static_cast<uint16_t>(Bf16::store(as_bits(scale)));
            int4_write_codes<kCount>(values, scale, codes + block * kCount / 2);
        }
    });
}

template <class Stored, class View, int kCount>
void int4_quantize_to_scale(const typename Stored::Word* x, const uint16_t* scales, uint8_t* codes, int64_t blocks,
                            int threads) {
    in_parallel(blocks, threads, [&](int64_t first, int64_t count) {
        for (int64_t block = first; block < first + count; ++block) {
            float values[kCount];
            read_block<Stored, View, kCount>(x + block * kCount, values);
            int4_write_codes<kCount>(values, as_float(Bf16::load(scales[block])), codes + block * kCount / 2);
        }
    });
}

template <class View, int kCount>
void int4_dequantize(const uint8_t* codes, const uint16_t* scales, typename View::Word* y, int64_t blocks, int threads) {
    in_parallel(blocks, threads, [&](int64_t first, int64_t count) {
        for (int64_t block = first; block < first + count; ++block) {
            const uint8_t* from = codes + block * kCount / 2;
            auto* to = y + block * kCount;
            const float given = as_float(Bf16::load(scales[block]));
            const float scale = given == given ? given : as_float(kQuietNaN);
            for (int i = 0; i < kCount / 2; ++i) {
                const float low = static_cast<float>((from[i] & 0xF) - kInt4Offset) * scale;
                const float high = static_cast<float>((from[i] >> 4) - kInt4Offset) * scale;
                to[2 * i] = static_cast<typename View::Word>(View::store(as_bits(low)));
                to[2 * i + 1] = static_cast<typename View::Word>(View::store(as_bits(high)));
            }
        }
    });
}

}  // namespace

// `blocks` counts blocks of `size` values, 32 or 128. Named <verb>_<stored>_<view>.

#define INT4_DEFINE_QUANTIZE(name, Stored, View)                                                                      \
    extern "C" void int4_fake_quantize_##name(const void* x, void* y, int64_t blocks, int size, int search,           \
                                              int threads) {                                                          \
        const auto run = size == 32 ? int4_fake_quantize<Stored, View, 32> : int4_fake_quantize<Stored, View, 128>;   \
        run(static_cast<const Stored::Word*>(x), static_cast<View::Word*>(y), blocks, search != 0, threads);          \
    }                                                                                                                 \
    extern "C" void int4_quantize_##name(const void* x, uint8_t* codes, uint16_t* scales, int64_t blocks, int size,   \
                                         int search, int threads) {                                                   \
        const auto run = size == 32 ? int4_quantize<Stored, View, 32> : int4_quantize<Stored, View, 128>;             \
        run(static_cast<const Stored::Word*>(x), codes, scales, blocks, search != 0, threads);                        \
    }                                                                                                                 \
    extern "C" void int4_quantize_to_scale_##name(const void* x, const uint16_t* scales, uint8_t* codes,              \
                                                  int64_t blocks, int size, int threads) {                            \
        const auto run =                                                                                              \
            size == 32 ? int4_quantize_to_scale<Stored, View, 32> : int4_quantize_to_scale<Stored, View, 128>;        \
        run(static_cast<const Stored::Word*>(x), scales, codes, blocks, threads);                                     \
    }

#define INT4_DEFINE_DEQUANTIZE(name, View)                                                                            \
    extern "C" void int4_dequantize_##name(const uint8_t* codes, const uint16_t* scales, void* y, int64_t blocks,     \
                                           int size, int threads) {                                                   \
        const auto run = size == 32 ? int4_dequantize<View, 32> : int4_dequantize<View, 128>;                         \
        run(codes, scales, static_cast<View::Word*>(y), blocks, threads);                                             \
    }

INT4_DEFINE_QUANTIZE(float32_float32, Fp32, Fp32)
INT4_DEFINE_QUANTIZE(float32_bfloat16, Fp32, Bf16)
INT4_DEFINE_QUANTIZE(bfloat16_bfloat16, Bf16, Bf16)
INT4_DEFINE_QUANTIZE(float16_float16, Fp16, Fp16)
INT4_DEFINE_DEQUANTIZE(float32, Fp32)
INT4_DEFINE_DEQUANTIZE(bfloat16, Bf16)
INT4_DEFINE_DEQUANTIZE(float16, Fp16)
