// The hot formats on NVIDIA GPUs: one kernel that brings rows from one format to another, `move`. At the end, `unpack`
// decodes rows without loss.
//
// Encode reads values and writes a payload, decode_sum reads the payloads of R ranks and writes values,
// decode_sum_encode reads payloads and writes one. The bytes are those of flashcomm.codecs: each operation on fp32 has
// one rounding, and a fused multiply-add stands only where its product is exact, or in a division by a constant.
//
// A pack of 128 values belongs to a team of lanes. `Wide` gives 32 values to each of 4 lanes, so that values and codes
// move 16 bytes at a time; it needs rows of whole packs whose bytes are aligned. `Thin` gives 4 values to each of 32
// lanes, 32 apart, and serves every row. Formats are written once for both. A `Row` that they write to is a pointer, or
// whatever else can be stored to.
//
// Macros: SOURCE and TARGET (Values<BF16>, Affine<8, 128>, Hadamard<Block<4, 3, 0x7E, 32, E8M0>>, ...), LAYOUT (Wide<16>,
// Wide<4> or Thin), SUM_RANKS (whether there are several payloads to add).

constexpr int PACK = 128;
constexpr u32 QUIET_NAN = 0x7FC00000;
constexpr float LARGEST = 3.402823466e38f, TINY = 1.17549435e-38f;

// 1.5 * 2**23: the lowest bits of the pattern of a sum with it are those of the other number, rounded half to even.
constexpr float ROUND = 12582912.0f;

constexpr float power_of_two(int k) { return k < 0 ? 0.5f * power_of_two(k + 1) : k ? 2.0f * power_of_two(k - 1) : 1.0f; }

// ---------------------------------------------------------------------------------------------------------- layouts

// ALIGNED: the bytes to which payloads are aligned, 16 or 4; values are always aligned to 16.
template <int ALIGNED_> struct Wide {
  static constexpr bool WIDE = true;
  static constexpr int ALIGNED = ALIGNED_, TEAM = 4, VALUES = 32;
  u32 t;     // this lane in its team
  u32 pack;  // the team's pack
  int cols;

  // Values i and i ^ DISTANCE of a pack are values v and v ^ register_bit of lanes t and t ^ lane_bit.
  static constexpr int lane_bit(int distance) { return distance == 16 ? 1 : distance == 32 ? 2 : 0; }
  static constexpr int register_bit(int distance) { return distance < 16 ? distance : distance == 64 ? 16 : 0; }
  // A lane's values are of this many groups, each of which belongs to so many neighbouring lanes.
  static constexpr int sets(int group) { return group == PACK ? 1 : 2; }
  static constexpr int sharers(int group) { return group == 32 ? 2 : 4; }
  INLINE bool inside(int) const { return true; }
  INLINE u32 block_log2(int, int group) const { return highest_bit(group); }
};

struct Thin {
  static constexpr bool WIDE = false;
  static constexpr int ALIGNED = 1, TEAM = 32, VALUES = 4;
  u32 t, pack;
  int cols;

  static constexpr int lane_bit(int distance) { return distance < 32 ? distance : 0; }
  static constexpr int register_bit(int distance) { return distance < 32 ? 0 : distance / 32; }
  static constexpr int sets(int group) { return PACK / group; }
  static constexpr int sharers(int) { return 32; }
  INLINE int column(int v) const { return v * 32 + int(t); }
  // Values of this pack.
  INLINE int count() const { return cols - int(pack) * PACK < PACK ? cols - int(pack) * PACK : PACK; }
  INLINE bool inside(int v) const { return column(v) < count(); }
  // Log2 of the size of the block that value v is transformed in: a short group is cut into powers of two, largest first.
  INLINE u32 block_log2(int v, int group) const {
    int first = column(v) / group * group, here = count() - first < group ? count() - first : group;
    return highest_bit(u32(column(v) - first) ^ u32(here) | 1);
  }
};

// Bytes in front of the codes of a pack, and those of all codes of a row.
template <int BITS> INLINE i64 codes_before(u32 pack) { return i64(pack) * (PACK * BITS / 8); }
template <int BITS> INLINE i64 code_bytes(int cols) {
  return codes_before<BITS>(u32(cols) / PACK) + (cols % PACK * BITS + 7) / 8;
}

template <class Layout> INLINE Words load_words(const u8* at) {
  if constexpr (Layout::ALIGNED == 16) return load<Words>(at);
  else return Words{load<u32>(at), load<u32>(at + 4), load<u32>(at + 8), load<u32>(at + 12)};
}
template <class Layout, class Row> INLINE void store_words(Row at, Words w) {
  if constexpr (Layout::ALIGNED == 16) store(at, w);
  else store(at, w.x), store(at + 4, w.y), store(at + 8, w.z), store(at + 12, w.w);
}

// Numbers of 2 or 4 bytes of a group.
template <class Layout> INLINE u32 load_u32(const u8* at) {
  if constexpr (Layout::WIDE) return load<u32>(at);
  else return at[0] | u32(at[1]) << 8 | u32(at[2]) << 16 | u32(at[3]) << 24;
}
template <class Layout, class Row> INLINE void store_u32(Row at, u32 x) {
  if constexpr (Layout::WIDE) store(at, x);
  else at[0] = u8(x), at[1] = u8(x >> 8), at[2] = u8(x >> 16), at[3] = u8(x >> 24);
}

// ------------------------------------------------------------------------------------------------------------ values

struct BF16 {
  static constexpr int BYTES = 2, MANTISSA = 7;
  static constexpr bool IS_BF16 = true;
  static constexpr u32 NAN_BITS = 0x7FC0;
  static INLINE float widen(u32 bits) { return number(bits << 16); }
  static INLINE void widen2(u32 pair, float& first, float& second) {
    first = number(pair << 16), second = number(pair & 0xFFFF0000u);
  }
  static INLINE u32 narrow2(float first, float second) { return to_bf16x2(first, second); }
  static INLINE u32 more2(u32 a, u32 b) { return more_bf16x2(a, b); }
  static INLINE bool is_nan(u32 half) { return (half & 0x7FFFu) > 0x7F80u; }
};

struct FP16 {
  static constexpr int BYTES = 2, MANTISSA = 10;
  static constexpr bool IS_BF16 = false;
  static constexpr u32 NAN_BITS = 0x7E00;
  static INLINE float widen(u32 bits) { return from_fp16(bits); }
  static INLINE void widen2(u32 pair, float& first, float& second) {
    first = from_fp16(pair & 0xFFFFu), second = from_fp16(pair >> 16);
  }
  static INLINE u32 narrow2(float first, float second) { return to_fp16x2(first, second); }
  static INLINE u32 more2(u32 a, u32 b) { return more_fp16x2(a, b); }
  static INLINE bool is_nan(u32 half) { return (half & 0x7FFFu) > 0x7C00u; }
};

struct FP32 {
  static constexpr int BYTES = 4, MANTISSA = 23;
  static constexpr bool IS_BF16 = false;
};

INLINE u32 quiet(float x) { return x != x ? QUIET_NAN : pattern(x); }

// Every NaN of a pair as the quiet one.
template <class D> INLINE u32 quiet2(u32 pair) {
  if (D::is_nan(pair)) pair = (pair & 0xFFFF0000u) | D::NAN_BITS;
  if (D::is_nan(pair >> 16)) pair = (pair & 0xFFFFu) | D::NAN_BITS << 16;
  return pair;
}

// Rows of values, in a tensor or in a payload.
template <class D> struct Values {
  using Exact = D;  // type that holds what `read` gives

  template <class L> static INLINE void read(const u8* row, const L& at, float (&x)[L::VALUES]) {
    if constexpr (L::WIDE) {
      UNROLL for (int chunk = 0; chunk < 2; ++chunk) {
        const u8* from = row + (i64(at.pack) * PACK + chunk * 64 + at.t * 16) * D::BYTES;
        UNROLL for (int i = 0; i < D::BYTES; ++i) {
          Words w = load<Words>(from + i * 16);
          float* to = x + chunk * 16 + i * (16 / D::BYTES);
          if constexpr (D::BYTES == 4) {
            to[0] = number(w.x), to[1] = number(w.y), to[2] = number(w.z), to[3] = number(w.w);
          } else {
            D::widen2(w.x, to[0], to[1]), D::widen2(w.y, to[2], to[3]);
            D::widen2(w.z, to[4], to[5]), D::widen2(w.w, to[6], to[7]);
          }
        }
      }
    } else {
      UNROLL for (int v = 0; v < L::VALUES; ++v) {
        const u8* from = row + (i64(at.pack) * PACK + at.column(v)) * D::BYTES;
        if (!at.inside(v)) x[v] = 0.0f;
        else if constexpr (D::BYTES == 4) x[v] = number(load<u32>(from));
        else x[v] = D::widen(load<u16>(from));
      }
    }
  }

  template <class, class L, class Row> static INLINE void write(Row row, const L& at, float (&x)[L::VALUES], bool active) {
    if constexpr (!L::WIDE) {
      UNROLL for (int v = 0; v < L::VALUES; ++v) {
        Row to = row + (i64(at.pack) * PACK + at.column(v)) * D::BYTES;
        if (!active || !at.inside(v)) continue;
        if constexpr (D::BYTES == 4) store(to, quiet(x[v]));
        else store(to, u16(quiet2<D>(D::narrow2(x[v], 0.0f))));
      }
    } else {
      u32 w[L::VALUES * D::BYTES / 4];
      narrow<L>(x, w);
      if (!active) return;
      UNROLL for (int chunk = 0; chunk < 2; ++chunk) {
        Row to = row + (i64(at.pack) * PACK + chunk * 64 + at.t * 16) * D::BYTES;
        UNROLL for (int i = 0; i < D::BYTES; ++i) {
          const u32* four = w + (chunk * D::BYTES + i) * 4;
          store(to + i * 16, Words{four[0], four[1], four[2], four[3]});
        }
      }
    }
  }

  // NaN is rare, and its pattern is not that of the hardware: one look at the largest of all values.
  template <class L, int N> static INLINE void narrow(const float (&x)[L::VALUES], u32 (&w)[N]) {
    if constexpr (D::BYTES == 4) {
      float most = x[0];
      UNROLL for (int v = 0; v < N; ++v) most = more(most, x[v]), w[v] = pattern(x[v]);
      if (RARELY(most != most)) {
        UNROLL for (int v = 0; v < N; ++v) w[v] = quiet(x[v]);
      }
    } else {
      UNROLL for (int i = 0; i < N; ++i) w[i] = D::narrow2(x[2 * i], x[2 * i + 1]);
      u32 most = w[0];
      UNROLL for (int i = 1; i < N; ++i) most = D::more2(most, w[i]);
      if (RARELY(D::is_nan(most) || D::is_nan(most >> 16))) {
        UNROLL for (int i = 0; i < N; ++i) w[i] = quiet2<D>(w[i]);
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------------------- codes

// Store the codes, which are the lowest bits of `code`; `keep` is 0 for a set of values whose codes are 0, else ~0.
template <int BITS, class L, int SETS, class Row>
INLINE void store_codes(Row row, const L& at, const u32 (&code)[L::VALUES], const u32 (&keep)[SETS], bool active) {
  row = row + codes_before<BITS>(at.pack);
  if constexpr (L::WIDE) {
    u32 w[BITS];
    UNROLL for (int i = 0; i < BITS; ++i) {
      u32 q[4];
      UNROLL for (int k = 0; k < 4; ++k) {
        // Codes of 4 bits: value v has the low half of a byte and v + 64 of the pack the high half.
        if constexpr (BITS == 4) {
          u32 low = code[4 * i + k], high = code[16 + 4 * i + k];
          q[k] = SETS == 1 ? (high << 4) + low : ((high & keep[SETS - 1]) << 4) + (low & keep[0]);
        } else {
          q[k] = code[4 * i + k];
        }
      }
      w[i] = bytes(bytes(q[0], q[1], 0x0040), bytes(q[2], q[3], 0x0040), 0x5410);
      if (BITS == 8 || SETS == 1) w[i] &= keep[SETS == 1 ? 0 : i / 4];
    }
    if (!active) return;
    UNROLL for (int i = 0; i < BITS / 4; ++i)
      store_words<L>(row + i * 64 + at.t * 16, Words{w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]});
  } else if constexpr (BITS == 8) {
    UNROLL for (int v = 0; v < L::VALUES; ++v)
      if (active && at.inside(v)) row[at.column(v)] = u8(code[v] & keep[v * SETS / L::VALUES]);
  } else {
    // A pack of n codes has m = ceil(n / 2) bytes; value i + m has the high half of byte i.
    u32 m = (at.count() + 1) / 2, from = at.t + m, masked[L::VALUES];
    UNROLL for (int v = 0; v < L::VALUES; ++v) masked[v] = at.inside(v) ? code[v] & keep[v * SETS / L::VALUES] & 15 : 0;
    u32 other[L::VALUES];
    UNROLL for (int v = 0; v < L::VALUES; ++v) other[v] = fetch(masked[v], from & 31);
    UNROLL for (int v = 0; v < 2; ++v) {
      u32 index = from / 32 + v;
      u32 high = index == 0 ? other[0] : index == 1 ? other[1] : index == 2 ? other[2] : index == 3 ? other[3] : 0;
      if (active && u32(at.column(v)) < m) row[at.column(v)] = u8(masked[v] | high << 4);
    }
  }
}

// Codes as bytes: words of four values each, or in `Thin` of one.
template <int BITS, class L> INLINE void load_codes(const u8* row, const L& at, u32 (&words)[L::WIDE ? 8 : 4]) {
  row += codes_before<BITS>(at.pack);
  if constexpr (L::WIDE) {
    UNROLL for (int i = 0; i < BITS / 4; ++i) {
      Words w = load_words<L>(row + i * 64 + at.t * 16);
      words[4 * i] = w.x, words[4 * i + 1] = w.y, words[4 * i + 2] = w.z, words[4 * i + 3] = w.w;
    }
    if constexpr (BITS == 4) {
      UNROLL for (int i = 0; i < 4; ++i) words[4 + i] = words[i] >> 4 & 0x0F0F0F0Fu, words[i] &= 0x0F0F0F0Fu;
    }
  } else {
    int m = (at.count() + 1) / 2;
    UNROLL for (int v = 0; v < L::VALUES; ++v) {
      int column = at.column(v);
      if (!at.inside(v)) words[v] = 0;
      else if constexpr (BITS == 8) words[v] = row[column];
      else words[v] = column < m ? row[column] & 15 : row[column - m] >> 4;
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ groups

// What the lanes of a group find together.
template <int GROUP, class L> struct Groups {
  static constexpr int SETS = L::sets(GROUP), SHARERS = L::sharers(GROUP), EACH = L::VALUES / SETS;
  static constexpr int PER_PACK = PACK / GROUP;

  // Number of a set's group in its row.
  static INLINE u32 index(const L& at, int set) {
    return at.pack * PER_PACK + set * (L::TEAM / SHARERS) + at.t / SHARERS;
  }
  // Whether this lane writes what a group has; in `Thin` there may be no values, and then no group.
  static INLINE bool writes(const L& at, int set) { return at.t % SHARERS == 0 && at.inside(set * EACH); }

  // The smallest and the largest value of each group; NaN if one is.
  template <class Exact> static INLINE void range(const L& at, const float (&x)[L::VALUES], float (&low)[SETS], float (&high)[SETS]) {
    float ends[2 * SETS], other[2 * SETS];
    UNROLL for (int set = 0; set < SETS; ++set) {
      const float* mine = x + set * EACH;
      if constexpr (L::WIDE && Exact::IS_BF16) {
        // Values that are bf16 are compared two at a time.
        u32 least = pair(mine), most = least;
        UNROLL for (int v = 2; v < EACH; v += 2) least = less_bf16x2(least, pair(mine + v)), most = more_bf16x2(most, pair(mine + v));
        ends[2 * set] = less(number(least << 16), number(least & 0xFFFF0000u));
        ends[2 * set + 1] = more(number(most << 16), number(most & 0xFFFF0000u));
      } else {
        ends[2 * set] = number(0x7F800000), ends[2 * set + 1] = number(0xFF800000);
        UNROLL for (int v = 0; v < EACH; ++v)
          if (at.inside(set * EACH + v)) ends[2 * set] = less(ends[2 * set], mine[v]), ends[2 * set + 1] = more(ends[2 * set + 1], mine[v]);
      }
    }
    UNROLL for (u32 mask = 1; mask < SHARERS; mask *= 2) {
      exchange(ends, other, mask);
      UNROLL for (int set = 0; set < SETS; ++set) {
        ends[2 * set] = less(ends[2 * set], other[2 * set]);
        ends[2 * set + 1] = more(ends[2 * set + 1], other[2 * set + 1]);
      }
    }
    UNROLL for (int set = 0; set < SETS; ++set) low[set] = ends[2 * set], high[set] = ends[2 * set + 1];
  }

  static INLINE u32 pair(const float* x) { return pattern(x[0]) >> 16 | (pattern(x[1]) & 0xFFFF0000u); }
};

// x / D, correctly rounded where it is at least 2**-126; at most that where it is less; NaN for Inf. The residual
// x - q * D is exact, and the quotient of a number of 24 bits by an odd number of 3 to 8 bits, times a power of two, is
// never so close to the middle of two neighbours that the last sum could round it to the wrong one.
template <int D> INLINE float over(float x) {
  constexpr float y = 1.0f / D;
  float q = mul(x, y);
  return multiply_add(multiply_add(q, -float(D), x), y, q);
}

// ------------------------------------------------------------------------------------------------------------ affine

// codecs/affine.py: integer codes with a scale and a zero point, both bf16.
template <int BITS, int GROUP> struct Affine {
  using Exact = FP32;
  static constexpr int LAST = (1 << BITS) - 1, PACK_BYTES = PACK / 8 * BITS + PACK / GROUP * 4;

  // fp32 with the pattern of a bf16, rounded away from zero.
  static INLINE float outward(float x) { return number(pattern(x) + 0xFFFFu & 0xFFFF0000u); }

  template <class From, class L, class Row> static INLINE void write(Row row, const L& at, float (&x)[L::VALUES], bool active) {
    using G = Groups<GROUP, L>;
    float low[G::SETS], high[G::SETS];
    u32 keep[G::SETS], code[L::VALUES];
    G::template range<From>(at, x, low, high);
    Row meta = row + code_bytes<BITS>(at.cols);
    UNROLL for (int set = 0; set < G::SETS; ++set) {
      // Toward zero if positive, and -0 becomes +0.
      float zero = add(low[set] < 0.0f ? outward(low[set]) : number(pattern(low[set]) & 0xFFFF0000u), 0.0f);
      float span = sub(high[set], zero);
      float scale = span > 0.0f ? outward(at_least(over<LAST>(span), TINY)) : 0.0f;
      // Of a group that holds NaN or Inf, or whose range or largest value is beyond fp32, one of these is not finite.
      float end = add(mul(scale, float(LAST)), zero);
      bool finite = number(pattern(span) & 0x7FFFFFFFu) <= LARGEST && number(pattern(end) & 0x7FFFFFFFu) <= LARGEST;
      float inverse = scale > 0.0f ? reciprocal(scale) : 0.0f;
      UNROLL for (int v = set * G::EACH; v < (set + 1) * G::EACH; ++v)
        code[v] = pattern(add(mul(sub(x[v], zero), inverse), ROUND));
      keep[set] = finite ? 0xFFFFFFFFu : 0u;
      u32 both = finite ? pattern(scale) >> 16 | (pattern(zero) & 0xFFFF0000u) : QUIET_NAN | QUIET_NAN >> 16;
      if (active && G::writes(at, set)) store_u32<L>(meta + i64(G::index(at, set)) * 4, both);
    }
    store_codes<BITS>(row, at, code, keep, active);
  }

  template <class L> static INLINE void read(const u8* row, const L& at, float (&x)[L::VALUES]) {
    using G = Groups<GROUP, L>;
    u32 words[L::WIDE ? 8 : 4];
    load_codes<BITS>(row, at, words);
    const u8* meta = row + code_bytes<BITS>(at.cols);
    UNROLL for (int set = 0; set < G::SETS; ++set) {
      u32 both = at.inside(set * G::EACH) ? load_u32<L>(meta + i64(G::index(at, set)) * 4) : 0;
      float scale = number(both << 16), zero = number(both & 0xFFFF0000u);
      UNROLL for (int v = set * G::EACH; v < (set + 1) * G::EACH; ++v) {
        u32 word = L::WIDE ? words[v / 4] : words[v];
        // 2**23 + code, as a pattern. The product of 8 by 8 bits is exact, so it and the sum have one rounding.
        float code = sub(number(bytes(word, 0x4B000000u, 0x7650u | (L::WIDE ? v % 4 : 0))), 8388608.0f);
        x[v] = multiply_add(code, scale, zero);
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------------ block floats

enum Scale { E8M0, SCALE_FP32 };

// codecs/blocks.py: elements of a sign, EXP bits of exponent and MAN of mantissa, with one scale per group.
template <int EXP, int MAN, int LAST, int GROUP, Scale SCALE> struct Block {
  using Exact = FP32;
  static constexpr int BITS = 1 + EXP + MAN, META = SCALE == E8M0 ? 1 : 4;
  static constexpr int PACK_BYTES = PACK / 8 * BITS + PACK / GROUP * META;
  static constexpr int LOWEST = 2 - (1 << (EXP - 1));  // the exponent of the smallest normal element
  static constexpr bool E4M3 = EXP == 4 && MAN == 3 && HAS_E4M3;
  static constexpr float spacing(int binade) { return power_of_two(binade + LOWEST - MAN); }
  static constexpr float TOP = ((LAST & ((1 << MAN) - 1)) + (1 << MAN)) * spacing((LAST >> MAN) - 1);
  // The largest magnitude in units of the scale.
  static constexpr float LIMIT = TOP + (SCALE == E8M0 ? spacing((LAST >> MAN) - 1) / 2 : 0.0f);

  // The code in the lowest byte of the result. The sum with `magic` is rounded to the element's spacing.
  static INLINE u32 encode(float x) {
    float magnitude = at_most(number(pattern(x) & 0x7FFFFFFFu), TOP);
    u32 exponent = larger(pattern(magnitude) & 0x7F800000u, u32(LOWEST + 127) << 23);
    // The last term is the code of the lowest exponent, of which `exponent` below is too large.
    u32 magic = exponent + ((u32(23 - MAN) << 23) + 0x400000u + (-(u32(LOWEST + 127) << MAN) & 0xFFu));
    u32 code = pattern(add(magnitude, number(magic))) + (exponent >> (23 - MAN));
    return (code & 0xFFu) | (pattern(x) >> (32 - BITS) & (1u << (BITS - 1)));
  }

  // Four codes in the bytes of a word -> elements, times 1 / SHIFT.
  static constexpr int SHIFT_LOG2 = E4M3 || EXP == 2 ? 0 : 15 - (1 << (EXP - 1)) + 1;
  static INLINE void decode(u32 word, float (&x)[4]) {
    UNROLL for (int i = 0; i < 2; ++i) {
      u32 halves;
      if constexpr (E4M3) {
        halves = e4m3x2_to_fp16x2(word >> (16 * i));
      } else {
        // The fields of an fp16, whose exponent has another bias.
        u32 high = bytes(word, 0, i ? 0x3424 : 0x1404), sign = EXP + MAN == 7 ? high : high << 4;
        u32 fields = EXP + MAN == 7 ? high >> 1 & 0x3F803F80u : high << (10 - MAN - 8) & 0x0E000E00u;
        halves = (sign & 0x80008000u) | fields;
        if constexpr (EXP == 2) halves = mul_fp16x2(halves, 0x74007400u);  // 2**14, which a scale might not take
      }
      FP16::widen2(halves, x[2 * i], x[2 * i + 1]);
    }
  }

  template <class From, class L, class Row> static INLINE void write(Row row, const L& at, float (&x)[L::VALUES], bool active) {
    using G = Groups<GROUP, L>;
    float low[G::SETS], high[G::SETS];
    u32 keep[G::SETS], code[L::VALUES];
    G::template range<From>(at, x, low, high);
    Row meta = row + code_bytes<BITS>(at.cols);
    UNROLL for (int set = 0; set < G::SETS; ++set) {
      float magnitude = more(number(pattern(low[set]) & 0x7FFFFFFFu), number(pattern(high[set]) & 0x7FFFFFFFu));
      bool bad = !(magnitude < power_of_two(127));
      float inverse;
      Row to = meta + i64(G::index(at, set)) * META;
      bool writes = active && G::writes(at, set);
      if constexpr (SCALE == E8M0) {
        int exponent = int(pattern(bad ? 0.0f : magnitude) - pattern(LIMIT) + 0x7FFFFFu) >> 23;
        u32 scale = exponent < -126 ? 1 : exponent + 127;
        inverse = number((254 - scale) << 23);
        if (writes) store(to, u8(bad ? 255 : scale));
      } else {
        float scale = at_least(over<int(LIMIT)>(bad ? 0.0f : magnitude), TINY);
        inverse = reciprocal(scale);
        if (writes) store_u32<L>(to, bad ? QUIET_NAN : pattern(scale));
      }
      keep[set] = bad ? 0u : 0xFFFFFFFFu;
      UNROLL for (int v = set * G::EACH; v < (set + 1) * G::EACH; ++v) {
        if constexpr (!E4M3) {
          code[v] = encode(mul(x[v], inverse));
        } else if (v % 2 == 0 || !L::WIDE) {
          u32 codes = to_e4m3x2(mul(x[v], inverse), L::WIDE ? mul(x[v | 1], inverse) : 0.0f);
          code[v] = codes;
          if (L::WIDE) code[v | 1] = codes >> 8;
        }
      }
    }
    store_codes<BITS>(row, at, code, keep, active);
  }

  template <class L> static INLINE void read(const u8* row, const L& at, float (&x)[L::VALUES]) {
    using G = Groups<GROUP, L>;
    u32 words[L::WIDE ? 8 : 4];
    load_codes<BITS>(row, at, words);
    const u8* meta = row + code_bytes<BITS>(at.cols);
    UNROLL for (int set = 0; set < G::SETS; ++set) {
      const u8* from = meta + i64(G::index(at, set)) * META;
      float scale = 0.0f;
      if (at.inside(set * G::EACH)) {
        if constexpr (SCALE == E8M0) scale = number(*from == 255 ? QUIET_NAN : u32(*from) << 23);
        else scale = number(load_u32<L>(from));
      }
      scale = mul(scale, power_of_two(SHIFT_LOG2));
      UNROLL for (int v = set * G::EACH; v < (set + 1) * G::EACH; v += L::WIDE ? 4 : 1) {
        float four[4];
        decode(L::WIDE ? words[v / 4] : words[v], four);
        UNROLL for (int k = 0; k < (L::WIDE ? 4 : 1); ++k) x[v + k] = mul(four[k], scale);
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------------------- Hadamard

// codecs/hadamard.py: the Walsh-Hadamard transform of each group in front of a format.
template <class Base, int GROUP> struct Hadamard {
  using Exact = FP32;
  static constexpr int PACK_BYTES = Base::PACK_BYTES;

  // Stages of a + b and a - b, neighbours first.
  template <class L, int DISTANCE = 1> static INLINE void transform(const L& at, float (&x)[L::VALUES]) {
    if constexpr (DISTANCE < GROUP) {
      constexpr int LANE = L::lane_bit(DISTANCE), REGISTER = L::register_bit(DISTANCE);
      float y[L::VALUES];
      if constexpr (LANE) {
        exchange(x, y, LANE);
        // A product with 1 or -1 is exact.
        float sign = at.t & LANE ? -1.0f : 1.0f;
        UNROLL for (int v = 0; v < L::VALUES; ++v) y[v] = multiply_add(x[v], sign, y[v]);
      } else {
        UNROLL for (int v = 0; v < L::VALUES; ++v)
          y[v] = v & REGISTER ? sub(x[v ^ REGISTER], x[v]) : add(x[v], x[v ^ REGISTER]);
      }
      UNROLL for (int v = 0; v < L::VALUES; ++v)
        if (L::WIDE || DISTANCE >> at.block_log2(v, GROUP) == 0) x[v] = y[v];
      transform<L, DISTANCE * 2>(at, x);
    }
  }

  template <class, class L, class Row> static INLINE void write(Row row, const L& at, float (&x)[L::VALUES], bool active) {
    UNROLL for (int v = 0; v < L::VALUES; ++v) x[v] = mul(x[v], number((127 - at.block_log2(v, GROUP)) << 23));
    transform(at, x);
    Base::template write<FP32>(row, at, x, active);
  }

  template <class L> static INLINE void read(const u8* row, const L& at, float (&x)[L::VALUES]) {
    Base::read(row, at, x);
    transform(at, x);
  }
};

// ------------------------------------------------------------------------------------------------------------ kernel

template <bool, class A, class> struct Choose { using type = A; };
template <class A, class B> struct Choose<false, A, B> { using type = B; };

// Target row t = source row t, or the SUM over ranks, in order, of their source rows t. Strides are bytes.
template <class Source, class Target, class Layout, bool SUM>
INLINE void move_rows(const u8* __restrict__ source, i64 rank_stride, i64 row_stride, u8* __restrict__ target,
                      i64 target_stride, i64 rows, int ranks, int cols) {
  const u32 packs = (u32(cols) + PACK - 1) / PACK;
  const i64 total = rows * packs;
  constexpr int TEAMS = 32 / Layout::TEAM;
  using Exact = typename Choose<SUM, FP32, typename Source::Exact>::type;
  for (i64 first = warp() * TEAMS; first < total; first += num_warps() * TEAMS) {
    i64 item = first + lane() / Layout::TEAM;
    // All lanes of a warp take part in exchanges; those beyond the end repeat the last pack and write nothing.
    bool active = item < total;
    if (!active) item = total - 1;
    // The host sees to it that there are fewer than 2**32 packs.
    u32 row = u32(item) / packs;
    Layout at{lane() % Layout::TEAM, u32(item) - row * packs, cols};
    const u8* from = source + row * row_stride;
    float x[Layout::VALUES];
    if constexpr (SUM) {
      // Adding to -0 changes nothing.
      UNROLL for (int v = 0; v < Layout::VALUES; ++v) x[v] = -0.0f;
      ONE_BY_ONE for (int rank = 0; rank < ranks; ++rank, from += rank_stride) {
        float y[Layout::VALUES];
        Source::read(from, at, y);
        UNROLL for (int v = 0; v < Layout::VALUES; ++v) x[v] = add(x[v], y[v]);
      }
    } else {
      Source::read(from, at, x);
    }
    Target::template write<Exact>(target + row * target_stride, at, x, active);
  }
}

// ---------------------------------------------------------------------------------------------------------- lossless

// codecs/lossless.py: rows that vary in length, a warp for each. A lane has eight values; the place of an escape follows
// from the number of escapes before it.
template <class D> struct Lossless {
  static constexpr int EACH = 8, REST = D::MANTISSA - 7, PLANES = 3 + REST, HEADER = 5;
  const u8* row;
  int cols;
  u32 length, base;

  INLINE Lossless(const u8* at, int n)
      : row(at), cols(n), length(at[0] | u32(at[1]) << 8 | u32(at[2]) << 16 | u32(at[3]) << 24), base(at[4]) {}

  // The lowest four bits of x, one in each byte.
  static INLINE u32 spread(u32 x) { return (x & 15) * 0x00204081u & 0x01010101u; }

  // The patterns of the lane's values, from `first` on. `escapes` counts the row's escapes so far.
  INLINE void read(int first, u32& escapes, u32 (&patterns)[EACH]) const {
    int inside = cols - first < 0 ? 0 : cols - first < EACH ? cols - first : EACH;
    UNROLL for (int k = 0; k < EACH; ++k) patterns[k] = 0;
    if (length <= 4) return;
    if (length >= 4 + 2 * u32(cols)) {
      UNROLL for (int k = 0; k < EACH; ++k)
        if (k < inside) patterns[k] = row[4 + 2 * (first + k)] | u32(row[5 + 2 * (first + k)]) << 8;
      return;
    }
    const int plane_bytes = (cols + 7) / 8;
    const u8* plane = row + HEADER + cols + first / 8;
    u32 bits[PLANES], tops[2] = {0, 0};
    UNROLL for (int j = 0; j < PLANES; ++j) bits[j] = inside ? plane[j * plane_bytes] : 0;
    const u8* top = row + HEADER + first;
    if (inside == EACH) {
      // Words at multiples of four bytes; what lies around the tops is the row's, too.
      u32 shift = u32(u64(top)) & 3, which = 0x3210 + 0x1111 * shift;
      u32 w[3];
      UNROLL for (int i = 0; i < 3; ++i) w[i] = load<u32>(top - shift + 4 * i);
      tops[0] = bytes(w[0], w[1], which), tops[1] = bytes(w[1], w[2], which);
    } else {
      UNROLL for (int k = 0; k < EACH; ++k)
        if (k < inside) tops[k / 4] |= u32(top[k]) << 8 * (k % 4);
    }
    u32 exponents[2];
    UNROLL for (int i = 0; i < 2; ++i) {
      u32 code = spread(bits[0] >> 4 * i) | spread(bits[1] >> 4 * i) << 1 | spread(bits[2] >> 4 * i) << 2;
      // Bytes that are added on their own.
      u32 lowest = base * 0x01010101u;
      exponents[i] = (code + (lowest & 0x7F7F7F7Fu)) ^ (lowest & 0x80808080u);
    }
    UNROLL for (int k = 0; k < EACH; ++k) patterns[k] = pattern_of(tops[k / 4] >> 8 * (k % 4), exponents[k / 4] >> 8 * (k % 4));
    UNROLL for (int j = 0; j < REST; ++j)
      UNROLL for (int k = 0; k < EACH; ++k) patterns[k] |= (bits[3 + j] >> k & 1) << j;
    u32 escaped = bits[0] & bits[1] & bits[2] & ((1u << inside) - 1), mine = ones(escaped), before = mine;
    UNROLL for (u32 distance = 1; distance < 32; distance *= 2) {
      u32 other = fetch(before, lane() - distance & 31);
      if (lane() >= distance) before += other;
    }
    if (escaped) {
      u32 place = u32(HEADER + cols + PLANES * plane_bytes) + escapes + before - mine;
      UNROLL for (int k = 0; k < EACH; ++k)
        if (escaped >> k & 1) {
          // Escapes beyond the row can only be meant by a broken one.
          u32 exponent = row[place < length ? place : length - 1];
          patterns[k] = (patterns[k] & ~pattern_of(0, 0xFF)) | pattern_of(0, exponent);
          ++place;
        }
    }
    escapes += fetch(before, 31);
  }

  static INLINE u32 pattern_of(u32 top, u32 exponent) {
    return (top & 0x80) << 8 | (exponent & (0x7FFF >> D::MANTISSA)) << D::MANTISSA | (top & 0x7F) << REST;
  }
};

// Eight values of a row of `Out` from their words, of which `inside` are there.
template <class Out, int N> INLINE void store_eight(u8* to, const u32 (&w)[N], int inside) {
  if (inside == 8 && (u64(to) & 15) == 0) {
    UNROLL for (int i = 0; i < N / 4; ++i) store(to + 16 * i, Words{w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]});
    return;
  }
  UNROLL for (int k = 0; k < 8; ++k) {
    if (k >= inside) continue;
    if constexpr (Out::BYTES == 4) store(to + 4 * k, w[k]);
    else store(to + 2 * k, u16(w[k / 2] >> 16 * (k % 2)));
  }
}

// Target row t = source row t without loss, or the SUM over up to 32 ranks, in order, of their source rows t.
template <class D, class Out, bool SUM>
INLINE void unpack_rows(const u8* __restrict__ source, i64 rank_stride, i64 row_stride, u8* __restrict__ target,
                        i64 target_stride, i64 rows, int ranks, int cols) {
  constexpr bool AS_IT_IS = !SUM && Out::MANTISSA == D::MANTISSA;
  for (i64 row = warp(); row < rows; row += num_warps()) {
    u32 escapes = 0;  // in a sum, those of rank `lane()`
    for (int start = 0; start < cols; start += 256) {
      int first = start + int(lane()) * 8;
      const u8* from = source + row * row_stride;
      u32 patterns[8], w[2 * Out::BYTES];
      float x[8];
      UNROLL for (int k = 0; k < 8; ++k) x[k] = -0.0f;
      ONE_BY_ONE for (int rank = 0; rank < (SUM ? ranks : 1); ++rank, from += rank_stride) {
        u32 before = SUM ? fetch(escapes, rank) : escapes;
        Lossless<D>(from, cols).read(first, before, patterns);
        if (!SUM || int(lane()) == rank) escapes = before;
        // Adding to -0 changes nothing.
        UNROLL for (int k = 0; k < 8; ++k) x[k] = add(x[k], D::widen(patterns[k]));
      }
      UNROLL for (int i = 0; i < 2 * Out::BYTES; ++i) {
        if constexpr (AS_IT_IS) w[i] = patterns[2 * i] | patterns[2 * i + 1] << 16;
        else if constexpr (Out::BYTES == 4) w[i] = quiet(x[i]);
        else w[i] = quiet2<Out>(Out::narrow2(x[2 * i], x[2 * i + 1]));
      }
      store_eight<Out>(target + row * target_stride + i64(first) * Out::BYTES, w, cols - first < 8 ? cols - first : 8);
    }
  }
}

#ifdef SOURCE
KERNEL(128) move(const u8* __restrict__ source, i64 rank_stride, i64 row_stride, u8* __restrict__ target, i64 target_stride,
                 i64 rows, int ranks, int cols) {
  move_rows<SOURCE, TARGET, LAYOUT, SUM_RANKS>(source, rank_stride, row_stride, target, target_stride, rows, ranks, cols);
}
#endif

#ifdef UNPACK
KERNEL(128) unpack(const u8* __restrict__ source, i64 rank_stride, i64 row_stride, u8* __restrict__ target,
                   i64 target_stride, i64 rows, int ranks, int cols) {
  unpack_rows<UNPACK>(source, rank_stride, row_stride, target, target_stride, rows, ranks, cols);
}
#endif
