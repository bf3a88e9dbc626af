// Collectives in one launch, over memory in which every rank can write: all-reduces, their halves, an all-to-all.
//
// A message is packs of 128 values, and a tile is as many as a block encodes at once, four lanes to a pack. A payload of
// a tile lies on the wire as a row of the format does; only what it decodes to is the specification's. Block b of a rank
// handles tiles b, b + B, ... of each stripe and talks to the blocks b of the others alone, so no block waits for another
// of its own launch.
//
//     memory of a rank    flags [2, R, B] | lines [2, R, words] | half 0 | half 1
//     half                received [R, tiles, bytes] | sums [R, tiles, bytes]
//
// Payloads are written where they are read, in the memory of the peers, without a copy in between. A tile is encoded
// while the one before is added up and the one before that is decoded, so that links and processors work at once.
//
// A flag is the epoch and the number of tiles that have come: it only grows. Epochs count the launches of a rank, in its
// own memory, so that a graph that is replayed goes on counting and the number of blocks may differ from launch to
// launch. A launch works in the half of its epoch's parity. Who begins epoch e + 2 has seen in epoch e + 1 a flag of
// every other rank, and a rank sets that flag in a launch that began when its launch of epoch e had ended. So nobody
// reads any more what is overwritten.
//
// Small messages travel as lines: four bytes of a payload and the epoch in one store of eight, which no fence need
// follow. A line that nobody wrote for 2**32 launches could be taken for a new one.
//
// Macros: COLLECTIVE, the arguments of `exchange_rows`, such as "TWO_STEP, Values<BF16>, Affine<8, 128>, Affine<4, 128>, 4"
// (formats as in codecs.cu), and THREADS of a block.

constexpr int MOST_RANKS = 8, MOST_BLOCKS = 256, LINES = 1 << 15;
constexpr i64 FLAGS_BYTES = i64(2) * MOST_RANKS * MOST_BLOCKS * 8, LINES_BYTES = i64(2) * MOST_RANKS * LINES * 8;
constexpr int TILE_BITS = 16;  // bits of a flag that count tiles

enum Algorithm { ONE_STEP, TWO_STEP, REDUCE_SCATTER, ALL_GATHER, ALL_TO_ALL, LOW_LATENCY };

struct Exchange {
  const u64* memory;  // addresses of the ranks' memory
  const u8* x;
  u8* out;
  u64* state;  // this rank's epoch; blocks that have ended; whether a launch runs; whether a rank was lost
  int* lost;   // for the host: one more than the rank that did not come, or -1 after launches that overlapped
  i64 half_bytes;
  u32 rank, packs, patience;
  u32 distance;  // packs between the stripes of two ranks in x, or in out of ALL_GATHER
  u32 ring;      // of ALL_TO_ALL: see there
  u32 unused;
  u32 sent[MOST_RANKS], received[MOST_RANKS];  // packs to and from each rank, of ALL_TO_ALL
};

// A row in the memory of every rank, at the same place.
template <int R> struct Everyone {
  const u64* memory;
  i64 offset;
  INLINE Everyone operator+(i64 n) const { return {memory, offset + n}; }
};
template <int R, class T> INLINE void store(Everyone<R> at, T value) {
  UNROLL for (int rank = 0; rank < R; ++rank) ::store(reinterpret_cast<u8*>(at.memory[rank]) + at.offset, value);
}

template <int R> struct Launch {
  const Exchange& e;
  u64 epoch;
  u32 patience;

  INLINE explicit Launch(const Exchange& given) : e(given) {
    // A replay on another stream than the last eager call's is seen by no host.
    if (block() == 0 && thread() == 0 && swap(e.state + 2, 1)) note(-1);
    epoch = *e.state + 1;
    // A graph that is replayed asks nobody whether a rank was lost.
    patience = e.state[3] ? 0 : e.patience;
  }
  INLINE void end() const {
    barrier();
    if (thread() == 0 && count(e.state + 1) == num_blocks() - 1) {
      e.state[1] = 0, e.state[0] = epoch;
      swap(e.state + 2, 0);
    }
  }

  INLINE u8* at(u32 rank, i64 offset) const { return reinterpret_cast<u8*>(e.memory[rank]) + offset; }
  INLINE i64 half() const { return FLAGS_BYTES + LINES_BYTES + i64(epoch & 1) * e.half_bytes; }
  INLINE bool is_peer(u32 rank) const { return rank < R && rank != e.rank; }
  INLINE u64 tiles(u32 number) const { return epoch << TILE_BITS | number; }

  INLINE u64* flag(u32 rank, int step, u32 source) const {
    return reinterpret_cast<u64*>(at(rank, i64((step * MOST_RANKS + source) * MOST_BLOCKS + block()) * 8));
  }
  // Tell every other rank that so many tiles of a step have come from here: one fence, and a lane for each flag.
  INLINE void signal(int step, u32 number) const { signal_one(step, number, true); }
  // Wait for so many tiles of a step from every other rank.
  INLINE void await(int step, u32 number) { await_one(step, number, true); }
  // The same, where each lane says whether its rank is meant.
  INLINE void signal_one(int step, u32 number, bool meant) const {
    barrier();
    if (is_peer(thread()) && meant) fence(), set(flag(thread(), step, e.rank), tiles(number));
  }
  INLINE void await_one(int step, u32 number, bool meant) {
    if (is_peer(thread()) && meant) {
      if (!reached(flag(e.rank, step, thread()), tiles(number), patience)) lose(thread());
      fence();
    }
    barrier();
  }
  INLINE void lose(u32 rank) {
    note(int(rank) + 1);
    patience = 0;
  }
  INLINE void note(int what) const {
    if (swap(e.state + 3, 1) == 0) *e.lost = what;
  }

  INLINE u64* line(u32 rank, u32 source, u32 word) const {
    return reinterpret_cast<u64*>(at(rank, FLAGS_BYTES)) + (i64(epoch & 1) * MOST_RANKS + source) * LINES + word;
  }
};

// The packs of a tile, one for each team of lanes; teams beyond the end repeat the first and write nothing.
struct Tile {
  u32 first, count;
  bool active;
  Wide<16> of_values, of_payload;

  INLINE Tile(u32 start, u32 end) : first(start), count(0) {
    u32 packs = num_threads() / 4, pack = thread() / 4;
    if (start < end) count = end - start < packs ? end - start : packs;
    active = pack < count;
    if (!active) pack = 0;
    of_values = {thread() % 4, first + pack, 0};
    of_payload = {thread() % 4, pack, int(packs * PACK)};
  }
};

constexpr int VALUES_OF_A_LANE = Wide<16>::VALUES;
template <class Format> INLINE i64 tile_bytes() { return i64(num_threads() / 4) * Format::PACK_BYTES; }

template <class Values, class Format, class Row> INLINE void encode_tile(const u8* x, const Tile& tile, Row to) {
  float values[VALUES_OF_A_LANE];
  Values::read(x, tile.of_values, values);
  Format::template write<typename Values::Exact>(to, tile.of_payload, values, tile.active);
}

template <class Values, class Format> INLINE void decode_tile(const u8* from, const Tile& tile, u8* out) {
  float values[VALUES_OF_A_LANE];
  Format::read(from, tile.of_payload, values);
  Values::template write<typename Format::Exact>(out, tile.of_values, values, tile.active);
}

// values = the sum over ranks, in order, of their payloads of a tile, which lie `distance` bytes apart.
template <class Format, int R>
INLINE void add_tile(const u8* from, i64 distance, const Tile& tile, float (&values)[VALUES_OF_A_LANE]) {
  UNROLL for (int v = 0; v < VALUES_OF_A_LANE; ++v) values[v] = -0.0f;
  UNROLL for (int rank = 0; rank < R; ++rank) {
    float part[VALUES_OF_A_LANE];
    Format::read(from + rank * distance, tile.of_payload, part);
    UNROLL for (int v = 0; v < VALUES_OF_A_LANE; ++v) values[v] = add(values[v], part[v]);
  }
}

template <Algorithm A, class Values, class First, class Second, int R> INLINE void run(const Exchange& e) {
  constexpr bool SCATTERS = A == TWO_STEP || A == REDUCE_SCATTER, GATHERS = A != REDUCE_SCATTER;
  Launch<R> launch(e);
  const u32 rank = e.rank, packs = num_threads() / 4;
  // Packs of each rank's stripe. In a gather x is this rank's; in one step all ranks have one stripe in common.
  const u32 stripe = SCATTERS ? (e.packs + R - 1) / R : e.packs;
  const u32 tiles = (stripe + packs - 1) / packs, waves = (tiles - block() + num_blocks() - 1) / num_blocks();
  const i64 first_bytes = tile_bytes<First>(), second_bytes = tile_bytes<Second>();
  const i64 received = launch.half(), sums = received + (SCATTERS ? R * tiles * first_bytes : 0);
  const i64 from_rank = tiles * first_bytes, sums_of_rank = tiles * second_bytes;
  // A tile of a rank's stripe, which begins at pack `start` of x or out.
  auto tile_of = [&](u32 owner, u32 start, u32 number) {
    u32 before = SCATTERS ? owner * stripe : 0, length = before >= e.packs ? 0 : e.packs - before;
    return Tile(start + number * packs, start + (length < stripe ? length : stripe));
  };

  for (u32 wave = 0; wave < waves + SCATTERS + GATHERS; ++wave) {
    if (SCATTERS && wave < waves) {
      u32 number = block() + wave * num_blocks();
      ONE_BY_ONE for (u32 i = 1; i <= R; ++i) {
        // This rank's own stripe last: the others are on their way meanwhile.
        u32 peer = (rank + i) % R;
        Tile tile = tile_of(peer, peer * e.distance, number);
        if (tile.count) encode_tile<Values, First>(e.x, tile, launch.at(peer, received + rank * from_rank + number * first_bytes));
      }
      launch.signal(0, wave + 1);
    }
    const u32 middle = wave - SCATTERS, last = middle - 1;
    if (middle < waves) {
      u32 number = block() + middle * num_blocks();
      Everyone<R> target{e.memory, sums + rank * sums_of_rank + number * second_bytes};
      if constexpr (SCATTERS) {
        Tile tile = tile_of(rank, A == REDUCE_SCATTER ? 0 : rank * e.distance, number);
        launch.await(0, middle + 1);
        if (tile.count) {
          float values[VALUES_OF_A_LANE];
          add_tile<First, R>(launch.at(rank, received + number * first_bytes), from_rank, tile, values);
          if constexpr (GATHERS) Second::template write<FP32>(target, tile.of_payload, values, tile.active);
          else Values::template write<FP32>(e.out, tile.of_values, values, tile.active);
        }
      } else {
        encode_tile<Values, Second>(e.x, tile_of(rank, 0, number), target);
      }
      if constexpr (GATHERS) launch.signal(1, middle + 1);
    }
    if (GATHERS && last < waves) {
      u32 number = block() + last * num_blocks();
      const u8* from = launch.at(rank, sums + number * second_bytes);
      launch.await(1, last + 1);
      if constexpr (A == ONE_STEP) {
        Tile tile = tile_of(0, 0, number);
        float values[VALUES_OF_A_LANE];
        add_tile<Second, R>(from, sums_of_rank, tile, values);
        Values::template write<FP32>(e.out, tile.of_values, values, tile.active);
      } else {
        ONE_BY_ONE for (u32 source = 0; source < R; ++source) {
          Tile tile = tile_of(source, source * e.distance, number);
          if (tile.count) decode_tile<Values, Second>(from + source * sums_of_rank, tile, e.out);
        }
      }
    }
  }
  launch.end();
}

// Rows to every rank in turn. Ranks know nothing of what others receive from each other, so between two blocks there is a
// ring of e.ring tiles; a tile is written once the one in its place has been read, which step 1 tells.
template <class Values, class Format, int R> INLINE void run_all_to_all(const Exchange& e) {
  Launch<R> launch(e);
  const u32 packs = num_threads() / 4, mine = thread();
  const i64 bytes = tile_bytes<Format>();
  auto ring = [&](u32 rank, u32 source, u32 wave) {
    return launch.at(rank, launch.half() + ((i64(source) * num_blocks() + block()) * e.ring + wave % e.ring) * bytes);
  };
  // Tiles of this block among those of so many packs.
  auto waves_of = [&](u32 number) {
    u32 tiles = (number + packs - 1) / packs;
    return tiles > block() ? (tiles - block() + num_blocks() - 1) / num_blocks() : 0;
  };
  u32 waves = 0;
  ONE_BY_ONE for (u32 peer = 0; peer < R; ++peer) {
    u32 most = waves_of(e.sent[peer] > e.received[peer] ? e.sent[peer] : e.received[peer]);
    waves = most > waves ? most : waves;
  }
  u32 to_send = launch.is_peer(mine) ? waves_of(e.sent[mine]) : 0, to_come = launch.is_peer(mine) ? waves_of(e.received[mine]) : 0;
  // Also a rank that sends nothing says that it has begun.
  if (launch.is_peer(mine) && to_send == 0) fence(), set(launch.flag(mine, 0, e.rank), launch.tiles(0));
  for (u32 wave = 0; wave < waves; ++wave) {
    u32 number = block() + wave * num_blocks(), start = 0;
    if (wave >= e.ring) launch.await_one(1, wave - e.ring + 1, wave < to_send);
    ONE_BY_ONE for (u32 peer = 0; peer < R; start += e.sent[peer++]) {
      Tile tile(start + number * packs, start + e.sent[peer]);
      if (tile.count) encode_tile<Values, Format>(e.x, tile, ring(peer, e.rank, wave));
    }
    launch.signal_one(0, wave + 1, wave < to_send);
    launch.await_one(0, wave + 1, wave < to_come);
    start = 0;
    ONE_BY_ONE for (u32 peer = 0; peer < R; start += e.received[peer++]) {
      Tile tile(start + number * packs, start + e.received[peer]);
      if (tile.count) decode_tile<Values, Format>(ring(e.rank, peer, wave), tile, e.out);
    }
    launch.signal_one(1, wave + 1, wave < to_come);
  }
  launch.await_one(0, to_come, true);
  launch.end();
}

// A one-step all-reduce of a small message, by lines.
constexpr int LOW_LATENCY_THREADS = 64;
template <class Values, class Format, int R> INLINE void run_low_latency(const Exchange& e) {
  constexpr int STEP = LOW_LATENCY_THREADS, BYTES = STEP / 4 * Format::PACK_BYTES;
  Launch<R> launch(e);
  u8* mine = shared_memory<2 * BYTES>();
  u8* theirs = mine + BYTES;
  const u32 packs = STEP / 4, tiles = (e.packs + packs - 1) / packs, mark = u32(launch.epoch);
  for (u32 number = block(); number < tiles; number += num_blocks()) {
    Tile tile(number * packs, e.packs);
    encode_tile<Values, Format>(e.x, tile, mine);
    barrier();
    for (u32 word = thread(); word < BYTES / 4; word += STEP) {
      u64 line = load<u32>(mine + word * 4) | u64(mark) << 32;
      ONE_BY_ONE for (u32 i = 1; i < R; ++i) {
        u32 peer = (e.rank + i) % R;
        set(launch.line(peer, e.rank, number * (BYTES / 4) + word), line);
      }
    }
    float values[VALUES_OF_A_LANE];
    UNROLL for (int v = 0; v < VALUES_OF_A_LANE; ++v) values[v] = -0.0f;
    ONE_BY_ONE for (u32 source = 0; source < R; ++source) {
      float part[VALUES_OF_A_LANE];
      if (source != e.rank) {
        for (u32 word = thread(); word < BYTES / 4; word += STEP) {
          u32 data = 0;
          if (!arrived(launch.line(e.rank, source, number * (BYTES / 4) + word), mark, data, launch.patience)) launch.lose(source);
          ::store(theirs + word * 4, data);
        }
        barrier();
      }
      Format::read(source == e.rank ? mine : theirs, tile.of_payload, part);
      UNROLL for (int v = 0; v < VALUES_OF_A_LANE; ++v) values[v] = add(values[v], part[v]);
      // Before the next one overwrites it.
      barrier();
    }
    Values::template write<FP32>(e.out, tile.of_values, values, tile.active);
  }
  launch.end();
}

template <Algorithm A, class Values, class First, class Second, int R> INLINE void exchange_rows(const Exchange& e) {
  if constexpr (A == LOW_LATENCY) run_low_latency<Values, First, R>(e);
  else if constexpr (A == ALL_TO_ALL) run_all_to_all<Values, First, R>(e);
  else run<A, Values, First, Second, R>(e);
}

#ifdef COLLECTIVE
// A multiprocessor gets one block. Left to choose, ptxas spills a word or two to make room for three.
KERNEL(THREADS, 1) collective(const Exchange e) { exchange_rows<COLLECTIVE>(e); }
#endif
