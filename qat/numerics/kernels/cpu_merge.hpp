// Merging a low-rank adapter into a weight: see ../low_rank.py, to which this is bit-equal.
//
// A row of B is read once; the accumulators of some columns stay in registers and in the first cache while A's rows, a
// few of which the second cache holds, pass by.

#pragma once

namespace {

constexpr int kMergeColumns = 256;

template <class Stored>
void merge_row(const typename Stored::Word* w, const float* a, const float* b, typename Stored::Word* out,
               int64_t columns, int64_t rank, float scaling) {
    for (int64_t first = 0; first < columns; first += kMergeColumns) {
        const int count = static_cast<int>(min_of<int64_t>(kMergeColumns, columns - first));
        float sum[kMergeColumns] = {};
        for (int64_t r = 0; r < rank; ++r) {
            const float factor = b[r];
            const float* row = a + r * columns + first;
            for (int k = 0; k < count; ++k) sum[k] = __builtin_fmaf(factor, row[k], sum[k]);
        }
        for (int k = 0; k < count; ++k) {
            const uint32_t bits = as_bits(as_float(Stored::load(w[first + k])) + scaling * sum[k]);
            const uint32_t clean = (bits & kMagnitude) > kExponentField ? kQuietNaN : bits;
            out[first + k] = static_cast<typename Stored::Word>(Stored::store(clean));
        }
    }
}

template <class Stored>
void merge(const void* w, const float* a, const float* b, void* out, int64_t stack, int64_t rows, int64_t columns,
           int64_t rank, float scaling, int threads) {
    using Word = typename Stored::Word;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t n = 0; n < stack * rows; ++n) {
        merge_row<Stored>(static_cast<const Word*>(w) + n * columns, a + n / rows * rank * columns, b + n * rank,
                          static_cast<Word*>(out) + n * columns, columns, rank, scaling);
    }
}

}  // namespace

// `stack` weights of `rows` x `columns` values, each with an A and a B of its own.
#define LOW_RANK_DEFINE_MERGE(name, Stored)                                                                          \
    extern "C" void low_rank_merge_##name(const void* w, const float* a, const float* b, void* out, int64_t stack,   \
                                          int64_t rows, int64_t columns, int64_t rank, float scaling, int threads) { \
        merge<Stored>(w, a, b, out, stack, rows, columns, rank, scaling, threads);                                   \
    }

LOW_RANK_DEFINE_MERGE(float32, Fp32)
LOW_RANK_DEFINE_MERGE(bfloat16, Bf16)
LOW_RANK_DEFINE_MERGE(float16, Fp16)
