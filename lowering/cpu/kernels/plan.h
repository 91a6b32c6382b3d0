// Work of one call: rows ordered by expert, cut into tasks; memory for them.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "act.h"
#include "move.h"

constexpr i64 COLS = 32;              // output columns of a packed panel (packed.h), and what parts of the output are cut at
constexpr i64 KEEP = i64(160) << 20;  // bytes of workspace a thread keeps between calls
constexpr i64 HUGE_PAGE = i64(2) << 20;

// Memory reused between calls of one thread: fresh pages cost more than the arithmetic at a few tokens.
struct Workspace {
  char* data = nullptr;
  i64 size = 0;
  char* get(i64 bytes) {
    if (bytes > size) {
      release();
      size = bytes > HUGE_PAGE ? up_to(bytes, HUGE_PAGE) : bytes;
      data = static_cast<char*>(::operator new(size_t(size), std::align_val_t(align())));
#if defined(__linux__)
      if (size > bytes || size >= HUGE_PAGE) madvise(data, size_t(size), MADV_HUGEPAGE);
#endif
    }
    return data;
  }
  size_t align() const { return size >= HUGE_PAGE ? size_t(HUGE_PAGE) : 64; }
  void trim() {
    if (size > KEEP) release();
  }
  void release() {
    if (data) ::operator delete(data, std::align_val_t(align()));
    data = nullptr, size = 0;
  }
  ~Workspace() { release(); }
};

// Hands out aligned pieces of a workspace; run once with no memory to learn the size.
struct Carver {
  char* base;
  i64 used = 0;
  template <class T>
  T* take(i64 n) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += up_to(n * i64(sizeof(T)), 64) + 64 * (n > 0);
    return p;
  }
};

// Elements from one row of a scratch buffer to the next: an odd number of cache lines, so that rows do not meet in one set of a cache.
static inline i64 row_stride(i64 depth) {
  i64 lines = (units(depth) * PER * i64(sizeof(element)) + 63) / 64;
  return (lines | 1) * 64 / i64(sizeof(element));
}

// Rows of a task that are multiplied one way: as a panel of `lanes` (vectors along rows), or row by row (lanes is 0).
struct Strip {
  i64 first, rows, lanes;  // rows first .. first + rows of the ordered pairs
  i64 a_at;                // where their activations begin, in elements
};

struct Task {
  i64 expert, first, rows;
  Strip strips[2];
  int n_strips;
  bool panel() const { return strips[0].lanes > 0; }
};

struct Plan {
  std::vector<i64> slots, tokens;  // pair t * k + j at each ordered position, and t
  std::vector<float> weights;      // what its result is multiplied by
  std::vector<i64> count;  // rows per expert
  std::vector<Task> tasks;
  i64 a_size = 0;
};

// So many rows are cheaper row by row than as a panel, and so many that a whole panel leaves.
struct RowByRow {
  i64 few = VL * 11 / 16, left = VL * 10 / 16;
};

// Rows that go into a panel, whole vectors of them; the rest is cheaper row by row, or there are so many left that padding is.
static i64 panel_rows(i64 rows, RowByRow most) {
  if (rows <= most.few) return 0;
  i64 whole = rows / VL * VL;
  return rows - whole <= most.left ? whole : rows;
}

static void add_strip(Plan& p, Task& t, i64 first, i64 rows, bool panel, i64 a_row) {
  if (!rows) return;
  i64 lanes = panel ? up_to(rows, VL) : 0;
  t.strips[t.n_strips++] = {first, rows, lanes, p.a_size};
  p.a_size += up_to((panel ? lanes : rows) * a_row, 64);
}

// `panels`: many rows go as panels. a_row: elements of one row of activations.
static Plan make_plan(const Args& a, bool panels, i64 a_row, RowByRow most) {
  Plan p;
  i64 pairs = a.tokens * a.k, n = a.experts;
  std::vector<i64> start(size_t(n) + 1, 0);
  for (i64 i = 0; i < pairs; i++)
    if (a.ids[i] >= 0 && a.ids[i] < n) start[size_t(a.ids[i]) + 1]++;
  p.count.assign(start.begin() + 1, start.end());
  for (i64 e = 0; e < n; e++) start[size_t(e) + 1] += start[size_t(e)];
  const size_t used = size_t(start[size_t(n)]);
  p.slots.resize(used), p.tokens.resize(used), p.weights.resize(used);
  std::vector<i64> next(start.begin(), start.end() - 1);
  for (i64 t = 0; t < a.tokens; t++)
    for (i64 i = t * a.k; i < (t + 1) * a.k; i++) {
      if (a.ids[i] < 0 || a.ids[i] >= n) continue;
      const size_t to = size_t(next[size_t(a.ids[i])]++);
      p.slots[to] = i, p.tokens[to] = t, p.weights[to] = a.weight_on_input ? 1.f : a.weights[i];
    }
  for (i64 e = 0; e < n; e++) {
    i64 total = p.count[size_t(e)], blocks = (total + ROWS - 1) / ROWS;
    for (i64 b = 0, done = 0; b < blocks; b++) {
      i64 rows = (total - done + blocks - b - 1) / (blocks - b), first = start[size_t(e)] + done;
      Task t{e, first, rows, {}, 0};
      i64 whole = panels ? panel_rows(rows, most) : 0;
      add_strip(p, t, first, whole, true, a_row);
      add_strip(p, t, first + whole, rows - whole, false, a_row);
      p.tasks.push_back(t);
      done += rows;
    }
  }
  return p;
}

// Chunks of output columns per task, so that few tasks still fill the threads.
static i64 chunks_of(const Plan& p, i64 threads, i64 columns) {
  i64 tasks = std::max<i64>(i64(p.tasks.size()), 1);
  if (threads == 1 || tasks >= 4 * threads) return 1;
  return std::max<i64>(1, std::min((4 * threads + tasks - 1) / tasks, columns / (2 * VL)));
}

// Parts of the output columns that threads take in turn: two for each, which evens out what disturbs one of them; with more of them,
// activations are read more often.
static i64 parts_of(const Args& a) {
  i64 most = (a.out_features + COLS - 1) / COLS;
  return std::max<i64>(1, std::min(most, a.threads > 1 ? 2 * a.threads : 1));
}
