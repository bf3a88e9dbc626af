// Entropy-coded rows (codecs/entropy.py) to values, a lane for each stream: a row has two, or four from 1,024 values on.
//
// A stream is a chain of words, each of which tells where the next one begins, so only other streams hide its latency.
// The records of a row's escapes are one list behind its first stream, in the order of the values. So lanes of a row that
// has escapes read their streams twice, and count first.
//
// Macros: DECODED, the type of the values, and MOST_RANKS, of which rows are added; 1: nothing is added.

constexpr int PEEK = 11, TOP = 14, MOST_TABLE = 42, LADDER = 4032, SECOND_PAIR = 1024, ESCAPE = 64, MOST_WIDTH = 24;

// What launch.py copies to the device.
struct Tables {
  u32 mantissas[16];             // patterns of the steps of an octave
  u32 limits[TOP + 2];           // numbers that do not escape
  u16 words[TOP + 1][1 << PEEK]; // by the next PEEK bits of a stream: number, and bits of its word in the high byte
};

// Bits of a stream, the next one highest. Streams go up from their first byte, or down from their last.
struct Bits {
  const u8* row;
  int size, at, held = 0;
  bool down;
  u32 window = 0;

  INLINE Bits(const u8* row, int size, int at, bool down) : row(row), size(size), at(at), down(down) {}

  INLINE u32 peek() {
    ONE_BY_ONE while (held <= 24) {
      // Bits beyond the row can only be meant by a broken one.
      u32 byte = at >= 0 && at < size ? row[at] : 0;
      window |= (down ? byte : reversed(byte) >> 24) << (24 - held);
      held += 8, at += down ? -1 : 1;
    }
    return window >> (32 - PEEK);
  }
  INLINE void skip(u32 bits) { window <<= bits, held -= bits; }
};

// One stream of a row, and where its next record is.
struct Stream {
  Bits bits;
  const u16* words;
  u32 limit, width, raw, record = 0;
  int planes, plane_bytes;
  float step;
  bool zero;

  INLINE Stream(const u8* row, int size, int cols, int index, const Tables& tables) : bits(row, size, 0, index & 1) {
    const int pairs = cols < SECOND_PAIR ? 1 : 2;
    const u32 head = row[0] | u32(row[1]) << 8 | u32(row[2]) << 16, k = head & 4095;
    u32 table = head >> 12 & 63;
    table = table < MOST_TABLE ? table : MOST_TABLE;
    raw = table > TOP ? (table - TOP + 3) / 4 : 0;
    width = head >> 18 & 31;
    width = width < MOST_WIDTH ? width : MOST_WIDTH;
    words = tables.words[table - 4 * raw], limit = tables.limits[table - 4 * raw];
    zero = k == 0;
    step = k > LADDER ? number(QUIET_NAN) : number(tables.mantissas[k - 1 & 15] + ((k - 1) / 16 - 126 << 23));
    planes = 3 + (pairs == 1 ? 0 : size < 1 << 16 ? 2 : 4), plane_bytes = int(code_bytes<1>(cols));
    int first = planes + int(raw) * plane_bytes, middle = size;
    first = first < size ? first : size;
    if (pairs == 2) {
      u32 pair = row[3] | u32(row[4]) << 8;
      if (planes == 7) pair |= u32(row[5]) << 16 | u32(row[6]) << 24;
      if (pair < u32(size - first)) middle = first + int(pair);
    }
    bits.at = index == 0 ? first : index == 1 ? middle - 1 : index == 2 ? middle : size - 1;
    record = 8 * u32(first);
  }

  // All that changes from word to word.
  INLINE Words place() const { return Words{u32(bits.at), u32(bits.held), bits.window, record}; }
  INLINE void go_to(Words place) {
    bits.at = int(place.x), bits.held = int(place.y), bits.window = place.z, record = place.w;
  }

  // The next word: its number, and its bits in the high byte.
  INLINE u32 next() {
    u32 word = words[bits.peek()];
    bits.skip(word >> 8);
    return word;
  }

  // The escapes of the next `count` words, and the bits of all of them.
  INLINE void walk(int count, u32& escapes, u32& length) const {
    Stream ahead = *this;
    ONE_BY_ONE for (int i = 0; i < count; ++i) {
      u32 word = ahead.next();
      escapes += (word & 255) == ESCAPE, length += word >> 8;
    }
  }

  // Bit n of the row.
  INLINE u32 bit(u32 n) const { return int(n >> 3) < bits.size ? bits.row[n >> 3] >> (n & 7) & 1 : 0; }

  // The value of the next word, which is number i of the row.
  INLINE float value(int i, int cols) {
    u32 code = next() & 255;
    if (RARELY(code == ESCAPE)) {
      code = limit;
      ONE_BY_ONE for (u32 n = 0; n < width; ++n) code += bit(record++) << n;
    }
    int q = int(code >> 1) ^ -int(code & 1);
    if (raw) {
      int place = i % PACK, count = cols - i + place, bytes = ((count < PACK ? count : PACK) + 7) / 8, lowest = 0;
      u32 at = 8 * u32(planes + i / PACK * (PACK / 8) + place % bytes) + place / bytes;
      ONE_BY_ONE for (u32 n = 0; n < raw; ++n) lowest |= int(bit(at + 8 * n * plane_bytes)) << n;
      q = q * (1 << raw) + lowest - (1 << (raw - 1));
    }
    return zero ? 0.0f : mul(float(q), step);
  }
};

// The stream of a lane, at its first word. All lanes of a warp come here together.
INLINE Stream first_word(const u8* row, int size, int cols, int index, int streams, int count, const Tables& tables) {
  Stream stream(row, size, cols, index, tables);
  u32 escapes = 0, length = 0, leader = lane() - index;
  if (stream.width) stream.walk(count, escapes, length);
  stream.record += fetch(length, leader);
  for (int other = 0; other < streams; ++other) {
    u32 theirs = fetch(escapes, leader + other);
    if (other < index) stream.record += theirs * stream.width;
  }
  return stream;
}

// Target row t = source row t, or the sum over ranks, in order, of their source rows t, of `size` bytes each. In a sum,
// shared memory keeps where each rank's stream is.
template <class Out, int MOST>
INLINE void decode_rows(const u8* __restrict__ source, i64 rank_stride, i64 row_stride, u8* __restrict__ target,
                        i64 target_stride, i64 rows, int ranks, int cols, const Tables& tables, int size) {
  const int streams = cols < SECOND_PAIR ? 2 : 4, run = (cols + 16 * streams - 1) / (16 * streams) * 16;
  const int index = int(lane()) % streams;
  const int begin = index * run < cols ? index * run : cols, end = begin + run < cols ? begin + run : cols;
  u8* places = MOST > 1 ? shared_memory<MOST * 128 * sizeof(Words)>() + thread() * sizeof(Words) : nullptr;
  i64 row = warp() * (32 / streams) + int(lane()) / streams;
  // All lanes of a warp take part in exchanges; those beyond the end repeat the last row and write nothing.
  bool active = row < rows;
  if (!active) row = rows - 1;
  const u8* from = source + row * row_stride;
  u8* to = target + row * target_stride + i64(begin) * Out::BYTES;
  Stream stream = first_word(from, size, cols, index, streams, end - begin, tables);
  if constexpr (MOST > 1) {
    store(places, stream.place());
    ONE_BY_ONE for (int rank = 1; rank < ranks; ++rank) {
      const u8* theirs = from + rank * rank_stride;
      store(places + rank * 128 * sizeof(Words),
            first_word(theirs, size, cols, index, streams, end - begin, tables).place());
    }
  }
  ONE_BY_ONE for (int start = begin; start < end && active; start += 8, to += 8 * Out::BYTES) {
    const int inside = end - start < 8 ? end - start : 8;
    float x[8];
    UNROLL for (int v = 0; v < 8; ++v) x[v] = -0.0f;
    ONE_BY_ONE for (int rank = 0; rank < (MOST > 1 ? ranks : 1); ++rank) {
      u8* place = places + rank * 128 * sizeof(Words);
      if constexpr (MOST > 1) {
        stream = Stream(from + rank * rank_stride, size, cols, index, tables);
        stream.go_to(load<Words>(place));
      }
      // Adding to -0 changes nothing.
      UNROLL for (int v = 0; v < 8; ++v)
        if (v < inside) x[v] = add(x[v], stream.value(start + v, cols));
      if constexpr (MOST > 1) store(place, stream.place());
    }
    u32 w[2 * Out::BYTES];
    UNROLL for (int i = 0; i < 2 * Out::BYTES; ++i) {
      if constexpr (Out::BYTES == 4) w[i] = quiet(x[i]);
      else w[i] = quiet2<Out>(Out::narrow2(x[2 * i], x[2 * i + 1]));
    }
    store_eight<Out>(to, w, inside);
  }
}

#ifdef DECODED
KERNEL(128) decode_entropy(const u8* __restrict__ source, i64 rank_stride, i64 row_stride, u8* __restrict__ target,
                           i64 target_stride, i64 rows, int ranks, int cols, const Tables* __restrict__ tables, int size) {
  decode_rows<DECODED, MOST_RANKS>(source, rank_stride, row_stride, target, target_stride, rows, ranks, cols, *tables, size);
}
#endif
