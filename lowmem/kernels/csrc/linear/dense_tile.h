/* A tile of a dense piece, for vectors that take their inputs eight at a time. A file that includes this has defined TARGET,
 * INLINE, UNROLL and
 *
 *   sums_of_tile                                a vector of partial sums for each row and output
 *   ZERO                                        such a vector of zeros
 *   sum_of(vector)                              the sum of its lanes, always in the same order
 *   add_products(shape, weight, piece, i, sum)  add the products of eight inputs from `i` on
 */
enum { LINE = 32, AHEAD = 512 }; /* inputs of a cache line; the prefetch distance in inputs */

/* A tile of s.rows rows and s.outputs outputs, from output `first` on. Each sum has the same order in every tile: the lanes,
 * their tree, then the last inputs that do not fill a vector. */
INLINE void tile(lm_dense_shape s, const lm_dense_piece *p, int64_t first)
{
    const lm_dense *w = p->w;
    const int64_t in = w->inputs, whole = in / 8 * 8;
    const uint16_t *weight = w->weight + first * in;
    const float *x = p->x;
    float *y = p->y + first - p->first;
    sums_of_tile sum;
    UNROLL
    for (int r = 0; r < s.rows; r++)
        UNROLL
        for (int o = 0; o < s.outputs; o++)
            sum[r][o] = ZERO;
    int64_t i = 0;
    for (; i + LINE <= in; i += LINE) {
        UNROLL
        for (int o = 0; o < s.outputs; o++)
            __builtin_prefetch((const void *)((uintptr_t)(weight + o * in + i) + 2 * AHEAD));
        UNROLL
        for (int part = 0; part < LINE; part += 8)
            add_products(s, weight, p, i + part, sum);
    }
    for (; i < whole; i += 8)
        add_products(s, weight, p, i, sum);
    UNROLL /* else clang keeps the sums in memory, in the loops above too */
    for (int o = 0; o < s.outputs; o++)
        UNROLL
        for (int r = 0; r < s.rows; r++) {
            float total = sum_of(sum[r][o]);
            for (i = whole; i < in; i++)
                total += lm_load(weight, s.type, o * in + i) * x[r * in + i];
            y[r * p->stride + o] = w->bias ? total + lm_load(w->bias, w->bias_type, first + o) : total;
        }
}
