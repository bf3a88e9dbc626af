// The operations that codecs.cu, entropy.cu and exchange.cu ask of a GPU. tests/cuda_on_cpu.h gives the same names a meaning on a
// CPU, so the kernels themselves contain no PTX and no built-in of CUDA.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;
using Words = uint4;

#define INLINE __forceinline__ __device__
#define UNROLL _Pragma("unroll")
#define RARELY(condition) __builtin_expect(condition, 0)
#define ONE_BY_ONE _Pragma("unroll 1")
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)

// Lanes and warps.
INLINE u32 lane() { return threadIdx.x & 31; }
INLINE i64 warp() { return i64(blockIdx.x) * (blockDim.x >> 5) + (threadIdx.x >> 5); }
INLINE i64 num_warps() { return i64(gridDim.x) * (blockDim.x >> 5); }

// Blocks.
INLINE u32 thread() { return threadIdx.x; }
INLINE u32 num_threads() { return blockDim.x; }
INLINE u32 block() { return blockIdx.x; }
INLINE u32 num_blocks() { return gridDim.x; }
INLINE void barrier() { __syncthreads(); }
template <int BYTES> INLINE u8* shared_memory() { __shared__ __align__(16) u8 memory[BYTES]; return memory; }

// other[i] = x[i] of the lane whose number differs from this one's in the bits of `mask`.
template <int N> INLINE void exchange(const float (&x)[N], float (&other)[N], u32 mask) {
  UNROLL for (int i = 0; i < N; ++i) other[i] = __shfl_xor_sync(0xFFFFFFFFu, x[i], mask);
}

// x of lane `from`.
INLINE u32 fetch(u32 x, u32 from) { return __shfl_sync(0xFFFFFFFFu, x, from); }

// fp32: one rounding each, half to even, subnormals kept.
INLINE u32 pattern(float x) { return __float_as_uint(x); }
INLINE float number(u32 bits) { return __uint_as_float(bits); }
INLINE float add(float a, float b) { return __fadd_rn(a, b); }
INLINE float sub(float a, float b) { return __fsub_rn(a, b); }
INLINE float mul(float a, float b) { return __fmul_rn(a, b); }
INLINE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
INLINE float reciprocal(float x) { return __frcp_rn(x); }

// NaN if one of them is.
INLINE float less(float a, float b) { float r; asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
INLINE float more(float a, float b) { float r; asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
// The number, if one of them is NaN.
INLINE float at_most(float a, float b) { return fminf(a, b); }
INLINE float at_least(float a, float b) { return fmaxf(a, b); }
INLINE u32 larger(u32 a, u32 b) { return max(a, b); }
INLINE int highest_bit(u32 x) { return 31 - __clz(x); }
INLINE u32 ones(u32 x) { return __popc(x); }
INLINE u32 reversed(u32 x) { return __brev(x); }

// Four bytes of the eight of a (0 to 3) and b (4 to 7), chosen by the hexadecimal digits of `which`, lowest first.
INLINE u32 bytes(u32 a, u32 b, u32 which) { return __byte_perm(a, b, which); }

// Pairs of 16-bit numbers in a word, the first in the low half.
INLINE u32 to_bf16x2(float first, float second) {
  u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first)); return r;
}
INLINE u32 to_fp16x2(float first, float second) {
  u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first)); return r;
}
INLINE float from_fp16(u32 bits) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(u16(bits))); return r; }
INLINE u32 mul_fp16x2(u32 a, u32 b) { u32 r; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
INLINE u32 less_bf16x2(u32 a, u32 b) { u32 r; asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
INLINE u32 more_bf16x2(u32 a, u32 b) { u32 r; asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
INLINE u32 more_fp16x2(u32 a, u32 b) { u32 r; asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }

// E4M3 by the hardware: codes of a pair in the low 16 bits, half to even, at most the largest.
#if __CUDA_ARCH__ >= 890
constexpr bool HAS_E4M3 = true;
INLINE u32 to_e4m3x2(float first, float second) {
  u16 r; asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(second), "f"(first)); return r;
}
INLINE u32 e4m3x2_to_fp16x2(u32 codes) {
  u32 r; asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(u16(codes))); return r;
}
#else
constexpr bool HAS_E4M3 = false;
INLINE u32 to_e4m3x2(float, float) { return 0; }
INLINE u32 e4m3x2_to_fp16x2(u32) { return 0; }
#endif

// Memory. 16 bytes at once need an address that is a multiple of 16.
template <class T> INLINE T load(const u8* at) { return *reinterpret_cast<const T*>(at); }
template <class T> INLINE void store(u8* at, T value) { *reinterpret_cast<T*>(at) = value; }

// Between GPUs. Numbers that others write or look at meanwhile, whole; a fence puts all else in order around them.
INLINE void set(u64* at, u64 x) { asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(at), "l"(x) : "memory"); }
INLINE u64 look(const u64* at) {
  u64 r; asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(r) : "l"(at) : "memory"); return r;
}
INLINE void fence() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
// Wait until a flag is at least `least`; false once it has been looked at `patience` times, which counts down.
INLINE bool reached(const u64* flag, u64 least, u32& patience) {
  while (look(flag) < least)
    if (patience-- == 0) return patience = 0, false;
  return true;
}
// Wait until the high half of a line is `mark`; `data` is its low half.
INLINE bool arrived(const u64* line, u32 mark, u32& data, u32& patience) {
  for (;;) {
    u64 x = look(line);
    data = u32(x);
    if (u32(x >> 32) == mark) return true;
    if (patience-- == 0) return patience = 0, false;
  }
}
// Between blocks of a launch: the number that was there before.
INLINE u64 swap(u64* at, u64 x) { return atomicExch(at, x); }
INLINE u64 count(u64* at) { return atomicAdd(at, 1ull); }
