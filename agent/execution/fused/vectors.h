// Vectors of float32 as wide as the processor has them; products of matrices and norms made of them.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int L = 16;  // numbers of a vector
#elif defined(__AVX__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif
constexpr int WIDE = L == 16 ? 4 : 2;  // vectors of a tile: with ROWS of them the accumulators fill the registers
constexpr int ROWS = L == 16 ? 6 : L == 8 ? 6 : 8;
constexpr float EPS = 1e-3f;  // of a norm: Norm.eps

#define UNROLL _Pragma("GCC unroll 16")

typedef float Vec __attribute__((vector_size(4 * L)));
typedef int32_t Ints __attribute__((vector_size(4 * L)));
typedef const float* In;
typedef float* Out;
typedef int32_t* Index;

inline Vec all(float x) { return x - Vec{}; }

inline Vec load(In p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(Out p, Vec v) { std::memcpy(p, &v, sizeof v); }

// The first n numbers of a vector; the others are 0.
#if defined(__AVX512F__)
inline Vec load(In p, int64_t n) { return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
inline void store(Out p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v); }
#else
inline Vec load(In p, int64_t n) {
  Vec v{};
  std::memcpy(&v, p, 4 * n);
  return v;
}
inline void store(Out p, Vec v, int64_t n) { std::memcpy(p, &v, 4 * n); }
#endif

inline float sum(Vec v) {
  float total = 0.0f;
  for (int i = 0; i < L; ++i) total += v[i];
  return total;
}

// e^x, to about one unit in the last place: x = n log 2 + r, a polynomial in r, and n into the exponent. Adding and taking
// away 1.5 * 2^23 rounds to a whole number; log 2 is 0.693359375 - 2.1219444e-4, the first exact in few bits.
inline Vec exp(Vec x) {
  const Vec top = all(88.0f), bottom = all(-87.0f), magic = all(12582912.0f);
  x = x > top ? top : x;
  x = x < bottom ? bottom : x;
  Vec n = x * 1.44269504f + magic - magic;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  Vec y = p * r * r + r + 1.0f;
  Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
  return y * (Vec)exponent;
}
inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

// f(offset, numbers) for the vectors of a row of `width` numbers, the last of which may be shorter.
template <class F>
inline void vectors(int64_t width, F f) {
  int64_t i = 0;
  for (; i + L <= width; i += L) f(i, [](In p) { return load(p); }, [](Out p, Vec v) { store(p, v); });
  if (int64_t n = width - i) f(i, [n](In p) { return load(p, n); }, [n](Out p, Vec v) { store(p, v, n); });
}

// ---------------------------------------------------------------------- products

// R rows and V vectors of columns of C; the last vector may have only `tail` columns.
template <int R, int V>
inline void tile(int64_t depth, In a, int64_t row, int64_t step, In b, int64_t ldb, Out c, int64_t ldc, bool add, int64_t tail) {
  auto get = [tail](In p, int v) { return v == V - 1 && tail ? load(p + v * L, tail) : load(p + v * L); };
  Vec sums[R][V];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < V; ++v) sums[r][v] = add ? get(c + r * ldc, v) : Vec{};
  for (int64_t k = 0; k < depth; ++k, a += step, b += ldb) {
    Vec right[V];
    UNROLL for (int v = 0; v < V; ++v) right[v] = get(b, v);
    UNROLL for (int r = 0; r < R; ++r) {
      Vec left = all(a[r * row]);
      UNROLL for (int v = 0; v < V; ++v) sums[r][v] += left * right[v];
    }
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < V; ++v)
      if (v == V - 1 && tail) store(c + r * ldc + v * L, sums[r][v], tail);
      else store(c + r * ldc + v * L, sums[r][v]);
}

template <int R, int V>
inline void rows_of(int64_t rows, int64_t depth, In a, int64_t row, int64_t step, In b, int64_t ldb, Out c, int64_t ldc, bool add, int64_t tail) {
  if constexpr (R > 0) {
    if (rows == R) tile<R, V>(depth, a, row, step, b, ldb, c, ldc, add, tail);
    else rows_of<R - 1, V>(rows, depth, a, row, step, b, ldb, c, ldc, add, tail);
  }
}

template <int V>
void columns(int64_t rows, int64_t depth, In a, int64_t row, int64_t step, In b, int64_t ldb, Out c, int64_t ldc, bool add, int64_t tail) {
  int64_t blocks = (rows + ROWS - 1) / ROWS;
  for (int64_t done = 0; blocks > 0; --blocks) {
    int64_t count = (rows - done + blocks - 1) / blocks;
    rows_of<ROWS, V>(count, depth, a + done * row, row, step, b, ldb, c + done * ldc, ldc, add, tail);
    done += count;
  }
}

// C (rows, cols) = A B, or C + A B. A (rows, depth) has any strides: `row`, `step`; B (depth, cols) has rows of ldb.
void product(int64_t rows, int64_t cols, int64_t depth, In a, int64_t row, int64_t step, In b, int64_t ldb, Out c, int64_t ldc, bool add) {
  for (int64_t j = 0; j < cols; j += WIDE * L) {
    int64_t left = cols - j, vecs = (left + L - 1) / L, tail = left % L;
    if (left >= WIDE * L) columns<WIDE>(rows, depth, a, row, step, b + j, ldb, c + j, ldc, add, 0);
    else if (vecs == 1) columns<1>(rows, depth, a, row, step, b + j, ldb, c + j, ldc, add, tail);
    else if (vecs == 2) columns<2>(rows, depth, a, row, step, b + j, ldb, c + j, ldc, add, tail);
    else if constexpr (WIDE == 4) {
      if (vecs == 3) columns<3>(rows, depth, a, row, step, b + j, ldb, c + j, ldc, add, tail);
      else columns<4>(rows, depth, a, row, step, b + j, ldb, c + j, ldc, add, tail);
    }
  }
}

// x (rows, inputs) W^T -> y (rows, outputs)
void forward(int64_t rows, int64_t inputs, int64_t outputs, In x, In t, Out y, bool add = false) {
  product(rows, outputs, inputs, x, inputs, 1, t, outputs, y, outputs, add);
}

// Gradients of that: dx = dy W, dw += dy^T x.
void backward(int64_t rows, int64_t inputs, int64_t outputs, In x, In w, In dy, Out dx, Out dw, bool add = false) {
  if (dx) product(rows, inputs, outputs, dy, outputs, 1, w, inputs, dx, inputs, add);
  if (dw) product(outputs, inputs, rows, dy, 1, outputs, x, inputs, dw, inputs, true);
}

// ---------------------------------------------------------------------- norms

void add_rows(int64_t rows, int64_t width, In x, Out total) {  // total (width) += the sum of the rows
  for (int64_t r = 0; r < rows; ++r)
    vectors(width, [&](int64_t i, auto get, auto put) { put(total + i, get(total + i) + get(x + r * width + i)); });
}

// y = silu(norm(z)), or without silu; stats (rows, 2): mean and 1 / deviation.
void norm_forward(int64_t rows, int64_t width, In z, In gain, bool silu, Out stats, Out y) {
  for (int64_t r = 0; r < rows; ++r, z += width, y += width, stats += 2) {
    Vec first{}, second{};
    vectors(width, [&](int64_t i, auto get, auto) { first += get(z + i); });
    float mean = sum(first) / width;
    vectors(width, [&](int64_t i, auto get, auto) {
      Vec d = get(z + i) - mean;
      second += d * d;
    });
    float over = (width + L - 1) / L * L - width;  // what the numbers behind the end have added
    float variance = (sum(second) - over * mean * mean) / width;  // rounded it may be less than 0
    float inverse = 1.0f / __builtin_sqrtf((variance > 0.0f ? variance : 0.0f) + EPS);
    stats[0] = mean, stats[1] = inverse;
    vectors(width, [&](int64_t i, auto get, auto put) {
      Vec n = (get(z + i) - mean) * inverse * get(gain + i);
      put(y + i, silu ? n * sigmoid(n) : n);
    });
  }
}

// dz from dy, and dgain (width) += its part; dz may be dy, and with `add` is added to.
void norm_backward(int64_t rows, int64_t width, In z, In gain, bool silu, In stats, In dy, Out dz, Out dgain, bool add = false) {
  Out scratch = static_cast<Out>(__builtin_alloca(4 * width));
  for (int64_t r = 0; r < rows; ++r, z += width, dy += width, dz += width, stats += 2) {
    float mean = stats[0], inverse = stats[1];
    Vec first{}, second{};
    vectors(width, [&](int64_t i, auto get, auto put) {
      Vec hat = (get(z + i) - mean) * inverse, g = get(gain + i), d = get(dy + i);
      if (silu) {
        Vec n = hat * g, s = sigmoid(n);
        d = d * s * (1.0f + n * (1.0f - s));
      }
      if (dgain) put(dgain + i, get(dgain + i) + d * hat);
      d = d * g;
      put(scratch + i, d);
      first += d, second += d * hat;
    });
    float one = sum(first) / width, two = sum(second) / width;
    vectors(width, [&](int64_t i, auto get, auto put) {
      Vec hat = (get(z + i) - mean) * inverse, d = (get(scratch + i) - one - hat * two) * inverse;
      put(dz + i, add ? get(dz + i) + d : d);
    });
  }
}

}  // namespace
