/* Single numbers: conversion between float and the types of tensors. */
#ifndef LOWMEM_TYPES_H
#define LOWMEM_TYPES_H

#include <string.h>

#include "lowmem.h"

enum { LM_ALIGNMENT = 64 }; /* bytes of a cache line: parts of a workspace begin at multiples of it */

static inline int64_t lm_min(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t lm_round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

/* Bytes rounded up to whole cache lines. */
static inline size_t lm_aligned(size_t bytes) { return (bytes + LM_ALIGNMENT - 1) / LM_ALIGNMENT * LM_ALIGNMENT; }

/* The first cache line inside a workspace, which may begin anywhere. */
static inline char *lm_align(void *workspace) { return (char *)lm_aligned((size_t)workspace); }

/* Bytes of a number. */
static inline size_t lm_width(int type) { return type == LM_F32 ? 4 : 2; }

static inline float lm_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t lm_to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float lm_from_bf16(uint16_t half) { return lm_from_bits((uint32_t)half << 16); }

/* To nearest, ties to even; NaN stays NaN. Without branches, so that compilers vectorize loops. */
static inline uint16_t lm_to_bf16(float value)
{
    uint32_t bits = lm_to_bits(value), rounded = bits + 0x7fff + (bits >> 16 & 1);
    rounded = (bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : rounded;
    return (uint16_t)(rounded >> 16);
}

/* Without branches, so that compilers vectorize loops. For a denormal or zero, raising the exponent by one more adds the
 * leading 1 that it lacks; the subtraction removes it again. Infinity and NaN get the highest exponent. */
static inline float lm_from_f16(uint16_t half)
{
    const int32_t rest = half & 0x7fff;
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    const uint32_t small = -(uint32_t)(rest < 0x400), huge = -(uint32_t)(rest > 0x7bff);
    const uint32_t bits = ((uint32_t)rest << 13) + 0x38000000 + (huge & 0x38000000) + (small & 0x800000);
    return lm_from_bits(lm_to_bits(lm_from_bits(bits) - lm_from_bits(small & 0x38800000)) | sign);
}

/* To nearest, ties to even. */
static inline uint16_t lm_to_f16(float value)
{
    uint32_t bits = lm_to_bits(value), rest = bits & 0x7fffffff;
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    if (rest > 0x7f800000)
        return sign | 0x7e00;
    if (rest >= 0x477ff000) /* 65520 and above round to infinity */
        return sign | 0x7c00;
    if (rest >= 0x38800000)
        return (uint16_t)(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
    /* A denormal: adding 0.5 leaves its multiple of 2^-24, rounded, in the lowest bits. */
    return (uint16_t)(sign | (lm_to_bits(lm_from_bits(rest) + 0.5f) - lm_to_bits(0.5f)));
}

/* LM_F16 or LM_BF16. */
static inline float lm_from_16(uint16_t half, int type) { return type == LM_F16 ? lm_from_f16(half) : lm_from_bf16(half); }

static inline float lm_load(const void *values, int type, int64_t at)
{
    uint16_t half;
    float value;
    if (type == LM_F32) {
        memcpy(&value, (const char *)values + 4 * at, 4);
        return value;
    }
    memcpy(&half, (const char *)values + 2 * at, 2);
    return lm_from_16(half, type);
}

static inline void lm_store(void *values, int type, int64_t at, float value)
{
    uint16_t half;
    if (type == LM_F32) {
        memcpy((char *)values + 4 * at, &value, 4);
        return;
    }
    half = type == LM_F16 ? lm_to_f16(value) : lm_to_bf16(value);
    memcpy((char *)values + 2 * at, &half, 2);
}

#endif
