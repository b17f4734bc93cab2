// A 3x3 convolution of stride 1 with a 2x2 pool, and its transpose, by Winograd's F(2x2, 3x3): a tile of 4x4 pixels of
// the lower layer makes just one window of the pool, by 16 products where the convolution has 36. Images are
// (samples, height, width, channels); channels come in whole vectors.
//
//   up    Y = A^T [ (G g G^T) . (B^T d B) ] A
//         max      value = max Y, place = where it is
//         softmax  value = sum_i Y_i p_i, p = softmax(Y), slopes_i = p_i (1 + Y_i - value)
//   down  the transpose: B [ (G g G^T) . (A y A^T) ] B^T is added to the tile, y_i = slope_i value; of a max pool value
//         at its place, 0 elsewhere
//
//         mean     value = c^T Y' c / 4, Y' = (G g G^T) . (B^T d B), c = A 1 = (1, 2, 0, -1)
//         down     y_i = value / 4, so A y A^T = c c^T value / 4: 9 of the 16 points, for c has a 0
//
// Lavin & Gray, "Fast algorithms for convolutional neural networks" (CVPR 2016).
#pragma once
#include "equilibrium/cpu/kernels.h"
#include "equilibrium/cpu/product.h"

namespace lgk::cpu::LGK_ISA {

constexpr int kPoints = 16, kMeanPoints = 9;
constexpr int kMeanPlace[kMeanPoints] = {0, 1, 3, 4, 5, 7, 12, 13, 15};  // of the points that a mean needs
constexpr int64_t kGroupRows = 4 * kTileRows;  // tiles whose products lie in the cache together

inline int64_t points_of(const PooledEdge& e) { return e.pool == StatePool::kMean ? kMeanPoints : kPoints; }

struct PoolTiles {
  int64_t down, across, each, all;  // rows and columns of tiles; of a sample, of all samples
};

inline PoolTiles tiles_of(const PooledEdge& e) {
  const int64_t down = (e.height + 2 * e.padding - 2) / 2, across = (e.width + 2 * e.padding - 2) / 2;
  return {down, across, down * across, down * across * e.samples};
}

// The pixels of a tile, null outside of the image.
template <class T>
inline void pixels_of(const PooledEdge& e, const PoolTiles& tiles, int64_t tile, int64_t channels, T* image,
                      T* pixels[kPoints]) {
  const int64_t sample = tile / tiles.each, place = tile % tiles.each;
  const int64_t top = place / tiles.across * 2 - e.padding, left = place % tiles.across * 2 - e.padding;
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t y = top + i, x = left + j;
      const bool inside = y >= 0 && y < e.height && x >= 0 && x < e.width;
      pixels[i * 4 + j] = inside ? image + ((sample * e.height + y) * e.width + x) * channels : nullptr;
    }
}

// -- the four transforms, of lines S apart ----------------------------------------------------------------------------

template <int S>
LGK_INLINE void line_in(vf* d) {  // B^T
  const vf a = d[0], b = d[S], c = d[2 * S], last = d[3 * S];
  d[0] = a - c, d[S] = b + c, d[2 * S] = c - b, d[3 * S] = b - last;
}

template <int S>
LGK_INLINE void line_back(vf* y) {  // B
  const vf a = y[0], b = y[S], c = y[2 * S], last = y[3 * S];
  y[1 * S] = b - c + last, y[2 * S] = b + c - a, y[3 * S] = -last;
}

template <int S>
LGK_INLINE void line_out(const vf* m, vf* out, int step) {  // A^T
  out[0] = m[0] + m[S] + m[2 * S];
  out[step] = m[S] - m[2 * S] - m[3 * S];
}

LGK_INLINE void line_spread(vf a, vf b, vf* out, int step) {  // A
  out[0] = a, out[step] = a + b, out[2 * step] = a - b, out[3 * step] = -b;
}

// -- products ---------------------------------------------------------------------------------------------------------

// y (point, rows, vectors) = rows of points (point, tiles, depth) @ the panel of each point
inline void multiply_points(int64_t count, const float* points, int64_t tiles, int64_t depth, int64_t row, int64_t rows,
                            const float* panel, int64_t apart, int vectors, float* y) {
  static constexpr auto all = product_tiles(std::make_integer_sequence<int, kTileRows>());
  for (int64_t p = 0; p < count; ++p) {
    const Operand operand = {points + p * tiles * depth, depth, depth};
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const ProductTiles& t = all.of[smaller(rows - i, kTileRows) - 1];
      (vectors == 1 ? t.one : t.two)(&operand, 1, row + i, panel + p * apart, 0, y + (p * rows + i) * vectors * V);
    }
  }
}

inline int pack_pooled(const PooledEdge& e, const float* weights, float* up, float* down, int threads) {
  for (int64_t p = 0; p < points_of(e); ++p) {  // (point, low, high)
    const float* own = weights + p * e.low * e.high;
    pack_panels(own, e.high, 1, e.low, e.high, 0, e.low, up + p * e.low * rounded(e.high, V), threads);
    pack_panels(own, 1, e.high, e.high, e.low, 0, e.high, down + p * e.high * rounded(e.low, V), threads);
  }
  return 0;
}

// Of a window's entries: the pool's value, and what is kept of it (4 rows of slopes, `apart` floats each).
LGK_INLINE vf largest_entry(const vf* entries, int32_t* place) {
  vf best = entries[0];
  vi where = {};
  for (int k = 1; k < 4; ++k) {
    const vi more = (entries[k] > best) | (entries[k] != entries[k]);  // nan stays
    best = more ? entries[k] : best;
    where = more ? vi{} + k : where;
  }
  std::memcpy(place, &where, sizeof where);
  return best;
}

LGK_INLINE vf softmax_entry(const vf* entries, float* slopes, int64_t apart) {
  vf highest = entries[0], p[4], mass = {}, value = {};
  for (int k = 1; k < 4; ++k) highest = entries[k] > highest ? entries[k] : highest;
  for (int k = 0; k < 4; ++k) mass += p[k] = exp_negative(entries[k] - highest);
  const vf inverse = 1.f / mass;
  for (int k = 0; k < 4; ++k) value += entries[k] * (p[k] *= inverse);
  for (int k = 0; k < 4; ++k) store(slopes + k * apart, p[k] * (1.f + entries[k] - value));
  return value;
}

// c^T m c / 4
LGK_INLINE vf mean_entry(const vf* m) {
  const auto line = [](const vf* v, int step) { return v[0] + 2.f * v[step] - v[2 * step]; };
  const vf parts[3] = {line(m, 1), line(m + 3, 1), line(m + 6, 1)};
  return 0.25f * line(parts, 1);
}

// c c^T v / 4
LGK_INLINE void spread_mean(vf v, vf* z) {
  constexpr float c[3] = {0.5f, 1.f, -0.5f};
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) z[3 * i + j] = c[i] * c[j] * v;
}

inline int pooled_up(const PooledEdge& e, const float* image, const float* panels, float* value, const PoolKept& kept,
                     float* points, int threads) {
  const PoolTiles tiles = tiles_of(e);
  const int64_t count = points_of(e);
  const bool mean = e.pool == StatePool::kMean;
  parallel(tiles.all, tiles.all * e.low * kPoints, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const float* pixels[kPoints];
      pixels_of(e, tiles, t, e.low, image, pixels);
      for (int64_t c = 0; c < e.low; c += V) {
        vf d[kPoints];
        for (int p = 0; p < kPoints; ++p) d[p] = pixels[p] ? load(pixels[p] + c) : vf{};
        for (int i = 0; i < 4; ++i) line_in<4>(d + i);
        for (int i = 0; i < 4; ++i) line_in<1>(d + 4 * i);
        const auto keep = [&](int64_t p, int place) { store(points + (p * tiles.all + t) * e.low + c, d[place]); };
        for (int p = 0; p < kMeanPoints && mean; ++p) keep(p, kMeanPlace[p]);
        for (int p = 0; p < kPoints && !mean; ++p) keep(p, p);
      }
    }
  });
  const int64_t panel_count = (e.high + 2 * V - 1) / (2 * V), groups = (tiles.all + kGroupRows - 1) / kGroupRows;
  Scratch scratch(kPoints * kGroupRows * 2 * V, threads);
  if (!scratch) return 1;
  parallel(panel_count * groups, tiles.all * e.low * e.high, threads, [&](int64_t begin, int64_t end, int thread) {
    float* y = scratch.of(thread);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t j = item / groups * 2 * V, row = item % groups * kGroupRows;
      const int64_t rows = smaller(tiles.all - row, kGroupRows);
      const int vectors = static_cast<int>(panel_columns(e.high - j) / V);
      multiply_points(count, points, tiles.all, e.low, row, rows, panels + j * e.low, e.low * rounded(e.high, V),
                      vectors, y);
      for (int64_t i = 0; i < rows * vectors; ++i) {
        vf m[kPoints], half[8], out[4];
        for (int64_t p = 0; p < count; ++p) m[p] = load(y + (p * rows * vectors + i) * V);
        const int64_t window = row + i / vectors, column = j + i % vectors * V, at = window * e.high + column;
        if (mean) {
          store(value + at, mean_entry(m));
          continue;
        }
        for (int k = 0; k < 4; ++k) line_out<4>(m + k, half + k, 4);
        for (int k = 0; k < 2; ++k) line_out<1>(half + 4 * k, out + 2 * k, 1);
        store(value + at, e.pool == StatePool::kMax
                              ? largest_entry(out, kept.place + at)
                              : softmax_entry(out, kept.slopes + 4 * window * e.high + column, e.high));
      }
    }
  });
  return 0;
}

inline int pooled_down(const PooledEdge& e, const float* value, const PoolKept& kept, const float* panels, float* image,
                       float* points, int threads) {
  const PoolTiles tiles = tiles_of(e);
  const int64_t count = points_of(e);
  const bool mean = e.pool == StatePool::kMean;
  parallel(tiles.all, tiles.all * e.high * kPoints, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t c = 0; c < e.high; c += V) {
        const vf v = load(value + t * e.high + c);
        vf y[4], half[8], z[kPoints];
        if (mean) {
          spread_mean(v, z);
          for (int64_t p = 0; p < kMeanPoints; ++p) store(points + (p * tiles.all + t) * e.high + c, z[p]);
          continue;
        }
        if (e.pool == StatePool::kMax) {
          vi where;
          std::memcpy(&where, kept.place + t * e.high + c, sizeof where);
          for (int k = 0; k < 4; ++k) y[k] = where == k ? v : vf{};
        } else {
          for (int k = 0; k < 4; ++k) y[k] = load(kept.slopes + (4 * t + k) * e.high + c) * v;
        }
        for (int k = 0; k < 2; ++k) line_spread(y[k], y[2 + k], half + k, 2);
        for (int k = 0; k < 4; ++k) line_spread(half[2 * k], half[2 * k + 1], z + 4 * k, 1);
        for (int64_t p = 0; p < kPoints; ++p) store(points + (p * tiles.all + t) * e.high + c, z[p]);
      }
  });
  // a sample's tiles overlap: one thread adds them up, for a panel of channels
  const int64_t panel_count = (e.low + 2 * V - 1) / (2 * V), pixels_each = e.height * e.width;
  const int64_t per = kGroupRows > tiles.each ? kGroupRows / tiles.each : 1, groups = (e.samples + per - 1) / per;
  Scratch scratch(kPoints * kGroupRows * 2 * V, threads);
  if (!scratch) return 1;
  parallel(panel_count * groups, tiles.all * e.low * e.high, threads, [&](int64_t begin, int64_t end, int thread) {
    float* y = scratch.of(thread);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t j = item / groups * 2 * V, first = item % groups * per, last = smaller(first + per, e.samples);
      const int vectors = static_cast<int>(panel_columns(e.low - j) / V);
      for (int64_t i = first * pixels_each; i < last * pixels_each; ++i)
        for (int n = 0; n < vectors; ++n) store(image + i * e.low + j + n * V, vf{});
      for (int64_t row = first * tiles.each; row < last * tiles.each; row += kGroupRows) {
        const int64_t rows = smaller(last * tiles.each - row, kGroupRows);
        multiply_points(count, points, tiles.all, e.high, row, rows, panels + j * e.high, e.high * rounded(e.low, V),
                        vectors, y);
        for (int64_t i = 0; i < rows; ++i) {
          float* pixels[kPoints];
          pixels_of(e, tiles, row + i, e.low, image, pixels);
          for (int n = 0; n < vectors; ++n) {
            vf z[kPoints] = {};
            const auto take = [&](int64_t p, int place) { z[place] = load(y + ((p * rows + i) * vectors + n) * V); };
            for (int p = 0; p < kMeanPoints && mean; ++p) take(p, kMeanPlace[p]);
            for (int p = 0; p < kPoints && !mean; ++p) take(p, p);
            for (int k = 0; k < 4; ++k) line_back<4>(z + k);
            for (int k = 0; k < 4; ++k) line_back<1>(z + 4 * k);
            for (int p = 0; p < kPoints; ++p) {
              if (!pixels[p]) continue;
              float* to = pixels[p] + j + n * V;
              store(to, load(to) + z[p]);
            }
          }
        }
      }
    }
  });
  return 0;
}

}  // namespace lgk::cpu::LGK_ISA
