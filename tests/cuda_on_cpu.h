// The operations of device.cuh on a CPU, so that codecs.cu runs there as it is: one warp of 32 fibers, which take turns
// at each exchange. Compile with -ffp-contract=off.
#include <string.h>
#include <ucontext.h>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
struct Words { u32 x, y, z, w; };

#define INLINE inline
#define UNROLL
#define ONE_BY_ONE
#define RARELY(condition) (condition)

// ------------------------------------------------------------------------------------------------- lanes and warps
static ucontext_t fibers[33];  // the last is the caller's
static u32 current;
static u32 slots[2][32][64];  // two, as a lane may write its next values before all others have read its last
static u32 exchanges[32];

inline u32 lane() { return current; }
inline i64 warp() { return 0; }
inline i64 num_warps() { return 1; }

// Give the turn to the next lane, and return once all lanes have come here.
inline u32 (*meet(const void* values, int count))[64] {
  u32 me = current;
  auto& half = slots[exchanges[me]++ & 1];
  memcpy(half[me], values, 4 * count);
  swapcontext(&fibers[me], &fibers[(me + 1) % 32]);
  current = me;
  return half;
}
template <int N> inline void exchange(const float (&x)[N], float (&other)[N], u32 mask) {
  u32 from = current ^ mask;
  memcpy(other, meet(x, N)[from], 4 * N);
}
inline u32 fetch(u32 x, u32 from) { return meet(&x, 1)[from][0]; }

template <void (*body)()> void enter(int me) { current = me, body(); }

// Run `body` in each of the 32 lanes.
template <void (*body)()> void run() {
  static u8 stacks[32][1 << 16];
  for (int i = 0; i < 32; ++i) {
    exchanges[i] = 0;
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = stacks[i], fibers[i].uc_stack.ss_size = sizeof stacks[i];
    fibers[i].uc_link = &fibers[i == 31 ? 32 : i + 1];
    makecontext(&fibers[i], (void (*)())enter<body>, 1, i);
  }
  swapcontext(&fibers[32], &fibers[0]);
}

// ------------------------------------------------------------------------------------------------------------- fp32
inline u32 pattern(float x) { u32 r; memcpy(&r, &x, 4); return r; }
inline float number(u32 x) { float r; memcpy(&r, &x, 4); return r; }
inline float add(float a, float b) { return a + b; }
inline float sub(float a, float b) { return a - b; }
inline float mul(float a, float b) { return a * b; }
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float less(float a, float b) { return a != a ? a : b != b ? b : a < b ? a : b; }
inline float more(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }
inline float at_most(float a, float b) { return a != a ? b : b != b ? a : a < b ? a : b; }
inline float at_least(float a, float b) { return a != a ? b : b != b ? a : a > b ? a : b; }
inline u32 larger(u32 a, u32 b) { return a > b ? a : b; }
inline int highest_bit(u32 x) { return 31 - __builtin_clz(x); }
inline u32 bytes(u32 a, u32 b, u32 which) {
  unsigned long long both = (unsigned long long)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; ++i) r |= u32(both >> 8 * (which >> 4 * i & 7) & 0xFF) << 8 * i;
  return r;
}

// ------------------------------------------------------------------------------------------ 16 and 8 bits: the hardware
// x -> the multiple of 2**(its exponent, at least `least`, less `mantissa`), half to even, without fields for large ones.
inline float rounded(float x, int least, int mantissa) {
  int exponent = int(pattern(x) >> 23 & 0xFF) - 127;
  if (exponent == 128) return x;
  float unit = __builtin_ldexpf(1.0f, (exponent > least ? exponent : least) - mantissa);
  return __builtin_rintf(x / unit) * unit;
}
inline u32 to_bf16(float x) {  // the hardware's NaN, which formats do not have
  return x != x ? 0x7FFF : (pattern(x) + 0x7FFF + (pattern(x) >> 16 & 1)) >> 16;
}
inline u32 to_fp16(float x) {
  u32 sign = pattern(x) >> 16 & 0x8000;
  if (x != x) return 0x7FFF;
  float y = __builtin_fabsf(rounded(x, -14, 10));
  if (y >= 65536.0f) return sign | 0x7C00;
  return sign | (y < __builtin_ldexpf(1, -14) ? u32(y * 16777216.0f) : (pattern(y) >> 13) - (112 << 10));
}
inline float from_fp16(u32 bits) {
  u32 exponent = bits >> 10 & 31, mantissa = bits & 1023, sign = (bits & 0x8000) << 16;
  if (exponent == 31) return number(sign | 0x7F800000 | mantissa << 13);
  float y = exponent ? number((exponent + 112) << 23 | mantissa << 13) : __builtin_ldexpf(float(mantissa), -24);
  return number(pattern(y) | sign);
}
inline float from_bf16(u32 bits) { return number(bits << 16); }
inline u32 to_bf16x2(float first, float second) { return to_bf16(first) | to_bf16(second) << 16; }
inline u32 to_fp16x2(float first, float second) { return to_fp16(first) | to_fp16(second) << 16; }
inline u32 mul_fp16x2(u32 a, u32 b) {
  return to_fp16x2(from_fp16(a & 0xFFFF) * from_fp16(b & 0xFFFF), from_fp16(a >> 16) * from_fp16(b >> 16));
}
inline u32 less_bf16x2(u32 a, u32 b) {
  return to_bf16x2(less(from_bf16(a & 0xFFFF), from_bf16(b & 0xFFFF)), less(from_bf16(a >> 16), from_bf16(b >> 16)));
}
inline u32 more_bf16x2(u32 a, u32 b) {
  return to_bf16x2(more(from_bf16(a & 0xFFFF), from_bf16(b & 0xFFFF)), more(from_bf16(a >> 16), from_bf16(b >> 16)));
}
inline u32 more_fp16x2(u32 a, u32 b) {
  return to_fp16x2(more(from_fp16(a & 0xFFFF), from_fp16(b & 0xFFFF)), more(from_fp16(a >> 16), from_fp16(b >> 16)));
}

#ifndef E4M3_BY_HARDWARE
#define E4M3_BY_HARDWARE 0
#endif
constexpr bool HAS_E4M3 = E4M3_BY_HARDWARE;
inline u32 to_e4m3(float x) {
  u32 sign = pattern(x) >> 24 & 0x80;
  if (x != x) return 0x7F;
  float y = __builtin_fabsf(rounded(x, -6, 3));
  if (y >= 448.0f) return sign | 0x7E;
  return sign | (y < 0.015625f ? u32(y * 512.0f) : (pattern(y) >> 20) - (120 << 3));
}
inline u32 to_e4m3x2(float first, float second) { return to_e4m3(first) | to_e4m3(second) << 8; }
inline u32 e4m3_to_fp16(u32 code) {
  u32 magnitude = code & 0x7F;
  float y = magnitude == 0x7F ? number(0x7FC00000)
            : magnitude < 8   ? magnitude / 512.0f
                              : number(((magnitude >> 3) + 120) << 23 | (magnitude & 7) << 20);
  return (code & 0x80) << 8 | to_fp16(y);
}
inline u32 e4m3x2_to_fp16x2(u32 codes) { return e4m3_to_fp16(codes & 0xFF) | e4m3_to_fp16(codes >> 8 & 0xFF) << 16; }

// ----------------------------------------------------------------------------------------------------------- memory
static int misaligned;  // accesses that a GPU would refuse
template <class T> inline T load(const u8* at) {
  T r;
  misaligned += (unsigned long)at % sizeof r != 0;
  memcpy(&r, at, sizeof r);
  return r;
}
template <class T> inline void store(u8* at, T value) {
  misaligned += (unsigned long)at % sizeof value != 0;
  memcpy(at, &value, sizeof value);
}
