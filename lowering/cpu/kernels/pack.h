// Weights packed ahead of time: panels of COLS output columns, [panel][k][COLS] units, in one block of memory for each of up and down.
//
// up: [expert][panel][half][k][COLS]; down: [expert][panel][k][COLS]. Columns past the last are zero, as is the second half of an odd last
// pair. A panel is one linear stream, its rows need no sums across lanes, and tokens go in as they are, any number of them.
#pragma once
#include "move.h"

struct Packed {
  const Args& a;
  explicit Packed(const Args& args) : a(args) {}
  i64 up_panels() const { return (a.inter + COLS - 1) / COLS; }
  i64 down_panels() const { return (a.out_features + COLS - 1) / COLS; }
  i64 up_size() const { return up_panels() * a.halves * units(a.hidden) * COLS; }  // of one expert, in `packed`s
  i64 down_size() const { return down_panels() * units(a.inter) * COLS; }
  const packed* up(i64 e) const { return static_cast<const packed*>(a.packed_up) + e * up_size(); }
  const packed* down(i64 e) const { return static_cast<const packed*>(a.packed_down) + e * down_size(); }
};

// One panel: columns n0 .. n0 + COLS of a matrix.
static void pack_weights(const Matrix& m, i64 n0, packed* to) {
  i64 nb = std::min(COLS, m.n - n0), nu = units(m.k);
  typedef stored stored_any __attribute__((may_alias));
  stored_any* out = reinterpret_cast<stored_any*>(to);
  constexpr i64 BLOCK = 64;  // of k at a time, so that lines of rows and of the panel are used up while they are cached
  for (i64 k0 = 0; k0 < nu * PER; k0 += BLOCK)
    for (i64 c = 0; c < COLS; c++)
      for (i64 k = k0; k < std::min(k0 + BLOCK, nu * PER); k++)
        out[(k / PER * COLS + c) * PER + k % PER] = c < nb && k < m.k ? *m(n0 + c, k) : stored(0);
}
