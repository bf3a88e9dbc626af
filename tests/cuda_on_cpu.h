// The operations of device.cuh on a CPU, so that codecs.cu, entropy.cu and exchange.cu run there as they are. Threads are fibers,
// which take turns wherever one waits for others: ranks of blocks of warps. Compile with -ffp-contract=off.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <vector>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;
struct Words { u32 x, y, z, w; };

#define INLINE inline
#define UNROLL
#define ONE_BY_ONE
#define RARELY(condition) (condition)

// --------------------------------------------------------------------------------------------------- lanes and blocks
struct Fiber {
  ucontext_t context;
  u32 rank, block, thread, warp, exchanges, barriers;
  bool ended;
};
struct WarpState { u32 slots[2][32][64], arrivals; };  // two, as a lane may write its next values before all have read its last
struct BlockState { alignas(16) u8 shared[1 << 16]; u32 arrivals; };
static std::vector<Fiber> fibers;
static std::vector<WarpState> warps;
static std::vector<BlockState> blocks;
static ucontext_t caller;
static u32 current, alive, threads_of_a_block, blocks_of_a_rank;
static u64 chance;  // 0: fibers take turns in order; else the next one is drawn now and then
static i64 turns;

inline u32 lane() { return fibers[current].thread % 32; }
inline i64 warp() { return 0; }
inline i64 num_warps() { return 1; }
inline u32 thread() { return fibers[current].thread; }
inline u32 num_threads() { return threads_of_a_block; }
inline u32 block() { return fibers[current].block; }
inline u32 num_blocks() { return blocks_of_a_rank; }
inline u32 this_rank() { return fibers[current].rank; }
inline BlockState& this_block() { return blocks[this_rank() * blocks_of_a_rank + block()]; }

// Give the turn to another fiber.
inline void yield() {
  if (++turns > 200000000) fprintf(stderr, "threads wait for each other\n"), abort();
  u32 me = current, next = me;
  if (chance) {
    chance ^= chance << 13, chance ^= chance >> 7, chance ^= chance << 17;
    if (chance % 16 == 0) next = (chance >> 8) % fibers.size();
  }
  do next = (next + 1) % fibers.size();
  while (fibers[next].ended);
  if (next == me) return;
  current = next;
  swapcontext(&fibers[me].context, &fibers[next].context);
  current = me;
}

// Return once all lanes of the warp have come here.
inline u32 (*meet(const void* values, int count))[64] {
  Fiber& me = fibers[current];
  WarpState& mine = warps[me.warp];
  auto& half = mine.slots[me.exchanges++ & 1];
  memcpy(half[me.thread % 32], values, 4 * count);
  ++mine.arrivals;
  while (mine.arrivals < 32 * fibers[current].exchanges) yield();
  return half;
}
template <int N> inline void exchange(const float (&x)[N], float (&other)[N], u32 mask) {
  u32 from = lane() ^ mask;
  memcpy(other, meet(x, N)[from], 4 * N);
}
inline u32 fetch(u32 x, u32 from) { return meet(&x, 1)[from][0]; }

template <void (*body)()> void enter() {
  body();
  fibers[current].ended = true;
  if (--alive == 0) setcontext(&caller);
  yield();
}

// Run `body` in each thread of each block of each rank.
template <void (*body)()> void run_blocks(u32 ranks, u32 num_blocks, u32 num_threads, u64 seed = 0) {
  static std::vector<u8> stacks;
  constexpr u32 STACK = 1 << 16;
  u32 number = ranks * num_blocks * num_threads;
  if (stacks.size() < i64(number) * STACK) stacks.resize(i64(number) * STACK);
  fibers.assign(number, Fiber{}), warps.assign(number / 32, WarpState{}), blocks.assign(ranks * num_blocks, BlockState{});
  threads_of_a_block = num_threads, blocks_of_a_rank = num_blocks, chance = seed, alive = number, turns = 0;
  for (u32 i = 0; i < number; ++i) {
    Fiber& fiber = fibers[i];
    fiber.thread = i % num_threads, fiber.block = i / num_threads % num_blocks, fiber.rank = i / num_threads / num_blocks;
    fiber.warp = i / 32;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.data() + i64(i) * STACK, fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, enter<body>, 0);
  }
  current = 0;
  swapcontext(&caller, &fibers[0].context);
}
template <void (*body)()> void run() { run_blocks<body>(1, 1, 32); }

// -------------------------------------------------------------------------------------------------------- what happened
// Accesses to the memory of ranks, and what puts them in order; addresses are offsets behind `traced`.
enum Kind { READ, WRITE, SET, WAITED, TOOK, FENCE, BARRIER };
struct Event { i64 kind, thread, address, value; };
static std::vector<Event> events;
static const u8* traced;
static i64 traced_bytes;
inline void note_event(Kind kind, const void* at, u64 value) {
  i64 address = (const u8*)at - traced;
  if (traced && (!at || (address >= 0 && address < traced_bytes)))
    events.push_back({kind, current, at ? address : 0, i64(value)});
}

// ------------------------------------------------------------------------------------------------ blocks and other GPUs
inline void barrier() {
  note_event(BARRIER, nullptr, 0);
  ++this_block().arrivals;
  u32 all = ++fibers[current].barriers * threads_of_a_block;
  while (this_block().arrivals < all) yield();
}
template <int BYTES> inline u8* shared_memory() {
  static_assert(BYTES <= sizeof(BlockState::shared), "more than the memory of a block");
  return this_block().shared;
}
inline void fence() { note_event(FENCE, nullptr, 0); }
inline void set(u64* at, u64 x) {
  note_event(SET, at, x);
  *at = x;
  yield();
}
// Also what did not come is noted: somewhere it might have.
inline bool reached(const u64* flag, u64 least, u32& patience) {
  bool come = *flag >= least;
  for (; !come && patience; come = *flag >= least) --patience, yield();
  note_event(WAITED, flag, least);
  return come;
}
inline bool arrived(const u64* line, u32 mark, u32& data, u32& patience) {
  bool come = u32(*line >> 32) == mark;
  for (; !come && patience; come = u32(*line >> 32) == mark) --patience, yield();
  note_event(TOOK, line, mark);
  data = u32(*line);
  return come;
}
inline u64 swap(u64* at, u64 x) {
  u64 before = *at;
  *at = x;
  return before;
}
inline u64 count(u64* at) { return (*at)++; }

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
inline u32 ones(u32 x) { return __builtin_popcount(x); }
inline u32 reversed(u32 x) {
  u32 r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
  return r;
}
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
  note_event(READ, at, sizeof r);
  memcpy(&r, at, sizeof r);
  return r;
}
template <class T> inline void store(u8* at, T value) {
  misaligned += (unsigned long)at % sizeof value != 0;
  note_event(WRITE, at, sizeof value);
  memcpy(at, &value, sizeof value);
}
