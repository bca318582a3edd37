// Merging a low-rank adapter into a weight, and rounding what comes out: see ../low_rank.py, to which this is bit-equal.
//
// The sums of a few rows and columns stay in registers while the ranks pass by, so a value of A that is loaded serves
// some rows and a value of B some columns. A thread takes a slab of rows. For some columns at a time it copies A's part
// into a panel, since rows of A that lie a power of two apart would push each other out of the cache. Merged rows of a
// slab are rounded to an MX format out of the cache.

#pragma once

namespace {

constexpr int kMergeRows = 4;
#ifdef __AVX512F__
constexpr int kMergeColumns = 64;  // 4 x 64 sums: 16 of 32 registers
#else
constexpr int kMergeColumns = 16;  // 4 x 16 sums: 8 of 16 registers of AVX2
#endif
constexpr int64_t kSlabRows = 32;
constexpr int64_t kPanelValues = 32768;  // of A, 128 KiB: a part of the second cache

// The adapter of some rows of a weight.
struct Factors {
    const float* a;  // [rank, columns]
    const float* b;  // [rows, rank]
    int64_t columns;
    int64_t rank;
    float scaling;
};

template <class Stored>
inline typename Stored::Word merged_value(typename Stored::Word w, float sum, float scaling) {
    const uint32_t bits = as_bits(as_float(Stored::load(w)) + scaling * sum);
    const uint32_t clean = (bits & kMagnitude) > kExponentField ? kQuietNaN : bits;
    return static_cast<typename Stored::Word>(Stored::store(clean));
}

// kRows x kColumns values; `a` is A's part [rank, kColumns], `b` the rows of B.
template <class Stored, int kRows, int kColumns>
void merge_tile(const typename Stored::Word* w, const float* a, const float* b, typename Stored::Word* out,
                const Factors& factors) {
    const int64_t columns = factors.columns, rank = factors.rank;
    float sum[kRows][kColumns] = {};
    for (int64_t r = 0; r < rank; ++r, a += kColumns) {
#pragma GCC unroll 8
        for (int n = 0; n < kRows; ++n) {
            const float factor = b[n * rank + r];
            for (int k = 0; k < kColumns; ++k) sum[n][k] = __builtin_fmaf(factor, a[k], sum[n][k]);
        }
    }
    for (int n = 0; n < kRows; ++n)
        for (int k = 0; k < kColumns; ++k)
            out[n * columns + k] = merged_value<Stored>(w[n * columns + k], sum[n][k], factors.scaling);
}

// All columns of A of kColumns each, from `first` on, one after the other: [columns / kColumns, rank, kColumns].
template <int kColumns>
void gather(const Factors& factors, int64_t first, int64_t count, float* panel) {
    for (int64_t k = first; k < first + count; k += kColumns)
        for (int64_t r = 0; r < factors.rank; ++r, panel += kColumns)
            std::memcpy(panel, factors.a + r * factors.columns + k, kColumns * sizeof(float));
}

template <class Stored, int kRows, int kColumns>
void merge_rows(const typename Stored::Word* w, const float* panel, const float* b, typename Stored::Word* out,
                int64_t count, const Factors& factors) {
    for (int64_t k = 0; k < count; k += kColumns)
        merge_tile<Stored, kRows, kColumns>(w + k, panel + k * factors.rank, b, out + k, factors);
}

// Some rows, `count` columns from `first` on, a multiple of kColumns.
template <class Stored, int kColumns>
void merge_columns(const typename Stored::Word* w, typename Stored::Word* out, int64_t rows, int64_t first,
                   int64_t count, const Factors& factors, float* panel) {
    gather<kColumns>(factors, first, count, panel);
    w += first, out += first;
    int64_t n = 0;
    for (; n + kMergeRows <= rows; n += kMergeRows)
        merge_rows<Stored, kMergeRows, kColumns>(w + n * factors.columns, panel, factors.b + n * factors.rank,
                                                 out + n * factors.columns, count, factors);
    for (; n < rows; ++n)
        merge_rows<Stored, 1, kColumns>(w + n * factors.columns, panel, factors.b + n * factors.rank,
                                        out + n * factors.columns, count, factors);
}

// Columns whose part of A a panel holds.
inline int64_t panel_columns(int64_t rank) {
    return max_of<int64_t>(kPanelValues / max_of<int64_t>(rank, 1) / kMergeColumns, 1) * kMergeColumns;
}

// Some rows, all columns.
template <class Stored>
void merge_slab(const typename Stored::Word* w, typename Stored::Word* out, int64_t rows, const Factors& factors,
                float* panel) {
    const int64_t whole = factors.columns / kMergeColumns * kMergeColumns, at_once = panel_columns(factors.rank);
    for (int64_t k = 0; k < whole; k += at_once)
        merge_columns<Stored, kMergeColumns>(w, out, rows, k, min_of(at_once, whole - k), factors, panel);
    for (int64_t k = whole; k < factors.columns; ++k) merge_columns<Stored, 1>(w, out, rows, k, 1, factors, panel);
}

// A stack of weights, each with an A and a B of its own.
struct Stack {
    int64_t weights;
    int64_t rows;  // of each
    Factors factors;
};

// work(first row, rows, factors) for slabs of rows, which are counted over all weights.
template <class Work>
void over_slabs(const Stack& stack, int threads, const Work& work) {
    const int64_t each = (stack.rows + kSlabRows - 1) / kSlabRows, slabs = stack.weights * each;
    threads = static_cast<int>(min_of<int64_t>(threads, slabs));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t slab = 0; slab < slabs; ++slab) {
        const int64_t weight = slab / each, row = slab % each * kSlabRows, first = weight * stack.rows + row;
        Factors factors = stack.factors;
        factors.a += weight * factors.rank * factors.columns;
        factors.b += first * factors.rank;
        work(first, min_of(kSlabRows, stack.rows - row), factors);
    }
}

// Memory of a thread for as long as a slab takes.
template <class T>
struct Scratch {
    T* const data;
    explicit Scratch(int64_t count) : data(static_cast<T*>(std::malloc(max_of<int64_t>(count, 1) * sizeof(T)))) {}
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(data); }
};

template <class Stored>
void merge(const void* w_in, void* out_in, const Stack& stack, int threads) {
    const auto* w = static_cast<const typename Stored::Word*>(w_in);
    auto* out = static_cast<typename Stored::Word*>(out_in);
    over_slabs(stack, threads, [&](int64_t first, int64_t rows, const Factors& factors) {
        const Scratch<float> panel(factors.rank * panel_columns(factors.rank));
        merge_slab<Stored>(w + first * factors.columns, out + first * factors.columns, rows, factors, panel.data);
    });
}

template <class Stored, class View>
void fake_quantize_merged(const void* w_in, void* out_in, const Stack& stack, const MxFormat& format, int threads) {
    const auto* w = static_cast<const typename Stored::Word*>(w_in);
    auto* out = static_cast<typename View::Word*>(out_in);
    const Grid grid(format);
    const auto range = format.search ? fake_quantize_range<Stored, View, true> : fake_quantize_range<Stored, View, false>;
    over_slabs(stack, threads, [&](int64_t first, int64_t rows, const Factors& factors) {
        const int64_t size = rows * factors.columns;
        const Scratch<float> panel(factors.rank * panel_columns(factors.rank));
        const Scratch<typename Stored::Word> merged(size);
        merge_slab<Stored>(w + first * factors.columns, merged.data, rows, factors, panel.data);
        range(merged.data, out + first * factors.columns, size / kBlock, grid);
    });
}

}  // namespace

// `weights` matrices of `rows` x `columns` values.
#define LOW_RANK_DEFINE_MERGE(name, Stored)                                                                            \
    extern "C" void low_rank_merge_##name(const void* w, const float* a, const float* b, void* out, int64_t weights,   \
                                          int64_t rows, int64_t columns, int64_t rank, float scaling, int threads) {   \
        merge<Stored>(w, out, Stack{weights, rows, Factors{a, b, columns, rank, scaling}}, threads);                   \
    }

// The same, rounded to an MX format: stored as the first type, seen in the second.
#define LOW_RANK_DEFINE_MX(name, Stored, View)                                                                         \
    extern "C" void low_rank_mx_##name(const void* w, const float* a, const float* b, void* out, int64_t weights,      \
                                       int64_t rows, int64_t columns, int64_t rank, float scaling,                     \
                                       const MxFormat* format, int threads) {                                          \
        const Stack stack{weights, rows, Factors{a, b, columns, rank, scaling}};                                       \
        fake_quantize_merged<Stored, View>(w, out, stack, *format, threads);                                           \
    }

LOW_RANK_DEFINE_MERGE(float32, Fp32)
LOW_RANK_DEFINE_MERGE(bfloat16, Bf16)
LOW_RANK_DEFINE_MERGE(float16, Fp16)
LOW_RANK_DEFINE_MX(float32_float32, Fp32, Fp32)
LOW_RANK_DEFINE_MX(float32_bfloat16, Fp32, Bf16)
LOW_RANK_DEFINE_MX(bfloat16_bfloat16, Bf16, Bf16)
LOW_RANK_DEFINE_MX(float16_float16, Fp16, Fp16)
