// Products with a Hadamard matrix in blocks of 32 values: see ../hadamard.py, to which this is bit-equal.
//
// Blocks have their even values first (read_words), so values that are 2, 4, 8 or 16 apart are half as far here.

#pragma once

namespace {

template <int kDistance>
inline void add_and_subtract(float* values) {
    for (int first = 0; first < kBlock; first += 2 * kDistance)
        for (int i = first; i < first + kDistance; ++i) {
            const float a = values[i], b = values[i + kDistance];
            values[i] = a + b;
            values[i + kDistance] = a - b;
        }
}

template <class Stored, class View>
void hadamard_range(const typename Stored::Word* x, typename View::Word* y, int64_t blocks) {
    const float root = 5.656854152679443f;
    for (int64_t block = 0; block < blocks; ++block, x += kBlock, y += kBlock) {
        float values[kBlock];
        read_values<Stored, View>(x, values);
        add_and_subtract<8>(values);
        add_and_subtract<4>(values);
        add_and_subtract<2>(values);
        add_and_subtract<1>(values);
        add_and_subtract<16>(values);
        uint32_t words[kBlock];
        for (int i = 0; i < kBlock; ++i) {
            const uint32_t bits = as_bits(values[i] / root);
            words[i] = View::store((bits & kMagnitude) > kExponentField ? kQuietNaN : bits);
        }
        write_words(words, y);
    }
}

template <class Stored, class View>
void hadamard(const void* x_in, void* y_out, int64_t blocks, int threads) {
    const auto* x = static_cast<const typename Stored::Word*>(x_in);
    auto* y = static_cast<typename View::Word*>(y_out);
    in_parallel(blocks, threads, [&](int64_t first, int64_t count) {
        hadamard_range<Stored, View>(x + first * kBlock, y + first * kBlock, count);
    });
}

}  // namespace

#define HADAMARD_DEFINE(name, Stored, View)                                                            \
    extern "C" void hadamard_##name(const void* x, void* y, int64_t blocks, int threads) {             \
        hadamard<Stored, View>(x, y, blocks, threads);                                                 \
    }

HADAMARD_DEFINE(float32_float32, Fp32, Fp32)
HADAMARD_DEFINE(float32_bfloat16, Fp32, Bf16)
HADAMARD_DEFINE(bfloat16_bfloat16, Bf16, Bf16)
HADAMARD_DEFINE(float16_float16, Fp16, Fp16)
