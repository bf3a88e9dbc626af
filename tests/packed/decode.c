/* Decode packed tensors from standard input: a length of 8 bytes, then so many. Answers 0 and the values as fp32 after
   their number, or 1. Each input has memory of its own, so that a sanitizer sees every read outside of it. */
#include "flashcomm.h"

int main(void) {
    uint64_t size, most = 1 << 22;
    while (fread(&size, 8, 1, stdin) == 1) {
        uint8_t *data = malloc(size ? size : 1);
        if (fread(data, 1, size, stdin) != size) return 2;
        flashcomm_header head;
        int bad = flashcomm_read(data, size, &head);
        uint64_t count = bad ? 0 : head.rows * head.cols;
        bad |= count > most;
        float *values = malloc(bad || !count ? 1 : count * sizeof *values);
        bad |= bad || flashcomm_decode(data, size, values);
        putchar(bad ? 1 : 0);
        if (!bad) fwrite(&count, 8, 1, stdout), fwrite(values, sizeof *values, count, stdout);
        free(values), free(data);
    }
    return 0;
}
