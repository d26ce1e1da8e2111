/* The walk over the tiles of a dense piece. A file that includes this has defined TARGET, INLINE and
 *
 *   tile(shape, piece, first)    a tile from output `first` on
 *   OUTPUTS_1 .. OUTPUTS_4       outputs of a tile of 1 to 4 rows
 */
enum { COLUMN_ROWS = 4, CACHED_OUTPUTS = 24 };

/* Tiles of s.outputs outputs, then of one. */
INLINE void columns(lm_dense_shape s, const lm_dense_piece *p)
{
    int64_t o = p->first;
    for (; o + s.outputs <= p->last; o += s.outputs)
        tile(s, p, o);
    s.outputs = 1;
    for (; o < p->last; o++)
        tile(s, p, o);
}

#define COLUMNS(type, rows, outputs)                                                                                   \
    TARGET static void columns_##type##_##rows(const lm_dense_piece *p) { columns((lm_dense_shape){type, rows, outputs}, p); }
COLUMNS(LM_BF16, 1, OUTPUTS_1) COLUMNS(LM_BF16, 2, OUTPUTS_2) COLUMNS(LM_BF16, 3, OUTPUTS_3) COLUMNS(LM_BF16, 4, OUTPUTS_4)
COLUMNS(LM_F16, 1, OUTPUTS_1) COLUMNS(LM_F16, 2, OUTPUTS_2) COLUMNS(LM_F16, 3, OUTPUTS_3) COLUMNS(LM_F16, 4, OUTPUTS_4)
#define NAMES(type) {columns_##type##_1, columns_##type##_2, columns_##type##_3, columns_##type##_4}

static void dense_columns(const lm_dense_piece *piece)
{
    static void (*const kernels[2][COLUMN_ROWS])(const lm_dense_piece *) = {NAMES(LM_BF16), NAMES(LM_F16)};
    const lm_dense *w = piece->w;
    /* A part of the outputs that stays in the cache while all rows pass over it. */
    const int64_t part = piece->rows > COLUMN_ROWS ? CACHED_OUTPUTS : piece->last - piece->first;
    lm_dense_piece p = *piece;
    for (p.first = piece->first; p.first < piece->last; p.first += part) {
        p.last = lm_min(p.first + part, piece->last);
        for (int64_t r = 0; r < piece->rows; r += COLUMN_ROWS) {
            p.rows = lm_min(piece->rows - r, COLUMN_ROWS);
            p.x = piece->x + r * w->inputs;
            p.y = piece->y + r * piece->stride + p.first - piece->first;
            kernels[w->weight_type == LM_F16][p.rows - 1](&p);
        }
    }
}
