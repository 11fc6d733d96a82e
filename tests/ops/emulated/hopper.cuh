// csrc/hopper.cuh for a CPU. What the accelerator fetches comes at random moments after it was asked for, products are
// made and tiles are written as late as what waits for them allows, so that a wait that comes too early is seen.
// Swizzles and the fields of operands are read as the hardware reads them.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <map>

#include <device.cuh>

namespace longllava {

struct TensorMap {
  int size, box_rows, box_columns, swizzle;
  unsigned char* data;
  int64_t rows, columns;
};

}  // namespace longllava

namespace emulated {

struct PhaseBarrier { int arrivals, missing, bytes = 0, phase = 0; };
struct Fetch { const longllava::TensorMap* map; int column, row; Block* block; int64_t place, barrier; };
struct Product { int* sum; int outputs; uint64_t a, b; bool add; };
struct Put { const longllava::TensorMap* map; int column, row; const unsigned char* from; };
struct Queues {
  std::vector<std::vector<Product>> products{1};
  std::vector<std::vector<Put>> puts{1};
};

inline std::map<unsigned, Block*> by_index;
inline std::map<std::pair<Block*, int64_t>, PhaseBarrier> phases;
inline std::map<Fiber*, Queues> queues;
inline std::map<Block*, std::vector<unsigned char*>> places;
inline std::vector<Fetch> in_flight;
inline Barrier whole_cluster;
inline int cluster_size, in_vain;
inline Index grid_size;
inline unsigned dice = 1;

inline unsigned roll(unsigned sides) { return (dice = dice * 1664525u + 1013904223u) / 65536 % sides; }

inline unsigned char* base_of(Block* of) {
  return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(of->shared.data()) + 1023) / 1024 * 1024);
}
inline int64_t offset_of(const void* x) { return static_cast<const unsigned char*>(x) - base_of(block); }
inline int64_t mixed(int64_t at, int swizzle) { return at ^ (at >> 7 & (swizzle / 16 - 1)) << 4; }

inline void step(PhaseBarrier& barrier) {
  in_vain = 0;
  if (barrier.missing < 0) std::abort();
  if (barrier.missing == 0 && barrier.bytes == 0) barrier.missing = barrier.arrivals, barrier.phase ^= 1;
}

// A block's shared memory is gone once all its threads have ended.
inline void must_stand(const Block* of) {
  for (const auto& fiber : of->fibers)
    if (!fiber->done) return;
  std::fputs("a block was written to after its end\n", stderr), std::abort();
}

inline void come(const Fetch& fetch) {
  must_stand(fetch.block);
  const longllava::TensorMap& map = *fetch.map;
  const int width = map.box_columns * map.size;
  for (int r = 0; r < map.box_rows; ++r)
    for (int byte = 0; byte < width; ++byte) {
      const int64_t row = fetch.row + r, column = int64_t(fetch.column) * map.size + byte;
      const bool inside = row < map.rows && column < map.columns * map.size;
      base_of(fetch.block)[mixed(fetch.place + r * width + byte, map.swizzle)] =
          inside ? map.data[row * map.columns * map.size + column] : 0;
    }
  PhaseBarrier& barrier = phases.at({fetch.block, fetch.barrier});
  barrier.bytes -= map.box_rows * width;
  step(barrier);
}

// As the instruction finds its operand: row `row`, 32 bytes.
inline void gather(int8_t* to, uint64_t operand, int row) {
  if (operand >> 62 != 1) std::abort();
  const int64_t begin = (operand & 0x3fff) << 4, eight_rows = (operand >> 32 & 0x3fff) << 4;
  for (int i = 0; i < 32; ++i)
    to[i] = int8_t(base_of(block)[mixed(begin + row / 8 * eight_rows + row % 8 * 128 + i, 128)]);
}

__attribute__((optimize("O3"))) inline void make(const Product& product) {
  const int thread = thread_index.x % 128, first = thread / 32 * 16 + thread % 32 / 4;
  int8_t a[2][32], b[32];
  for (int half = 0; half < 2; ++half) gather(a[half], product.a, first + 8 * half);
  for (int i = 0; i < product.outputs / 4; ++i) {
    gather(b, product.b, i / 2 * 8 + thread % 4 * 2 + i % 2);
    for (int half = 0; half < 2; ++half) {
      int& sum = product.sum[i / 2 * 4 + half * 2 + i % 2];
      int total = product.add ? sum : 0;
      for (int k = 0; k < 32; ++k) total += int(a[half][k]) * int(b[k]);
      sum = total;
    }
  }
}

inline void write(const Put& put) {
  const longllava::TensorMap& map = *put.map;
  const int width = map.box_columns * map.size;
  const int64_t place = offset_of(put.from);
  for (int r = 0; r < map.box_rows; ++r)
    for (int byte = 0; byte < width; ++byte) {
      const int64_t row = put.row + r, column = int64_t(put.column) * map.size + byte;
      if (row >= map.rows || column >= map.columns * map.size) continue;
      map.data[row * map.columns * map.size + column] = base_of(block)[mixed(place + r * width + byte, map.swizzle)];
    }
}

inline Queues& mine() { return queues[block->fibers[block->running].get()]; }

template <class Item, class Do> void finish(std::vector<std::vector<Item>>& groups, int pending, Do what) {
  for (; int(groups.size()) - 1 > pending; groups.erase(groups.begin()))
    for (const Item& item : groups.front()) what(item);
}

}  // namespace emulated

#define gridDim emulated::grid_size

namespace longllava {

inline unsigned char* aligned_shared() {
  emulated::by_index[blockIdx.x] = emulated::block;
  return emulated::base_of(emulated::block);
}
inline uint32_t shared_address(const void* x) { return uint32_t(emulated::offset_of(x)); }

inline emulated::PhaseBarrier& phases_of(emulated::Block* block, const void* barrier) {
  return emulated::phases.at({block, emulated::offset_of(barrier)});
}
inline void make_barrier(uint64_t* barrier, int arrivals) {
  emulated::phases[{emulated::block, emulated::offset_of(barrier)}] = {arrivals, arrivals};
}
inline void show_barriers() {}
inline void arrive_expecting(uint64_t* barrier, int bytes) {
  emulated::PhaseBarrier& phases = phases_of(emulated::block, barrier);
  phases.bytes += bytes, --phases.missing;
  emulated::step(phases);
}
inline void arrive_at(uint64_t* barrier, int rank) {
  const unsigned first = blockIdx.x / emulated::cluster_size * emulated::cluster_size;
  emulated::Block* there = emulated::by_index.at(first + rank);
  emulated::must_stand(there);
  emulated::PhaseBarrier& phases = phases_of(there, barrier);
  --phases.missing;
  emulated::step(phases);
}
inline void wait(uint64_t* barrier, uint32_t parity) {
  while (uint32_t(phases_of(emulated::block, barrier).phase) == parity) {
    if (!emulated::in_flight.empty() && emulated::roll(64) == 0) {
      const unsigned i = emulated::roll(unsigned(emulated::in_flight.size()));
      const emulated::Fetch fetch = emulated::in_flight[i];
      emulated::in_flight.erase(emulated::in_flight.begin() + i);
      emulated::come(fetch);
    }
    if (++emulated::in_vain > 2'000'000) std::fputs("all wait for each other\n", stderr), std::abort();
    emulated::pause();
  }
}

inline void fetch_for(uint16_t blocks, void* to, const TensorMap* map, int column, int row, uint64_t* barrier) {
  const unsigned first = blockIdx.x / emulated::cluster_size * emulated::cluster_size;
  for (int i = 0; i < emulated::cluster_size; ++i)
    if (blocks >> i & 1)
      emulated::in_flight.push_back({map, column, row, emulated::by_index.at(first + i), emulated::offset_of(to),
                                     emulated::offset_of(barrier)});
}
inline int cluster_rank() { return int(blockIdx.x % emulated::cluster_size); }
inline void fetch(void* to, const TensorMap* map, int column, int row, uint64_t* barrier) {
  fetch_for(uint16_t(1 << cluster_rank()), to, map, column, row, barrier);
}

inline void show_to_accelerator() {}
inline void put(const TensorMap* map, int column, int row, const void* from) {
  emulated::mine().puts.back().push_back({map, column, row, static_cast<const unsigned char*>(from)});
}
inline void end_puts() { emulated::mine().puts.emplace_back(); }
template <int PENDING> inline void wait_read_puts() {
  emulated::finish(emulated::mine().puts, PENDING, emulated::write);
}
inline void wait_puts() { wait_read_puts<0>(); }

inline void meet_cluster() {
  emulated::meet(emulated::whole_cluster, int(emulated::block->fibers.size()) * emulated::cluster_size);
}
template <int THREADS> inline void meet_at(int barrier) {
  emulated::meet(emulated::block->barriers[barrier], THREADS);
}
template <int THREADS> inline void pass(int barrier) {
  emulated::Barrier& passed = emulated::block->barriers[barrier];
  if (++passed.arrived == THREADS) passed.arrived = 0, ++passed.phase;
}
template <int REGISTERS> inline void more_registers() {}
template <int REGISTERS> inline void fewer_registers() {}

inline void store_matrices(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  std::vector<unsigned char*>& places = emulated::places[emulated::block];
  places.resize(emulated::block->fibers.size());
  const unsigned thread = threadIdx.x, lane = thread % 32;
  places[thread] = static_cast<unsigned char*>(row);
  emulated::meet_warp();
  const uint32_t matrices[] = {a, b, c, d};
  for (int m = 0; m < 4; ++m) std::memcpy(places[thread - lane + 8 * m + lane / 4] + lane % 4 * 4, matrices + m, 4);
  emulated::meet_warp();
}

inline void begin_products() {}
template <int N> inline void multiply(int (&sum)[N], uint64_t a, uint64_t b, bool add) {
  emulated::mine().products.back().push_back({sum, 2 * N, a, b, add});
}
inline void end_products() { emulated::mine().products.emplace_back(); }
template <int PENDING> inline void wait_products() {
  emulated::finish(emulated::mine().products, PENDING, emulated::make);
  emulated::meet_warp();  // an instruction of the whole warp
}
template <int N> inline void settle(int (&)[N]) {}

inline int describe(TensorMap& map, int size, const void* data, int64_t rows, int64_t columns, int box_rows,
                    int box_columns, int swizzle) {
  map = {size, box_rows, box_columns, swizzle, static_cast<unsigned char*>(const_cast<void*>(data)), rows, columns};
  return columns * size % 16 != 0 || reinterpret_cast<uintptr_t>(data) % 16 != 0;
}

template <class... Parameters, class... Arguments>
int launch_clusters(void (*kernel)(Parameters...), int64_t clusters, int blocks, int threads, int64_t bytes, void*,
                    const Arguments&... arguments) {
  emulated::cluster_size = blocks;
  emulated::grid_size.x = unsigned(clusters * blocks);
  for (int64_t i = 0; i < clusters; ++i) {
    emulated::phases.clear(), emulated::queues.clear(), emulated::places.clear(), emulated::by_index.clear();
    emulated::whole_cluster = {};
    emulated::run_blocks(unsigned(i * blocks), unsigned(blocks), threads, bytes + 1024,
                         [&] { kernel(arguments...); });
    if (!emulated::in_flight.empty()) std::fputs("a block ended before what it fetched came\n", stderr), std::abort();
  }
  return 0;
}

}  // namespace longllava
