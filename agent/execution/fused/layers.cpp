// The layers of an update on a CPU, forward and backward, one function each. Called by functions.py; the mathematics is
// that of world_model/, which computes the same where there is no compiler.
//
// Every array is float32 and row-major. A weight comes twice: w (outputs, inputs) as it is, for gradients of inputs,
// and t (inputs, outputs), its transpose, for the forward product. Gradients of weights, biases and gains are added to
// what is there. Null pointers: what is not there or not wanted.

#include "vectors.h"

extern "C" {

void transpose(int64_t rows, int64_t cols, In x, Out y) {  // (rows, cols) -> (cols, rows)
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t k = i; k < (i + 16 < rows ? i + 16 : rows); ++k) y[j * rows + k] = x[k * cols + j];
}

// ---------------------------------------------------------------------- a layer: linear; bias or base; norm and silu

// base: added to the product, a bias (outputs) or with `full` (rows, outputs). gain: null without norm, and then z is y.
void layer_forward(int64_t rows, int64_t inputs, int64_t outputs, In x, In t, In base, bool full, In gain, Out z, Out stats, Out y) {
  if (base)
    for (int64_t r = 0; r < rows; ++r) std::memcpy(z + r * outputs, full ? base + r * outputs : base, 4 * outputs);
  forward(rows, inputs, outputs, x, t, z, base != nullptr);
  if (gain) norm_forward(rows, outputs, z, gain, true, stats, y);
}

// dz (rows, outputs) is that of the product, and of a full base; without norm it is dy, and not written.
void layer_backward(int64_t rows, int64_t inputs, int64_t outputs, In x, In w, In gain, In z, In stats, In dy, Out dz, Out dx, Out dw, Out dbias, Out dgain) {
  if (gain) {
    norm_backward(rows, outputs, z, gain, true, stats, dy, dz, dgain);
    dy = dz;
  }
  backward(rows, inputs, outputs, x, w, dy, dx, dw);
  if (dbias) add_rows(rows, outputs, dy, dbias);
}

// ---------------------------------------------------------------------- prelude: injected input and outer gate

// deter (rows, tokens * width), input (rows, inputs) -> e and gate (rows, tokens * width).
// Kept: z, hidden (rows, units); y (rows, tokens * width); stats (rows + rows * tokens, 2).
void prelude_forward(int64_t rows, int64_t tokens, int64_t width, int64_t inputs, int64_t units, In deter, In input, In t_in, In gain_in, In t_out, In gain_out, In t_gate, In bias, Out z, Out hidden, Out y, Out stats, Out e, Out gate) {
  int64_t flat = tokens * width;
  forward(rows, flat, units, deter, t_in, z);
  forward(rows, inputs, units, input, t_in + flat * units, z, true);
  norm_forward(rows, units, z, gain_in, true, stats, hidden);
  forward(rows, units, flat, hidden, t_out, y);
  norm_forward(rows * tokens, width, y, gain_out, false, stats + 2 * rows, e);
  forward(rows, units, flat, hidden, t_gate, gate);
  for (int64_t r = 0; r < rows; ++r)
    vectors(flat, [&](int64_t i, auto get, auto put) {
      Out p = gate + r * flat + i;
      put(p, sigmoid(get(p) + get(bias + i)));
    });
}

// scratch (rows, 2 * tokens * width + 2 * units)
void prelude_backward(int64_t rows, int64_t tokens, int64_t width, int64_t inputs, int64_t units, In deter, In input, In w_in, In gain_in, In w_out, In gain_out, In w_gate, In z, In hidden, In y, In stats, In gate, In de, In dgate, Out scratch, Out ddeter, Out dinput, Out dw_in, Out dgain_in, Out dw_out, Out dgain_out, Out dw_gate, Out dbias) {
  int64_t flat = tokens * width, all_inputs = flat + inputs;
  Out dy = scratch, dg = dy + rows * flat, dhidden = dg + rows * flat, dz = dhidden + rows * units;
  norm_backward(rows * tokens, width, y, gain_out, false, stats + 2 * rows, de, dy, dgain_out);
  vectors(rows * flat, [&](int64_t i, auto get, auto put) {
    Vec u = get(gate + i);
    put(dg + i, get(dgate + i) * u * (1.0f - u));
  });
  backward(rows, units, flat, hidden, w_out, dy, dhidden, dw_out);
  backward(rows, units, flat, hidden, w_gate, dg, dhidden, dw_gate, true);
  if (dbias) add_rows(rows, flat, dg, dbias);
  norm_backward(rows, units, z, gain_in, true, stats, dhidden, dz, dgain_in);
  product(rows, flat, units, dz, units, 1, w_in, all_inputs, ddeter, flat, false);
  product(rows, inputs, units, dz, units, 1, w_in + flat, all_inputs, dinput, inputs, false);
  if (dw_in) {
    product(units, flat, rows, dz, 1, units, deter, flat, dw_in, all_inputs, true);
    product(units, inputs, rows, dz, 1, units, input, inputs, dw_in + flat, all_inputs, true);
  }
}

// ---------------------------------------------------------------------- one loop: retention, gated MLP, norm

// s = injected + decay x (x null: s = injected), o = s + down(silu(g) v) with g, v = up(norm(s)), y = norm(o).
// Kept: s, n, o (rows, width); h (rows, 2 hidden); a (rows, hidden); stats (2 rows, 2).
void loop_forward(int64_t rows, int64_t width, int64_t hidden, In x, In injected, In decay, In gain_mlp, In t_up, In t_down, In gain, Out s, Out n, Out h, Out a, Out o, Out stats, Out y) {
  for (int64_t r = 0; r < rows; ++r)
    vectors(width, [&](int64_t i, auto get, auto put) {
      int64_t at = r * width + i;
      Vec v = x ? get(injected + at) + get(x + at) * get(decay + i) : get(injected + at);
      put(s + at, v), put(o + at, v);
    });
  norm_forward(rows, width, s, gain_mlp, false, stats, n);
  forward(rows, width, 2 * hidden, n, t_up, h);
  for (int64_t r = 0; r < rows; ++r)
    vectors(hidden, [&](int64_t i, auto get, auto put) {
      Vec g = get(h + 2 * r * hidden + i);
      put(a + r * hidden + i, g * sigmoid(g) * get(h + (2 * r + 1) * hidden + i));
    });
  forward(rows, hidden, width, a, t_down, o, true);
  norm_forward(rows, width, o, gain, false, stats + 2 * rows, y);
}

// scratch (rows, width + 3 hidden); ds (rows, width) is the gradient of injected.
void loop_backward(int64_t rows, int64_t width, int64_t hidden, In x, In decay, In gain_mlp, In w_up, In w_down, In gain, In s, In n, In h, In a, In o, In stats, In dy, Out scratch, Out ds, Out dx, Out ddecay, Out dgain_mlp, Out dw_up, Out dw_down, Out dgain) {
  Out da = scratch, dh = da + rows * hidden, dn = dh + 2 * rows * hidden;
  norm_backward(rows, width, o, gain, false, stats + 2 * rows, dy, ds, dgain);
  backward(rows, hidden, width, a, w_down, ds, da, dw_down);
  for (int64_t r = 0; r < rows; ++r)
    vectors(hidden, [&](int64_t i, auto get, auto put) {
      Vec g = get(h + 2 * r * hidden + i), v = get(h + (2 * r + 1) * hidden + i), d = get(da + r * hidden + i), p = sigmoid(g);
      put(dh + 2 * r * hidden + i, d * v * p * (1.0f + g * (1.0f - p)));
      put(dh + (2 * r + 1) * hidden + i, d * g * p);
    });
  backward(rows, width, 2 * hidden, n, w_up, dh, dn, dw_up);
  norm_backward(rows, width, s, gain_mlp, false, stats, dn, ds, dgain_mlp, true);
  if (x)
    for (int64_t r = 0; r < rows; ++r)
      vectors(width, [&](int64_t i, auto get, auto put) {
        int64_t at = r * width + i;
        Vec d = get(ds + at);
        put(dx + at, d * get(decay + i));
        if (ddecay) put(ddecay + i, get(ddecay + i) + d * get(x + at));
      });
}

// ---------------------------------------------------------------------- one certified loop, of a state of one token

// out = start + decay x + coupling W2 (maxmin(W1 y + bias) sigmoid(gate)), y = coupling x. A row of injected holds
// start (width), bias (hidden) and gate (hidden), before its sigmoid. maxmin pairs unit i with unit i + hidden / 2.
// Kept: y, o (rows, width), o before the coupling; h, a (rows, hidden), before and behind maxmin and gate.
void certified_forward(int64_t rows, int64_t width, int64_t hidden, In x, In injected, In decay, In coupling, In t_up, In t_down, Out y, Out o, Out h, Out a, Out out) {
  int64_t stride = width + 2 * hidden, half = hidden / 2;
  for (int64_t r = 0; r < rows; ++r) {
    vectors(width, [&](int64_t i, auto get, auto put) { put(y + r * width + i, get(x + r * width + i) * get(coupling + i)); });
    std::memcpy(h + r * hidden, injected + r * stride + width, 4 * hidden);
  }
  forward(rows, width, hidden, y, t_up, h, true);
  for (int64_t r = 0; r < rows; ++r) {
    In gate = injected + r * stride + width + hidden, from = h + r * hidden;
    Out to = a + r * hidden;
    vectors(half, [&](int64_t i, auto get, auto put) {
      Vec one = get(from + i), other = get(from + half + i);
      put(to + i, (one > other ? one : other) * sigmoid(get(gate + i)));
      put(to + half + i, (one > other ? other : one) * sigmoid(get(gate + half + i)));
    });
  }
  forward(rows, hidden, width, a, t_down, o);
  for (int64_t r = 0; r < rows; ++r)
    vectors(width, [&](int64_t i, auto get, auto put) {
      int64_t at = r * width + i;
      put(out + at, get(injected + r * stride + i) + get(x + at) * get(decay + i) + get(coupling + i) * get(o + at));
    });
}

// scratch (rows, 2 width + 2 hidden)
void certified_backward(int64_t rows, int64_t width, int64_t hidden, In x, In injected, In decay, In coupling, In w_up, In w_down, In y, In o, In h, In a, In dout, Out scratch, Out dx, Out dinjected, Out ddecay, Out dcoupling, Out dw_up, Out dw_down) {
  int64_t stride = width + 2 * hidden, half = hidden / 2;
  Out d_o = scratch, dy = d_o + rows * width, da = dy + rows * width, dh = da + rows * hidden;
  for (int64_t r = 0; r < rows; ++r)
    vectors(width, [&](int64_t i, auto get, auto put) {
      int64_t at = r * width + i;
      Vec d = get(dout + at);
      put(d_o + at, d * get(coupling + i));
      put(dinjected + r * stride + i, d);
      if (ddecay) put(ddecay + i, get(ddecay + i) + d * get(x + at));
      if (dcoupling) put(dcoupling + i, get(dcoupling + i) + d * get(o + at));
    });
  backward(rows, hidden, width, a, w_down, d_o, da, dw_down);
  for (int64_t r = 0; r < rows; ++r) {
    In gate = injected + r * stride + width + hidden, from = h + r * hidden, da_row = da + r * hidden;
    Out to = dh + r * hidden, dgate = dinjected + r * stride + width + hidden;
    vectors(half, [&](int64_t i, auto get, auto put) {
      Vec one = get(from + i), other = get(from + half + i), up = get(da_row + i), low = get(da_row + half + i);
      Vec p = sigmoid(get(gate + i)), q = sigmoid(get(gate + half + i));
      put(dgate + i, up * (one > other ? one : other) * p * (1.0f - p));
      put(dgate + half + i, low * (one > other ? other : one) * q * (1.0f - q));
      up = up * p, low = low * q;
      put(to + i, one > other ? up : low);
      put(to + half + i, one > other ? low : up);
    });
    std::memcpy(dinjected + r * stride + width, to, 4 * hidden);
  }
  backward(rows, width, hidden, y, w_up, dh, dy, dw_up);
  for (int64_t r = 0; r < rows; ++r)
    vectors(width, [&](int64_t i, auto get, auto put) {
      int64_t at = r * width + i;
      Vec d = get(dy + at);
      put(dx + at, get(dout + at) * get(decay + i) + d * get(coupling + i));
      if (dcoupling) put(dcoupling + i, get(dcoupling + i) + d * get(x + at));
    });
}

// ---------------------------------------------------------------------- a step of the block GRU, the control

// deter (rows, width) in `blocks` parts, input (rows, latents + actions). Three layers read deter, latents and action:
// of each t, bias and gain. w_hidden (blocks, part + 3 units, part) and w_gates (blocks, part, 3 part) are (inputs,
// outputs), and their transposes, for gradients, (outputs, inputs).
// Kept: z, read (3, rows, units); stats (4 rows, 2); z_hidden, hidden (rows, width); gates (rows, 3 width).
void gru_forward(int64_t rows, int64_t width, int64_t blocks, int64_t latents, int64_t actions, int64_t units, In deter, In input, In t_deter, In b_deter, In gain_deter, In t_stoch, In b_stoch, In gain_stoch, In t_action, In b_action, In gain_action, In w_hidden, In b_hidden, In gain_hidden, In w_gates, In b_gates, Out z, Out read, Out stats, Out z_hidden, Out hidden, Out gates, Out out, Out update) {
  int64_t part = width / blocks, fan_in = part + 3 * units;
  In x[] = {deter, input, input + latents}, t[] = {t_deter, t_stoch, t_action};
  In bias[] = {b_deter, b_stoch, b_action}, gain[] = {gain_deter, gain_stoch, gain_action};
  int64_t count[] = {width, latents, actions}, stride[] = {width, latents + actions, latents + actions};
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(z_hidden + r * width, b_hidden, 4 * width);
    std::memcpy(gates + 3 * r * width, b_gates, 12 * width);
  }
  for (int i = 0; i < 3; ++i, z += rows * units, read += rows * units, stats += 2 * rows) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(z + r * units, bias[i], 4 * units);
    product(rows, units, count[i], x[i], stride[i], 1, t[i], units, z, units, true);
    norm_forward(rows, units, z, gain[i], true, stats, read);
    for (int64_t b = 0; b < blocks; ++b)
      product(rows, part, units, read, units, 1, w_hidden + (b * fan_in + part + i * units) * part, part, z_hidden + b * part, width, true);
  }
  for (int64_t b = 0; b < blocks; ++b)
    product(rows, part, part, deter + b * part, width, 1, w_hidden + b * fan_in * part, part, z_hidden + b * part, width, true);
  norm_forward(rows, width, z_hidden, gain_hidden, true, stats, hidden);
  for (int64_t b = 0; b < blocks; ++b)
    product(rows, 3 * part, part, hidden + b * part, width, 1, w_gates + 3 * b * part * part, 3 * part, gates + 3 * b * part, 3 * width, true);
  for (int64_t at = 0; at < rows * blocks; ++at)
    vectors(part, [&](int64_t i, auto get, auto put) {
      In g = gates + 3 * at * part + i;
      Vec x = get(deter + at * part + i), u = sigmoid(get(g + 2 * part) - 1.0f);  // as GRUCore.forward
      Vec candidate = 2.0f * sigmoid(2.0f * sigmoid(get(g)) * get(g + part)) - 1.0f;
      put(out + at * part + i, x + u * (candidate - x));
      put(update + at * part + i, u);
    });
}

// scratch (rows, 5 width + 2 units). Gradients of weights: null where they are frozen.
void gru_backward(int64_t rows, int64_t width, int64_t blocks, int64_t latents, int64_t actions, int64_t units, In deter, In input, In w_deter, In gain_deter, In w_stoch, In gain_stoch, In w_action, In gain_action, In t_hidden, In gain_hidden, In t_gates, In z, In read, In stats, In z_hidden, In hidden, In gates, In dout, Out scratch, Out ddeter, Out dinput, Out dw_deter, Out db_deter, Out dgain_deter, Out dw_stoch, Out db_stoch, Out dgain_stoch, Out dw_action, Out db_action, Out dgain_action, Out dw_hidden, Out db_hidden, Out dgain_hidden, Out dw_gates, Out db_gates) {
  int64_t part = width / blocks, fan_in = part + 3 * units;
  In x[] = {deter, input, input + latents}, w[] = {w_deter, w_stoch, w_action}, gain[] = {gain_deter, gain_stoch, gain_action};
  Out dw[] = {dw_deter, dw_stoch, dw_action}, db[] = {db_deter, db_stoch, db_action}, dgain[] = {dgain_deter, dgain_stoch, dgain_action};
  Out dx[] = {ddeter, dinput, dinput + latents};
  int64_t count[] = {width, latents, actions}, stride[] = {width, latents + actions, latents + actions};
  Out dgates = scratch, dhidden = dgates + 3 * rows * width, dz_hidden = dhidden + rows * width;
  Out dread = dz_hidden + rows * width, dz = dread + rows * units;
  for (int64_t at = 0; at < rows * blocks; ++at)
    vectors(part, [&](int64_t i, auto get, auto put) {
      In g = gates + 3 * at * part + i;
      Out dg = dgates + 3 * at * part + i;
      Vec d = get(dout + at * part + i), u = sigmoid(get(g + 2 * part) - 1.0f), reset = sigmoid(get(g)), c = get(g + part);
      Vec candidate = 2.0f * sigmoid(2.0f * reset * c) - 1.0f, inner = d * u * (1.0f - candidate * candidate);
      put(dg, inner * c * reset * (1.0f - reset));
      put(dg + part, inner * reset);
      put(dg + 2 * part, d * (candidate - get(deter + at * part + i)) * u * (1.0f - u));
      put(ddeter + at * part + i, d * (1.0f - u));
    });
  for (int64_t b = 0; b < blocks; ++b) {
    product(rows, part, 3 * part, dgates + 3 * b * part, 3 * width, 1, t_gates + 3 * b * part * part, part, dhidden + b * part, width, false);
    if (dw_gates) product(part, 3 * part, rows, hidden + b * part, 1, width, dgates + 3 * b * part, 3 * width, dw_gates + 3 * b * part * part, 3 * part, true);
  }
  norm_backward(rows, width, z_hidden, gain_hidden, true, stats + 6 * rows, dhidden, dz_hidden, dgain_hidden);
  if (db_gates) add_rows(rows, 3 * width, dgates, db_gates), add_rows(rows, width, dz_hidden, db_hidden);
  for (int64_t b = 0; b < blocks; ++b) {
    product(rows, part, part, dz_hidden + b * part, width, 1, t_hidden + b * fan_in * part, fan_in, ddeter + b * part, width, true);
    if (dw_hidden) product(part, part, rows, deter + b * part, 1, width, dz_hidden + b * part, width, dw_hidden + b * fan_in * part, part, true);
  }
  for (int i = 0; i < 3; ++i, z += rows * units, read += rows * units, stats += 2 * rows) {
    for (int64_t b = 0; b < blocks; ++b) {
      int64_t begin = part + i * units;
      product(rows, units, part, dz_hidden + b * part, width, 1, t_hidden + b * fan_in * part + begin, fan_in, dread, units, b > 0);
      if (dw_hidden) product(units, part, rows, read, 1, units, dz_hidden + b * part, width, dw_hidden + (b * fan_in + begin) * part, part, true);
    }
    norm_backward(rows, units, z, gain[i], true, stats, dread, dz, dgain[i]);
    product(rows, count[i], units, dz, units, 1, w[i], count[i], dx[i], stride[i], i == 0);
    if (dw[i]) product(units, count[i], rows, dz, 1, units, x[i], stride[i], dw[i], count[i], true), add_rows(rows, units, dz, db[i]);
  }
}

// ---------------------------------------------------------------------- exits: which samples go on to the next loop

// Of `rows` samples that are still looping, x (rows, width) is the state after loop number `loop` and `before` the one
// before it; index (rows): which sample of the batch each is. Those that stop leave their state in last (batch, width)
// and the number of their loops in depth (batch); the others are moved together into the arrays of the next loop, with
// what they read (rows, extra). Returns how many go on. residual (batch, cap): |x - before| / |x|.
// A gate (w_state null: none, and all go on to the cap) stops those of which it expects `threshold` or less.
int64_t exits(int64_t rows, int64_t width, int64_t extra, int64_t loop, int64_t cap, float threshold, In before, In x, In injected, In w_state, In b_state, In w_change, Index index, Out depth, Out residual, Out last, Out x_next, Out injected_next, Index index_next) {
  int64_t going = 0;
  for (int64_t i = 0; i < rows; ++i, before += width, x += width, injected += extra) {
    Vec norm{}, moved{}, state{}, changes{};
    vectors(width, [&](int64_t j, auto get, auto) {
      Vec now = get(x + j), change = now - get(before + j);
      norm += now * now, moved += change * change;
      if (!w_state) return;
      state += now * get(w_state + j);
      changes += (change < 0.0f ? -change : change) * get(w_change + j);
    });
    float change = __builtin_sqrtf(sum(moved)), gain = 0.0f;
    residual[index[i] * cap + loop - 1] = change / __builtin_sqrtf(sum(norm));
    if (w_state) gain = (sum(state) + *b_state) * change / __builtin_sqrtf(width) + sum(changes);
    if (loop < cap && !(w_state && gain <= threshold)) {
      std::memcpy(x_next + going * width, x, 4 * width);
      std::memcpy(injected_next + going * extra, injected, 4 * extra);
      index_next[going++] = index[i];
    } else {
      std::memcpy(last + index[i] * width, x, 4 * width);
      depth[index[i]] = loop;
    }
  }
  return going;
}

void gather(int64_t rows, int64_t width, In from, Index index, Out to) {  // to[i] = from[index[i]]
  for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * width, from + index[i] * width, 4 * width);
}

void scatter(int64_t rows, int64_t width, In from, Index index, Out to) {  // to[index[i]] = from[i]
  for (int64_t i = 0; i < rows; ++i) std::memcpy(to + index[i] * width, from + i * width, 4 * width);
}

void scatter_add(int64_t rows, int64_t width, In from, Index index, Out to) {  // to[index[i]] += from[i]
  for (int64_t i = 0; i < rows; ++i)
    vectors(width, [&](int64_t j, auto get, auto put) {
      Out p = to + index[i] * width + j;
      put(p, get(p) + get(from + i * width + j));
    });
}

// ---------------------------------------------------------------------- read-out: coda, norm, outer gate

// y = deter + gate (norm(C x) - deter). Kept: z, out (rows, width); stats (rows, 2).
void readout_forward(int64_t rows, int64_t width, In deter, In x, In gate, In t, In gain, Out z, Out out, Out stats, Out y) {
  forward(rows, width, width, x, t, z);
  norm_forward(rows, width, z, gain, false, stats, out);
  vectors(rows * width, [&](int64_t i, auto get, auto put) {
    Vec d = get(deter + i);
    put(y + i, d + get(gate + i) * (get(out + i) - d));
  });
}

// scratch (rows, width)
void readout_backward(int64_t rows, int64_t width, In deter, In x, In gate, In w, In gain, In z, In out, In stats, In dy, Out scratch, Out ddeter, Out dx, Out dgate, Out dw, Out dgain) {
  vectors(rows * width, [&](int64_t i, auto get, auto put) {
    Vec d = get(dy + i), u = get(gate + i);
    put(dgate + i, d * (get(out + i) - get(deter + i)));
    put(ddeter + i, d * (1.0f - u));
    put(scratch + i, d * u);
  });
  norm_backward(rows, width, z, gain, false, stats, scratch, scratch, dgain);
  backward(rows, width, width, x, w, scratch, dx, dw);
}
}
