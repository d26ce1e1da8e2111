/* 2^x in vectors. A file that includes this has defined INLINE and the types of vectors: `vector` of floats, `integers` and
 * `bits` (unsigned, where sums may wrap) of the same number of lanes. Vectors are passed by address: the convention for
 * passing them by value depends on the instruction set.
 */

/* Replace x by 2^x for x <= 0, to 1e-7; exactly 0 from -126 down. Minimax polynomial on [-1/2, 1/2]. */
INLINE void exp2_of(vector *x)
{
    const vector shift = 0x1.8p23f - (vector){0};
    const integers none = *x <= -126.0f;
    const vector whole = *x + shift, f = *x - (whole - shift);
    vector y = f * 1.5403530393e-4f + 1.3333558146e-3f;
    y = y * f + 9.6181291076e-3f;
    y = y * f + 5.5504108665e-2f;
    y = y * f + 2.4022650696e-1f;
    y = y * f + 6.9314718056e-1f;
    y = y * f + 1.0f;
    *x = (vector)(((bits)y + ((bits)whole << 23)) & ~(bits)none);
}
