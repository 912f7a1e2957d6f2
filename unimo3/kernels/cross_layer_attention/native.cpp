// Gated attention over several levels, for float32 on CPUs: one sweep forward, one backward, a thread a (sample, head).
//
//     P_i  = softmax_v(q . K_i / sqrt(d))                 out = sum_i g_i (r o P_i) V_i
//     dP_i = r o (dO V_i^T)      dg_i = sum_v P_i dP_i    dS_i = g_i P_i (dP_i - dg_i)
//     dq   = sum_i dS_i K_i / sqrt(d)                     dK_i = dS_i^T q / sqrt(d)     dV_i = (g_i r o P_i)^T dO
//
// r is dropout's mask over 1 - p, the same for all levels, read from bits that are drawn once a call. Backward makes P
// again from the saved log-sum-exp. Tables of queries by keys are stored transposed, [keys][queries], for a block of
// queries: softmax then runs over rows, all lanes being queries, and every product is a tile of the one routine
// `product`. They stay in a core's cache; nothing of that size goes to memory. Sums run in a fixed order, so results do
// not depend on the number of threads.
//
// Source: FlashAttention-2, arXiv 2307.08691, for the backward pass by log-sum-exp; native.py builds and calls this file.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_VECTORS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE_VECTORS = 2;
#else
constexpr int LANES = 4, TILE_VECTORS = 2;
#endif
constexpr int TILE_ROWS = 6;
constexpr int64_t QUERY_BLOCK = 64;

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

inline Floats load(const float *from) { return *reinterpret_cast<const Floats *>(from); }
inline void store(float *to, Floats value) { *reinterpret_cast<Floats *>(to) = value; }
inline Floats all(float value) { return value - Floats{}; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// e^x for x <= 0, by Cephes' polynomial; zero below -87, where e^x leaves float32's normal range; NaN stays NaN.
inline Floats exponential(Floats x) {
    const Floats shift = all(12582912.f);  // adding it rounds to an integer
    const Floats clamped = x < -87.f ? all(-87.f) : x;
    const Floats rounded = (clamped * 1.44269504f + shift) - shift;
    const Floats rest = (clamped - rounded * 0.693359375f) - rounded * -2.12194440e-4f;
    Floats power = all(1.98756915e-4f);
    for (float factor : {1.39819995e-3f, 8.33345191e-3f, 4.16657962e-2f, 1.66666657e-1f, 0.5f})
        power = power * rest + factor;
    power = power * rest * rest + rest + 1.f;
    const Ints exponent = (__builtin_convertvector(rounded, Ints) + 127) << 23;
    Floats scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return x < -87.f ? Floats{} : power * scale;
}

struct Matrix {  // element (i, j) at start[i * row + j * column]
    const float *start;
    int64_t row, column;
};

template <int ROWS, int VECTORS>
inline void tile(Matrix a, const float *b, int64_t b_row, float *c, int64_t c_row, int64_t depth, bool add) {
    Floats sum[ROWS][VECTORS];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) sum[i][j] = add ? load(c + i * c_row + j * LANES) : Floats{};
    for (int64_t k = 0; k < depth; k++) {
        Floats right[VECTORS];
        for (int j = 0; j < VECTORS; j++) right[j] = load(b + k * b_row + j * LANES);
        for (int i = 0; i < ROWS; i++) {
            const Floats left = all(a.start[i * a.row + k * a.column]);
            for (int j = 0; j < VECTORS; j++) sum[i][j] += left * right[j];
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) store(c + i * c_row + j * LANES, sum[i][j]);
}

template <int VECTORS>
void stripe(Matrix a, const float *b, int64_t b_row, float *c, int64_t c_row, int64_t rows, int64_t depth, bool add) {
    for (; rows > 0; rows -= TILE_ROWS, a.start += TILE_ROWS * a.row, c += TILE_ROWS * c_row) switch (rows) {
        case 1: return tile<1, VECTORS>(a, b, b_row, c, c_row, depth, add);
        case 2: return tile<2, VECTORS>(a, b, b_row, c, c_row, depth, add);
        case 3: return tile<3, VECTORS>(a, b, b_row, c, c_row, depth, add);
        case 4: return tile<4, VECTORS>(a, b, b_row, c, c_row, depth, add);
        case 5: return tile<5, VECTORS>(a, b, b_row, c, c_row, depth, add);
        default: tile<TILE_ROWS, VECTORS>(a, b, b_row, c, c_row, depth, add);
    }
}

// c [rows, columns] = a [rows, depth] b [depth, columns], or added to it; columns a multiple of LANES.
void product(Matrix a, const float *b, int64_t b_row, float *c, int64_t c_row, int64_t rows, int64_t columns,
             int64_t depth, bool add) {
    for (int64_t vectors; columns > 0; columns -= vectors * LANES, b += vectors * LANES, c += vectors * LANES) {
        vectors = std::min<int64_t>(columns / LANES, TILE_VECTORS);
        switch (vectors) {
            case 1: stripe<1>(a, b, b_row, c, c_row, rows, depth, add); break;
            case 2: stripe<2>(a, b, b_row, c, c_row, rows, depth, add); break;
#if defined(__AVX512F__)
            case 3: stripe<3>(a, b, b_row, c, c_row, rows, depth, add); break;
            default: stripe<4>(a, b, b_row, c, c_row, rows, depth, add);
#endif
        }
    }
}

Words mixed(Words x) {  // Wellons' lowbias32
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

}  // namespace

// All tensors are contiguous. native.py has the same fields in the same order.
struct Shape {
    int64_t batch, heads, queries, longest, words, width, levels, threads;  // longest: keys of the longest level
    float dropout;
};
struct Level {
    const float *kv;          // [batch, keys, 2, heads, width]
    const uint8_t *readable;  // [batch, keys], or null: all
    float *grad;              // as kv
    int64_t keys;
};
struct Tensors {
    const float *q;           // [batch, queries, heads, width], as the next three
    float *out;
    const float *grad_out;
    float *grad_q;
    const float *gate;        // [batch, queries, heads, levels], or null: all alike
    float *lse, *offsets;     // [batch, heads, levels, queries]; the latter is the gate's gradient
    const uint32_t *bits;     // [batch, heads, queries, words]: which keys dropout retains; dropout.py draws the same
    const Level *levels;
};

namespace {

// What one thread needs for a block of queries of one (sample, head).
struct Block {
    const Shape &shape;
    const Tensors &t;
    int64_t sample = 0, head = 0, first = 0, count = 0, padded = 0, num_keys = 0;
    const uint8_t *readable = nullptr;
    float scale;
    std::vector<float> q, q_t, do_t, p, dp, factors, o;
    float gate[QUERY_BLOCK], lse[QUERY_BLOCK];

    Block(const Shape &shape, const Tensors &t)
        : shape(shape), t(t), scale(1 / std::sqrt(float(shape.width))), q(QUERY_BLOCK * shape.width),
          q_t(QUERY_BLOCK * shape.width), do_t(QUERY_BLOCK * shape.width), p(QUERY_BLOCK * shape.longest),
          dp(QUERY_BLOCK * shape.longest), factors(shape.dropout > 0 ? QUERY_BLOCK * shape.longest : 0),
          o(QUERY_BLOCK * shape.width) {}

    // Keys behind the last readable one are not looked at.
    const Level &open(int64_t index) {
        const Level &level = t.levels[index];
        num_keys = level.keys;
        readable = level.readable ? level.readable + sample * level.keys : nullptr;
        while (readable && num_keys > 0 && !readable[num_keys - 1]) num_keys--;
        return level;
    }

    // Floats from a token's head to the next token's, of queries; keys and values are twice as far apart.
    int64_t row() const { return shape.heads * shape.width; }

    // Where this head of this block's first query is.
    int64_t query_start() const { return ((sample * shape.queries + first) * shape.heads + head) * shape.width; }

    // Where this head of a level's first key is; its value is a row behind.
    int64_t key_start(int64_t keys) const { return (sample * keys * 2 * shape.heads + head) * shape.width; }

    void advance(int64_t start) {
        first = start, count = std::min(QUERY_BLOCK, shape.queries - start);
        padded = (count + LANES - 1) / LANES * LANES;
        const float *from = t.q + query_start();
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < shape.width; j++) q[i * shape.width + j] = from[i * row() + j] * scale;
        transpose(q.data(), shape.width, q_t.data());
        if (shape.dropout > 0) unpack();
    }

    void transpose(const float *from, int64_t row, float *to) const {
        for (int64_t j = 0; j < shape.width; j++) {
            for (int64_t i = 0; i < count; i++) to[j * padded + i] = from[i * row + j];
            for (int64_t i = count; i < padded; i++) to[j * padded + i] = 0;
        }
    }

    // Dropout's bits of this block as factors [keys, queries].
    void unpack() {
        const float factor = 1 / (1 - shape.dropout);
        const uint32_t *from = t.bits + ((sample * shape.heads + head) * shape.queries + first) * shape.words;
        for (int64_t v = 0; v < shape.longest; v++)
            for (int64_t i = 0; i < padded; i++) {
                const uint32_t word = i < count ? from[i * shape.words + v / 32] : 0;
                factors[v * padded + i] = word >> (v % 32) & 1 ? factor : 0;
            }
    }

    void load_gate(int64_t level) {
        const int64_t step = shape.heads * shape.levels;
        const float *from = t.gate ? t.gate + ((sample * shape.queries + first) * shape.heads + head) * shape.levels : 0;
        for (int64_t i = 0; i < padded; i++)
            gate[i] = i >= count ? 0 : from ? from[i * step + level] : 1.f / shape.levels;
    }

    // Of this block's queries, in lse and offsets.
    int64_t statistics_start(int64_t level) const {
        return ((sample * shape.heads + head) * shape.levels + level) * shape.queries + first;
    }

    void scores(const float *keys, std::vector<float> &to, const std::vector<float> &queries) {
        const Matrix rows{keys, 2 * row(), 1};
        product(rows, queries.data(), padded, to.data(), padded, num_keys, padded, shape.width, false);
    }

    bool reads(int64_t v) const { return !readable || readable[v]; }

    // Scores in p become gated and dropped probabilities.
    void soften(int64_t level) {
        load_gate(level);
        for (int64_t i = 0; i < padded; i += LANES) {
            Floats most = all(-INFINITY), sum{};
            for (int64_t v = 0; v < num_keys; v++)
                if (reads(v)) most = larger(most, load(&p[v * padded + i]));
            for (int64_t v = 0; v < num_keys; v++) {
                const Floats e = reads(v) ? exponential(load(&p[v * padded + i]) - most) : Floats{};
                store(&p[v * padded + i], e), sum += e;
            }
            const Floats factor = load(gate + i) / sum;
            for (int64_t v = 0; v < num_keys; v++) {
                float *weight = &p[v * padded + i];
                store(weight, load(weight) * (shape.dropout > 0 ? factor * load(&factors[v * padded + i]) : factor));
            }
            for (int lane = 0; lane < LANES && i + lane < count; lane++)
                t.lse[statistics_start(level) + i + lane] = most[lane] + std::log(sum[lane]);
        }
    }

    // Scores in p and dO V^T in dp become what dV and dK are products of; offsets are written.
    void differentiate(int64_t level) {
        load_gate(level);
        for (int64_t i = 0; i < padded; i++) lse[i] = i < count ? t.lse[statistics_start(level) + i] : 0;
        for (int64_t i = 0; i < padded; i += LANES) {
            const Floats offset = load(lse + i), level_gate = load(gate + i);
            Floats mean{};
            for (int64_t v = 0; v < num_keys; v++) {
                float *weight = &p[v * padded + i], *slope = &dp[v * padded + i];
                const Floats e = reads(v) ? exponential(load(weight) - offset) : Floats{};
                if (shape.dropout > 0) store(slope, load(slope) * load(&factors[v * padded + i]));
                store(weight, e), mean += e * load(slope);
            }
            for (int64_t v = 0; v < num_keys; v++) {
                float *weight = &p[v * padded + i], *slope = &dp[v * padded + i];
                const Floats gated = load(weight) * level_gate;
                store(slope, gated * (load(slope) - mean));
                store(weight, shape.dropout > 0 ? gated * load(&factors[v * padded + i]) : gated);
            }
            for (int lane = 0; lane < LANES && i + lane < count; lane++)
                t.offsets[statistics_start(level) + i + lane] = mean[lane];
        }
    }

    void forward() {
        const int64_t width = shape.width;
        std::fill(o.begin(), o.end(), 0.f);
        for (int64_t index = 0; index < shape.levels; index++) {
            const Level &level = open(index);
            if (num_keys == 0) {
                std::fill_n(t.lse + statistics_start(index), count, 0.f);
                continue;
            }
            const float *keys = level.kv + key_start(level.keys), *values = keys + row();
            scores(keys, p, q_t);
            soften(index);
            product({p.data(), 1, padded}, values, 2 * row(), o.data(), width, count, width, num_keys, true);
        }
        float *to = t.out + query_start();
        for (int64_t i = 0; i < count; i++) std::memcpy(to + i * row(), &o[i * width], width * sizeof(float));
    }

    void backward() {
        const int64_t width = shape.width;
        const float *grad_out = t.grad_out + query_start();
        transpose(grad_out, row(), do_t.data());
        std::fill(o.begin(), o.end(), 0.f);
        for (int64_t index = 0; index < shape.levels; index++) {
            const Level &level = open(index);
            const float *keys = level.kv + key_start(level.keys), *values = keys + row();
            float *grad_k = level.grad + key_start(level.keys), *grad_v = grad_k + row();
            if (first == 0)
                for (float *grad : {grad_k, grad_v})
                    for (int64_t v = num_keys; v < level.keys; v++) std::fill_n(grad + v * 2 * row(), width, 0.f);
            if (num_keys == 0) {
                std::fill_n(t.offsets + statistics_start(index), count, 0.f);
                continue;
            }
            scores(keys, p, q_t);
            scores(values, dp, do_t);
            differentiate(index);
            const Matrix p_rows{p.data(), padded, 1}, ds_rows{dp.data(), padded, 1}, ds_columns{dp.data(), 1, padded};
            product(p_rows, grad_out, row(), grad_v, 2 * row(), num_keys, width, count, first > 0);
            product(ds_rows, q.data(), width, grad_k, 2 * row(), num_keys, width, count, first > 0);
            product(ds_columns, keys, 2 * row(), o.data(), width, count, width, num_keys, true);
        }
        float *to = t.grad_q + query_start();
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < width; j++) to[i * row() + j] = o[i * width + j] * scale;
    }
};

void sweep(const Shape &shape, const Tensors &tensors, void (Block::*pass)()) {
#pragma omp parallel num_threads(shape.threads)
    {
        Block block(shape, tensors);
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < shape.batch * shape.heads; pair++) {
            block.sample = pair / shape.heads, block.head = pair % shape.heads;
            for (int64_t first = 0; first < shape.queries; first += QUERY_BLOCK) {
                block.advance(first);
                (block.*pass)();
            }
        }
    }
}

}  // namespace

extern "C" void cross_layer_attention_forward(const Shape *shape, const Tensors *tensors) {
    sweep(*shape, *tensors, &Block::forward);
}

// As dropout.py: bits [batch, heads, queries, words], from a hash of pair, query and key.
extern "C" void cross_layer_attention_draw(const Shape *shape, uint64_t seed, uint32_t threshold, uint32_t *bits) {
    const uint32_t low = seed, high = seed >> 32;
    Words lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
#pragma omp parallel for schedule(static) num_threads(shape->threads)
    for (int64_t pair = 0; pair < shape->batch * shape->heads; pair++) {
        const Words row = mixed(lane * 0 + uint32_t(pair) + low);
        for (int64_t query = 0; query < shape->queries; query++)
            for (int64_t word = 0; word < shape->words; word++) {
                uint32_t drawn = 0;
                for (int first = 0; first < 32; first += LANES) {
                    const Words key = mixed((row ^ (lane + uint32_t(word * 32 + first))) + high);
                    const Words retained = reinterpret_cast<Words>(mixed(key ^ uint32_t(query)) >= threshold) & 1;
                    for (int i = 0; i < LANES; i++) drawn |= retained[i] << (first + i);
                }
                bits[(pair * shape->queries + query) * shape->words + word] = drawn;
            }
    }
}

extern "C" void cross_layer_attention_backward(const Shape *shape, const Tensors *tensors) {
    sweep(*shape, *tensors, &Block::backward);
}
