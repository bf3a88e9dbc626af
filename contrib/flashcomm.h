/* Decode what flashcomm.pack writes: one header, no dependencies, C99. docs/wire-format.md describes the bytes.
 *
 *     flashcomm_header head;
 *     if (flashcomm_read(data, size, &head) == 0) {
 *         float *values = malloc(head.rows * head.cols * sizeof *values);
 *         if (flashcomm_decode(data, size, values) == 0) use(values, head.rows, head.cols);
 *     }
 *
 * Formats: intBgN, intBsgN, mxfp4, mxfp6_e2m3, mxfp6_e3m2, mxfp8_e4m3, mxfp8_e5m2, fp8gN, ecB, lossless, lossless_fp16,
 * bf16, fp32. Clear code for people who port it, not a fast one. Values are the fp32 before the cast to the tensor's
 * dtype. Bytes may be hostile: no read leaves data[0 .. size), and a broken row decodes to some values.
 */
#ifndef FLASHCOMM_H
#define FLASHCOMM_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int dtype, dims, bits, group, scale, exponent, fp16, fp32; /* dtype: 0 bf16, 1 fp16, 2 fp32; scale: bytes a group */
    uint64_t rows, body_bytes;
    uint32_t cols;
    char spec[256], kind; /* kind: i int, s symmetric int, m small float, e entropy-coded, l lossless, c cast */
    const uint8_t *body;
} flashcomm_header;

static uint64_t fc_number(const uint8_t *at, int bytes) {
    uint64_t n = 0;
    for (int i = bytes; i-- > 0;) n = n << 8 | at[i];
    return n;
}

static float fc_float(uint32_t bits) { union { uint32_t bits; float value; } both = {bits}; return both.value; }

static float fc_half(uint32_t h) {
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    float value = ldexpf((float)(exponent ? mantissa + 1024 : mantissa), (exponent ? exponent : 1) - 25);
    if (exponent == 31) value = mantissa ? NAN : INFINITY;
    return h >> 15 ? -value : value;
}

static uint32_t fc_crc(uint32_t crc, const uint8_t *data, size_t size) {
    for (crc = ~crc; size--; data++) {
        crc ^= *data;
        for (int i = 0; i < 8; i++) crc = crc >> 1 ^ (0xEDB88320u & -(crc & 1));
    }
    return ~crc;
}

/* Codes: planes of 8, 4, 2 and 1 bits, packed 128 codes at a time. */
static uint64_t fc_code_bytes(uint64_t n, int bits) {
    uint64_t rest = n % 128, bytes = n / 128 * 16 * bits;
    for (int w = 8; w; w /= 2)
        if (bits & w) bytes += (rest * w + 7) / 8;
    return bytes;
}

static int fc_code(const uint8_t *codes, uint64_t i, uint64_t cols, int bits) {
    const uint8_t *at = codes + i / 128 * 16 * bits;
    int n = cols - i / 128 * 128 < 128 ? (int)(cols % 128) : 128, place = (int)(i % 128), code = 0, shift = 0;
    for (int w = 8; w; w /= 2) {
        if (!(bits & w)) continue;
        int m = (n * w + 7) / 8;
        code |= (at[place % m] >> place / m * w & ((1 << w) - 1)) << shift;
        at += m, shift += w;
    }
    return code;
}

/* Read h->spec; 1 if it is not known here. */
static int fc_parse(flashcomm_header *h) {
    static const struct { const char *name; int bits, exp; } small[] = {
        {"mxfp4", 4, 2}, {"mxfp6_e2m3", 6, 2}, {"mxfp6_e3m2", 6, 3}, {"mxfp8_e4m3", 8, 4}, {"mxfp8_e5m2", 8, 5}};
    const char *spec = h->spec;
    char rest[4] = "";
    h->kind = 0, h->bits = h->group = h->scale = h->exponent = h->fp16 = h->fp32 = 0;
    for (size_t i = 0; i < sizeof small / sizeof *small; i++)
        if (!strcmp(spec, small[i].name))
            return h->kind = 'm', h->group = 32, h->scale = 1, h->bits = small[i].bits, h->exponent = small[i].exp, 0;
    if (!strcmp(spec, "bf16") || !strcmp(spec, "fp32")) return h->kind = 'c', h->fp32 = *spec == 'f', 0;
    if (!strcmp(spec, "lossless") || !strcmp(spec, "lossless_fp16")) return h->kind = 'l', h->fp16 = spec[8] != 0, 0;
    if (sscanf(spec, "int%1dg%8d%1s", &h->bits, &h->group, rest) == 2) h->kind = 'i', h->scale = 4;
    else if (sscanf(spec, "int%1dsg%8d%1s", &h->bits, &h->group, rest) == 2) h->kind = 's', h->scale = 2;
    else if (sscanf(spec, "fp8g%8d%1s", &h->group, rest) == 1)
        h->kind = 'm', h->bits = 8, h->exponent = 4, h->scale = 4, h->fp32 = 1;
    else if (!strncmp(spec, "ec", 2) && strlen(spec) < 9 && strspn(spec + 2, "0123456789.") == strlen(spec + 2)) {
        h->bits = (int)(8 * strtod(spec + 2, 0)); /* eighths of a bit per value */
        return h->kind = 'e', h->bits < 20 || h->bits > 80;
    }
    return !h->kind || h->bits < 1 || h->bits > 8 || h->group < 1;
}

static uint64_t fc_row_bytes(const flashcomm_header *f, uint64_t cols) {
    if (f->group) return fc_code_bytes(cols, f->bits) + (cols + f->group - 1) / f->group * f->scale;
    if (f->kind == 'e') return cols == 0 ? 0 : f->bits * cols < 1024 ? 16 : f->bits * cols / 64;
    if (f->kind == 'l') return cols ? 4 + 2 * cols : 0;
    return (f->fp32 ? 4 : 2) * cols;
}

static void fc_int(const uint8_t *row, const flashcomm_header *f, uint64_t cols, float *out) {
    const uint8_t *meta = row + fc_code_bytes(cols, f->bits);
    int symmetric = f->kind == 's', last = symmetric && f->bits > 1 ? (1 << f->bits) - 2 : (1 << f->bits) - 1;
    for (uint64_t i = 0; i < cols; i++) {
        const uint8_t *at = meta + i / f->group * f->scale;
        float scale = fc_float((uint32_t)fc_number(at, 2) << 16);
        float zero = symmetric ? -(last / 2.0f) * scale : fc_float((uint32_t)fc_number(at + 2, 2) << 16);
        float product = (float)fc_code(row, i, cols, f->bits) * scale;
        out[i] = product + zero;
    }
}

static void fc_small_float(const uint8_t *row, const flashcomm_header *f, uint64_t cols, float *out) {
    const uint8_t *scales = row + fc_code_bytes(cols, f->bits);
    int mantissa = f->bits - 1 - f->exponent, lowest = 2 - (1 << (f->exponent - 1));
    for (uint64_t i = 0; i < cols; i++) {
        int code = fc_code(row, i, cols, f->bits), magnitude = code & ((1 << (f->bits - 1)) - 1);
        int binade = magnitude >> mantissa > 1 ? magnitude >> mantissa : 1;
        float value = ldexpf((float)(magnitude - ((binade - 1) << mantissa)), binade - 1 + lowest - mantissa);
        uint32_t pattern = f->fp32 ? (uint32_t)fc_number(scales + 4 * (i / f->group), 4) : scales[i / f->group];
        float scale = f->fp32 ? fc_float(pattern) : pattern == 255 ? NAN : fc_float(pattern << 23);
        out[i] = (code >> (f->bits - 1) ? -value : value) * scale;
    }
}

/* Lengths of the Huffman codes of 0, -1, 1, -2, ... and of the escape, '1' to ';' for 1 to 11 bits. */
static const char *const fc_lengths[15] = {
    "1234567899", "123456789:;;", "123456789:;;", "123456789:;;", "222345678:::;;", "22244456789:;;",
    "2233355666799:::;;", "23333445566778899:::;;", "23333445566778899:;;;;;;", "3333344445566778899:;;;;;;",
    "33334444455566677778999:::;;;;;;", "333444444555566666777888999:::;;;;;;",
    "344444444455555666666777788889999:::;;;;;;;;;;", "4444444444555555566666777778888889999:::;;;;;;;;;;",
    "4444444455555555566666666777777888888999999::::::;;;;;;;;;;:"};
static const uint32_t fc_mantissas[16] = {
    0x3F800000, 0x3F85A9D3, 0x3F8BA2F8, 0x3F91C9A7, 0x3F983DCF, 0x3F9F03F7, 0x3FA60E00, 0x3FAD5AB0,
    0x3FB4FA95, 0x3FBD05FA, 0x3FC559A6, 0x3FCE2981, 0x3FD73CB0, 0x3FE0C3E3, 0x3FEAB2F0, 0x3FF52736};

static uint64_t fc_least(uint64_t a, uint64_t b) { return a < b ? a : b; }

static int fc_bit(const uint8_t *row, uint64_t bytes, int64_t at) {
    return at >= 0 && at < (int64_t)(8 * bytes) ? row[at / 8] >> at % 8 & 1 : 0;
}

static void fc_entropy(const uint8_t *row, uint64_t bytes, uint64_t cols, float *out) {
    uint32_t head = (uint32_t)fc_number(row, 3), k = head & 4095, width = head >> 18 & 31;
    int table = (int)fc_least(head >> 12 & 63, 42), raw = table > 14 ? (table - 11) / 4 : 0;
    int pairs = cols < 1024 ? 1 : 2, entry = 3 + (pairs == 1 ? 0 : bytes < 65536 ? 2 : 4);
    for (uint64_t i = 0; i < cols; i++) out[i] = k ? NAN : 0;
    if (k == 0 || k > 4032) return;
    const char *lengths = fc_lengths[table - 4 * raw];
    int codes[65] = {0}, limit = (int)strlen(lengths) - 1; /* the escape is the last symbol */
    for (int length = 1, word = 0; length <= 11; length++, word <<= 1)
        for (int s = 0; s <= limit; s++)
            if (lengths[s] - '0' == length) codes[s] = word++;
    uint64_t plane = fc_code_bytes(cols, 1), run = (cols + 32 * pairs - 1) / (32 * pairs) * 16, done = 0;
    uint64_t front = fc_least(entry + raw * plane, bytes);
    uint64_t middle = pairs == 1 ? bytes : fc_least(front + fc_number(row + 3, entry - 3), bytes);
    int64_t starts[4] = {8 * front, 8 * middle - 1, 8 * middle, 8 * bytes - 1}, records = 0;
    for (int stream = 0; stream < 2 * pairs; stream++) {
        int64_t at = starts[stream], step = stream % 2 ? -1 : 1;
        for (uint64_t end = fc_least(run * (stream + 1), cols); done < end; done++) {
            int word = 0, symbol = -1;
            for (int length = 1; length <= 11 && symbol < 0; length++, at += step) {
                word = word << 1 | fc_bit(row, bytes, at);
                for (int s = 0; s <= limit; s++)
                    if (lengths[s] - '0' == length && codes[s] == word) symbol = s;
            }
            out[done] = (float)(symbol < 0 ? limit : symbol);
        }
        if (stream == 0) records = at;
    }
    for (uint64_t i = 0; i < cols; i++) {
        int64_t number = (int64_t)out[i], lowest = 0;
        if (number == limit)
            for (uint32_t b = 0; b < width; b++) number += (int64_t)fc_bit(row, bytes, records++) << b;
        int64_t z = number >> 1 ^ -(number & 1);
        for (int n = 0; n < raw; n++)
            if (entry + (n + 1) * plane <= bytes) lowest |= (int64_t)fc_code(row + entry + n * plane, i, cols, 1) << n;
        int64_t q = z * (1 << raw) + lowest - ((1 << raw) >> 1);
        out[i] = (float)q * fc_float(fc_mantissas[(k - 1) % 16] + (((k - 1) / 16 - 126) << 23));
    }
}

static void fc_lossless(const uint8_t *row, uint64_t bytes, int fp16, uint64_t cols, float *out) {
    uint64_t planes = fp16 ? 6 : 3, octets = (cols + 7) / 8, escape = 5 + cols + planes * octets;
    int raw = bytes == 4 + 2 * cols, coded = !raw && bytes >= escape; /* else zeros, or broken */
    for (uint64_t i = 0; i < cols; i++) {
        uint32_t pattern = raw ? (uint32_t)fc_number(row + 4 + 2 * i, 2) : 0;
        if (coded) {
            uint32_t top = row[5 + i], code = 0; /* three bits of the exponent, then the low ones of fp16's mantissa */
            for (uint64_t b = 0; b < planes; b++) code |= (row[5 + cols + b * octets + i / 8] >> i % 8 & 1u) << b;
            uint32_t exponent = code % 8 < 7 ? row[4] + code % 8 : escape < bytes ? row[escape++] : 0;
            pattern = fp16 ? (top & 128) << 8 | (exponent & 31) << 10 | (top & 127) << 3 | code >> 3
                           : (top & 128) << 8 | (exponent & 255) << 7 | (top & 127);
        }
        out[i] = fp16 ? fc_half(pattern) : fc_float(pattern << 16);
    }
}

/* 0, or 1: not such bytes, another version, damage, a format that is not known here, lengths that do not fit. */
static int flashcomm_read(const uint8_t *data, size_t size, flashcomm_header *h) {
    if (size < 32 || memcmp(data, "\xab" "fc\n", 4) || data[4] != 1 || data[5] > 2) return 1;
    h->dtype = data[5], h->dims = data[6], h->body_bytes = fc_number(data + 8, 8);
    h->rows = fc_number(data + 16, 8), h->cols = (uint32_t)fc_number(data + 24, 4);
    uint64_t start = (32 + (uint64_t)data[7] + (h->dims > 2 ? 8 * (h->dims - 1) : 0) + 15) / 16 * 16;
    if (size < start || size - start != h->body_bytes) return 1;
    if (fc_crc(fc_crc(0, data, 28), data + 32, size - 32) != fc_number(data + 28, 4)) return 1;
    memcpy(h->spec, data + 32, data[7]), h->spec[data[7]] = 0, h->body = data + start;
    if (fc_parse(h)) return 1;
    uint64_t width = fc_row_bytes(h, h->cols);
    if (width == 0 || h->rows == 0) return h->body_bytes != 0;
    if (h->kind == 'l') return h->rows > h->body_bytes / 4 || h->rows > UINT64_MAX / 2 / width;
    return h->body_bytes / width != h->rows || h->body_bytes % width != 0;
}

/* Decode into rows * cols floats. 0, or 1 as from flashcomm_read. */
static int flashcomm_decode(const uint8_t *data, size_t size, float *out) {
    flashcomm_header h;
    if (flashcomm_read(data, size, &h)) return 1;
    uint64_t bound = fc_row_bytes(&h, h.cols), left = h.body_bytes;
    const uint8_t *row = h.body;
    for (uint64_t r = 0; r < h.rows && h.cols; r++, out += h.cols) {
        uint64_t bytes = h.kind == 'l' && left >= 4 ? fc_number(row, 4) : bound;
        if (bytes > left || bytes > bound || bytes < (h.kind == 'l' ? 4u : 1u)) return 1;
        if (h.kind == 'i' || h.kind == 's') fc_int(row, &h, h.cols, out);
        if (h.kind == 'm') fc_small_float(row, &h, h.cols, out);
        if (h.kind == 'e') fc_entropy(row, bytes, h.cols, out);
        if (h.kind == 'l') fc_lossless(row, bytes, h.fp16, h.cols, out);
        for (uint64_t i = 0; h.kind == 'c' && i < h.cols; i++)
            out[i] = fc_float((uint32_t)fc_number(row + i * (h.fp32 ? 4 : 2), h.fp32 ? 4 : 2) << (h.fp32 ? 0 : 16));
        row += bytes, left -= bytes;
    }
    return left != 0;
}

#endif
