/* Packed linears with NEON for many rows: a group's weights are unpacked once and multiplied by all rows. The file of an
 * instruction set defines
 *
 *   multiply_unpacked(tile, rows)   the products of a tile of 1 or MOST_ROWS rows, whose weights are in scratch
 *   ARRANGE(count, step)            brings the unpacked steps of a unit into the order in which multiply_unpacked takes them
 *
 * and then includes this, which defines lm_prefill.
 */

/* Unpack a group's weights for a block of outputs into scratch. */
INLINE void unpack_block(int bits, int planes, const tile *t, int8_t *steps, int8_t *pairs)
{
    for (int unit = 0; unit < t->at->input->group / UNIT; unit++)
        for (int v = 0; v < VECTORS; v++, steps += 16 * STEPS, pairs += 16 * PAIR_STEPS) {
            int8x16_t step[STEPS], pair[PAIR_STEPS];
            load_unit((shape){bits, planes, 0, 0}, t, unit, v, step, pair);
            ARRANGE(STEPS, step);
            if (planes == LM_PAIRED)
                ARRANGE(PAIR_STEPS, pair);
            UNROLL
            for (int i = 0; i < STEPS; i++)
                vst1q_s8(steps + 16 * i, step[i]);
            UNROLL
            for (int i = 0; i < PAIR_STEPS; i++)
                if (planes == LM_PAIRED)
                    vst1q_s8(pairs + 16 * i, pair[i]);
        }
}

#define UNPACK(bits)                                                                                                   \
    TARGET static void unpack_##bits(int planes, const tile *t, int8_t *steps, int8_t *pairs)                          \
    {                                                                                                                  \
        if (planes == LM_PAIRED)                                                                                       \
            unpack_block(bits, LM_PAIRED, t, steps, pairs);                                                            \
        else                                                                                                           \
            unpack_block(bits, 1, t, steps, pairs);                                                                    \
    }
UNPACK(2) UNPACK(3) UNPACK(4) UNPACK(5) UNPACK(6) UNPACK(7) UNPACK(8)

/* A group's weights for the piece's outputs times all rows. */
static void prefill_group(const lm_piece *p, const lm_group *at)
{
    typedef void (*unpacker)(int, const tile *, int8_t *, int8_t *);
    static const unpacker unpackers[9] = {[2] = unpack_2, [3] = unpack_3, [4] = unpack_4, [5] = unpack_5,
                                          [6] = unpack_6, [7] = unpack_7, [8] = unpack_8};
    const int64_t rows = p->input->rows, width = p->input->group;
    int8_t *scratch = p->scratch, *pairs = scratch + LM_PREFILL_COLUMNS * width;
    spare memory;
    for (int64_t o = p->first; o < p->last; o += BLOCK) {
        const int64_t column = o - p->first, count = lm_min(p->last - o, BLOCK);
        block b = block_of(at, o, NULL, 0);
        if (count < BLOCK) {
            b = spare_block(&b, count, 0, &memory);
            spare_words(at, &b, count, &memory);
        }
        const tile t = {.at = at, .b = &b};
        unpackers[p->w->bits](p->input->planes, &t, scratch + column * width, pairs + column * width / 2);
    }
    for (int64_t r = 0, most; r < rows; r += most) {
        most = rows - r >= MOST_ROWS ? MOST_ROWS : 1;
        for (int64_t o = p->first; o < p->last; o += BLOCK) {
            const int64_t column = o - p->first, count = lm_min(p->last - o, BLOCK);
            const block whole = block_of(at, o, p->y + r * p->stride + column, p->stride);
            const block b = count < BLOCK ? spare_block(&whole, count, (int)most, &memory) : whole;
            const tile t = {at, &b, r, scratch + column * width, pairs + column * width / 2};
            multiply_unpacked(&t, (int)most);
            if (count < BLOCK)
                put_back(&whole, count, (int)most, &memory);
        }
    }
}

static void lm_prefill(const lm_piece *p)
{
    for (int64_t g = 0; g < p->w->inputs / p->input->group; g++) {
        const lm_group at = group_of(p, g);
        prefill_group(p, &at);
    }
}
