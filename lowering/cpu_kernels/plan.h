// Work of one call: rows ordered by expert, cut into tasks; memory for them.
#pragma once
#include "act.h"
#include "move.h"

constexpr i64 ROWS = 128;  // most rows of one task
constexpr i64 KEEP = i64(64) << 20;  // bytes of workspace a thread keeps between calls

// Memory reused between calls of one thread: fresh pages cost more than the arithmetic at a few tokens.
struct Workspace {
  char* data = nullptr;
  i64 size = 0;
  char* get(i64 bytes) {
    if (bytes > size) {
      release();
      data = static_cast<char*>(::operator new(size_t(bytes), std::align_val_t(64)));
      size = bytes;
    }
    return data;
  }
  void trim() {
    if (size > KEEP) release();
  }
  void release() {
    if (data) ::operator delete(data, std::align_val_t(64));
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

struct Task {
  i64 expert, first, rows, lanes;  // rows first .. first + rows of the ordered pairs; lanes: rows padded to a vector
  bool panel;                      // operands as panels (vectors along rows), else row by row
  i64 a_at;                        // where the task's activations begin, in elements
};

struct Plan {
  std::vector<i64> slots;  // pair t * k + j at each ordered position
  std::vector<i64> count;  // rows per expert
  std::vector<Task> tasks;
  i64 a_size = 0;
};

// Are there rows enough that packing and padding them to whole vectors is cheaper than reducing vectors along k?
static bool want_panel(i64 rows) { return rows >= 40 && up_to(rows, VL) * 20 <= rows * 23; }

static Plan make_plan(const Args& a) {
  Plan p;
  i64 pairs = a.tokens * a.k, n = a.experts;
  std::vector<i64> start(size_t(n) + 1, 0);
  for (i64 i = 0; i < pairs; i++)
    if (a.ids[i] >= 0 && a.ids[i] < n) start[size_t(a.ids[i]) + 1]++;
  p.count.assign(start.begin() + 1, start.end());
  for (i64 e = 0; e < n; e++) start[size_t(e) + 1] += start[size_t(e)];
  p.slots.resize(size_t(start[size_t(n)]));
  std::vector<i64> next(start.begin(), start.end() - 1);
  for (i64 i = 0; i < pairs; i++)
    if (a.ids[i] >= 0 && a.ids[i] < n) p.slots[size_t(next[size_t(a.ids[i])]++)] = i;
  i64 width = up_to(a.inter, 2);
  for (i64 e = 0; e < n; e++) {
    i64 total = p.count[size_t(e)], blocks = (total + ROWS - 1) / ROWS;
    for (i64 b = 0, done = 0; b < blocks; b++) {
      i64 rows = (total - done + blocks - b - 1) / (blocks - b);
      Task t{e, start[size_t(e)] + done, rows, up_to(rows, VL), want_panel(rows), p.a_size};
      p.a_size += up_to(t.lanes * width, 64);
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
