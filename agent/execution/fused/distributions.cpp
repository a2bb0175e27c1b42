// What the outputs of layers stand for: continuous actions, categorical latents, two-hot values. Written as layers.cpp,
// whose first lines hold for this file too; the mathematics is that of world_model/ and agent/learning/.

#include "vectors.h"

namespace {

// exps (bins) = e^(x - most), where `most` is the largest; returns their sum.
float exponentials(int64_t bins, In x, Out exps, float* most) {
  Vec largest = all(x[0]), total{};
  int64_t whole = bins / L * L;
  for (int64_t k = 0; k < whole; k += L) largest = load(x + k) > largest ? load(x + k) : largest;
  float top = x[0];
  for (int i = 0; i < L; ++i) top = largest[i] > top ? largest[i] : top;
  for (int64_t k = whole; k < bins; ++k) top = x[k] > top ? x[k] : top;
  vectors(bins, [&](int64_t k, auto get, auto put) { put(exps + k, exp(get(x + k) - top)); });
  vectors(bins, [&](int64_t k, auto get, auto) { total += get(exps + k); });
  *most = top;
  return sum(total);
}

// The two-hot code of a target: the upper one of its bins, and that one's share. NaN stays NaN.
struct Code {
  int64_t upper;
  float share;
  Code(int64_t bins, In centers, float target) {
    float x = target < centers[0] ? centers[0] : target > centers[bins - 1] ? centers[bins - 1] : target;
    int64_t low = 0, high = bins;  // the first center that is not below x
    while (low < high) {
      int64_t middle = (low + high) / 2;
      if (centers[middle] < x) low = middle + 1;
      else high = middle;
    }
    upper = low < 1 ? 1 : low < bins - 1 ? low : bins - 1;
    share = (x - centers[upper - 1]) / (centers[upper] - centers[upper - 1]);
  }
  float of(In logits) const { return logits[upper - 1] + share * (logits[upper] - logits[upper - 1]); }
  void subtract(Out from, float weight) const { from[upper - 1] -= weight * (1.0f - share), from[upper] -= weight * share; }
};

}  // namespace

extern "C" {

// ---------------------------------------------------------------------- continuous actions

// out (rows, 2 actions): a mean before its tanh, and a deviation before its sigmoid. action = mean + deviation noise;
// control, whose rows lie `stride` apart, gets the same with a size of at most 1, as many times as the action is held.
// The 2 is that of Actor.distribution.
void act_forward(int64_t rows, int64_t actions, int64_t held, float least, In out, In noise, Out action, Out control, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, out += 2 * actions, noise += actions, action += actions, control += stride)
    vectors(actions, [&](int64_t i, auto get, auto put) {
      Vec mean = 2.0f * sigmoid(2.0f * get(out + i)) - 1.0f, deviation = (1.0f - least) * sigmoid(get(out + actions + i) + 2.0f) + least;
      Vec a = mean + deviation * get(noise + i), size = a < 0.0f ? -a : a;
      put(action + i, a);
      for (int64_t j = 0; j < held; ++j) put(control + j * actions + i, a / (size > 1.0f ? size : all(1.0f)));
    });
}

void act_backward(int64_t rows, int64_t actions, int64_t held, float least, In out, In noise, In action, In dcontrol, int64_t stride, Out dout) {
  for (int64_t r = 0; r < rows; ++r, out += 2 * actions, dout += 2 * actions, noise += actions, action += actions, dcontrol += stride)
    vectors(actions, [&](int64_t i, auto get, auto put) {
      Vec a = get(action + i), size = a < 0.0f ? -a : a, d{};
      for (int64_t j = 0; j < held; ++j) d += get(dcontrol + j * actions + i);
      d = d / (size > 1.0f ? size : all(1.0f));
      Vec mean = 2.0f * sigmoid(2.0f * get(out + i)) - 1.0f, share = sigmoid(get(out + actions + i) + 2.0f);
      put(dout + i, d * (1.0f - mean * mean));
      put(dout + actions + i, d * get(noise + i) * (1.0f - least) * share * (1.0f - share));
    });
}

// ---------------------------------------------------------------------- categorical latents

// logits (groups, classes) -> softmax mixed with `unimix` of the uniform distribution.
void categorical_forward(int64_t groups, int64_t classes, float unimix, In logits, Out probs) {
  for (int64_t g = 0; g < groups; ++g) {
    In from = logits + g * classes;
    float top = from[0];
    for (int64_t k = 1; k < classes; ++k) top = from[k] > top ? from[k] : top;
    for (int64_t k = 0; k < classes; ++k) probs[g * classes + k] = from[k] - top;
  }
  vectors(groups * classes, [&](int64_t i, auto get, auto put) { put(probs + i, exp(get(probs + i))); });
  for (int64_t g = 0; g < groups; ++g) {
    Out p = probs + g * classes;
    float total = 0.0f;
    for (int64_t k = 0; k < classes; ++k) total += p[k];
    float scale = (1.0f - unimix) / total, floor = unimix / classes;
    for (int64_t k = 0; k < classes; ++k) p[k] = floor + scale * p[k];
  }
}

void categorical_backward(int64_t groups, int64_t classes, float unimix, In probs, In dprobs, Out dlogits) {
  float floor = unimix / classes;
  for (int64_t g = 0; g < groups; ++g, probs += classes, dprobs += classes, dlogits += classes) {
    float mean = 0.0f, share = 1.0f / (1.0f - unimix);
    for (int64_t k = 0; k < classes; ++k) mean += (probs[k] - floor) * dprobs[k];
    mean *= share;
    for (int64_t k = 0; k < classes; ++k) dlogits[k] = (probs[k] - floor) * (dprobs[k] - mean);
  }
}

// One-hot of the class in which the cumulative probability passes the level of the group.
void sample(int64_t groups, int64_t classes, In probs, In level, Out onehot) {
  for (int64_t g = 0; g < groups; ++g, probs += classes, onehot += classes) {
    float total = 0.0f, before = 0.0f;
    for (int64_t k = 0; k < classes; ++k) total += probs[k];
    float limit = level[g] * total;
    int64_t at = 0;
    for (int64_t k = 0; k < classes - 1; ++k) {
      before += probs[k];
      at += before <= limit;
    }
    for (int64_t k = 0; k < classes; ++k) onehot[k] = k == at;
  }
}

// ---------------------------------------------------------------------- two-hot values

// logits (rows, bins) -> probs (rows, bins) and their mean (rows) over the centers, which are symmetric about the middle
// one: bins of opposite sign are taken together, so that equal logits have a mean of exactly 0.
void twohot_mean_forward(int64_t rows, int64_t bins, In logits, In centers, Out probs, Out mean) {
  int64_t half = bins / 2;
  Out turned = static_cast<Out>(__builtin_alloca(4 * half));
  for (int64_t r = 0; r < rows; ++r, logits += bins, probs += bins) {
    float most, share = 1.0f / exponentials(bins, logits, probs, &most);
    for (int64_t k = 0; k < half; ++k) turned[k] = probs[half - 1 - k];
    Vec total{};
    vectors(half, [&](int64_t k, auto get, auto) {
      total += (get(probs + half + 1 + k) - get(turned + k)) * get(centers + half + 1 + k);
    });
    vectors(bins, [&](int64_t k, auto get, auto put) { put(probs + k, get(probs + k) * share); });
    mean[r] = sum(total) * share;
  }
}

void twohot_mean_backward(int64_t rows, int64_t bins, In probs, In centers, In mean, In dmean, Out dlogits) {
  for (int64_t r = 0; r < rows; ++r, probs += bins, dlogits += bins)
    vectors(bins, [&](int64_t k, auto get, auto put) { put(dlogits + k, get(probs + k) * (get(centers + k) - mean[r]) * dmean[r]); });
}

// Cross-entropy (rows) of logits (rows, bins) against the code of `first`, and `scale` times that of `second` (null:
// none). Kept: log_sum (rows), the logarithm of the sum of e^logits.
void twohot_loss_forward(int64_t rows, int64_t bins, float scale, In logits, In centers, In first, In second, Out log_sum, Out loss) {
  Out exps = static_cast<Out>(__builtin_alloca(4 * bins));
  for (int64_t r = 0; r < rows; ++r, logits += bins) {
    float most, total = exponentials(bins, logits, exps, &most);
    log_sum[r] = most + __builtin_logf(total);
    loss[r] = log_sum[r] - Code(bins, centers, first[r]).of(logits);
    if (second) loss[r] += scale * (log_sum[r] - Code(bins, centers, second[r]).of(logits));
  }
}

void twohot_loss_backward(int64_t rows, int64_t bins, float scale, In logits, In centers, In first, In second, In log_sum, In dloss, Out dlogits) {
  float both = second ? 1.0f + scale : 1.0f;
  for (int64_t r = 0; r < rows; ++r, logits += bins, dlogits += bins) {
    vectors(bins, [&](int64_t k, auto get, auto put) { put(dlogits + k, exp(get(logits + k) - log_sum[r]) * both * dloss[r]); });
    Code(bins, centers, first[r]).subtract(dlogits, dloss[r]);
    if (second) Code(bins, centers, second[r]).subtract(dlogits, scale * dloss[r]);
  }
}
}
