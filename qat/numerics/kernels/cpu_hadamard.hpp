// Products with a Hadamard matrix in blocks of 32 values: see ../hadamard.py, to which this is bit-equal.
//
// A stage adds and subtracts the halves of a block and interleaves the results. That is one step of the matrix, and turns
// the bits of the values' places by one; so the same loop, which is SIMD code, does all stages, and after the last one
// every value is back in its place. Without the last interleaving a block has its even values first, as write_words wants.

#pragma once

namespace {

inline void add_and_subtract(const float* values, float* sums, float* differences, int step) {
    KEEP_LOOP for (int i = 0; i < kHalf; ++i) {
        sums[step * i] = values[i] + values[kHalf + i];
        differences[step * i] = values[i] - values[kHalf + i];
    }
}

template <class Stored, class View>
void hadamard_range(const typename Stored::Word* x, typename View::Word* y, int64_t blocks) {
    const float root = 5.656854152679443f;
    for (int64_t block = 0; block < blocks; ++block, x += kBlock, y += kBlock) {
        float values[kBlock], turned[kBlock];
        for (int i = 0; i < kBlock; ++i) {
            const uint32_t bits = Stored::load(x[i]);
            values[i] = as_float(std::is_same<Stored, View>::value ? bits : View::load(View::store(bits)));
        }
        add_and_subtract(values, turned, turned + 1, 2);
        add_and_subtract(turned, values, values + 1, 2);
        add_and_subtract(values, turned, turned + 1, 2);
        add_and_subtract(turned, values, values + 1, 2);
        add_and_subtract(values, turned, turned + kHalf, 1);
        uint32_t words[kBlock];
        for (int i = 0; i < kBlock; ++i) {
            const uint32_t bits = as_bits(turned[i] / root);
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
